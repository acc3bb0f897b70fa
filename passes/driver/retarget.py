"""Write a compressed model for another class of machines: only codes that it likes less change."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.values import Target
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.encoding.recode import Recoded, Recoding
from onnxcomp.passes.ir.files import Loaded, publish, read, refuse_overwriting, workspace
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.restore import check_match, compressed_records, runs_alone

__all__ = ["Retargeted", "retarget"]


@dataclasses.dataclass(frozen=True, slots=True)
class Retargeted:
    """What `retarget` did.

    Attributes:
        path: The new model.
        bytes: Bytes of its files.
        target: The class of machines.
        recoded: Weights that got other codes.
        kept: Names of compressed weights that stayed as they were, bit by bit.
    """

    path: Path
    bytes: int
    target: str
    recoded: tuple[Recoded, ...]
    kept: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def retarget(
    model: Path, output: Path, target: Target, *, original: Path | None = None, jobs: int = 1
) -> Retargeted:
    """Encode again what another class of machines would run faster.

    Codes that suit it already, and weights of other codecs, keep their bits. The new codes are made
    by values; those that were calibrated have to be made by `optimize` to be so again.

    Args:
        model: A compressed model.
        output: Where to write the new one.
        target: The class of machines.
        original: The dense model; None to take the decoded weights, which adds the error of the new
            codes to that of the old ones.
        jobs: Threads of the encoders.

    Raises:
        ModelError: The models do not belong together, or the first one is damaged.
        UsageError: The first model is not compressed, or the output is one of the inputs.
    """
    compressed = read(model)
    records = compressed_records(compressed.model)
    if not records:
        raise UsageError("the model holds no compressed weights", hint="compress it with optimize")
    dense = _dense(model, original)
    refuse_overwriting(compressed.files | dense.files, output)
    prepared = prepare(dense, Settings(min_size=0))
    check_match(records, prepared.sites, "leave out --original to take the decoded weights")
    work = Recoding(prepared.model, compressed.model, target, original is not None, jobs)
    made = [work.run(site, records[site.name]) for site in prepared.sites if site.name in records]
    placements = [placement for placement, _ in made]
    lower(prepared.model, placements, portable=runs_alone(compressed.model))
    with workspace(output) as folder:
        saved = save(prepared.model, folder / output.name)
        files = publish(saved.files, output.parent)
    recoded = tuple(facts for _, facts in made if facts is not None)
    kept = tuple(placement.site.name for placement, facts in made if facts is None)
    return Retargeted(files[0], saved.bytes, target, recoded, kept)


def _dense(model: Path, original: Path | None) -> Loaded:
    if original is not None:
        return read(original)
    loaded = read(model)
    expand(loaded.model)
    return loaded
