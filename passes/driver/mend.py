"""Find the weights of a compressed model that cause its error, and make them dense again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.perturbation import Probe
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.ir.files import publish, read, refuse_overwriting, workspace
from onnxcomp.passes.ir.manifest import ManifestEntry
from onnxcomp.passes.ir.model import copy_model, load, save
from onnxcomp.passes.lowering.restore import check_match, compressed_records, place_stored
from onnxcomp.passes.verification.bisect import blame, decoded_weights
from onnxcomp.passes.verification.fidelity import Verification, verify
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["Mended", "mend"]

# What is aimed at, of the accepted error, in one attempt after the other.
_AIMS = (0.95, 0.7, 0.4)


@dataclasses.dataclass(frozen=True, slots=True)
class Mended:
    """What was found.

    Attributes:
        blamed: Names of the weights that have to be dense, the worst first.
        verification: Of the model without them; of the given one where there are none.
        path: The repaired model; None where it was not asked for or not needed.
        bytes: Bytes of its files.
    """

    blamed: tuple[str, ...]
    verification: Verification
    path: Path | None = None
    bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The object of ``verify`` with what was found added."""
        return {
            **self.verification.to_json(),
            "bisect": {
                "blamed": list(self.blamed),
                "path": None if self.path is None else str(self.path),
                "bytes": self.bytes,
            },
        }


def mend(
    reference: Path,
    compressed: Path,
    output: Path | None = None,
    *,
    tolerance: float,
    data: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int = 4,
    seed: int = 0,
) -> Mended:
    """Make weights dense until a compressed model keeps an error.

    Args:
        reference: The original.
        compressed: A model that was made from it.
        output: Where to write the repaired model; None to find the weights only.
        tolerance: Largest accepted relative L2 error of an output.
        data: Inputs; None to make them up.
        shapes: Sizes of made-up inputs.
        samples: How many inputs to make up.
        seed: Of made-up inputs.

    Raises:
        ModelError: The models do not belong together.
        UsageError: The output is one of the inputs.
    """
    feeds = _feeds(reference, data, shapes, samples, seed)
    first = verify(reference, compressed, data=feeds, tolerance=tolerance)
    broken = not first.agreement.passed or any(m.problem for m in first.outputs.values())
    if first.passed or broken:  # where the forms disagree, no weight is the cause
        return Mended((), first)
    prepared = prepare(loaded := read(reference), Settings(min_size=0))
    if output is not None:
        refuse_overwriting(loaded.files | read(compressed).files, output)
    records = _records(load(compressed), prepared)
    place = Path(tempfile.gettempdir()) / "mended.onnx" if output is None else output
    with workspace(place) as folder:
        error = first.error
        decoded = decoded_weights(compressed, [s for s in prepared.sites if s.name in records])
        for aim in _AIMS:
            blamed = _blamed(prepared, decoded, feeds, aim * tolerance / error, folder)
            names = {site.name for site in blamed}
            kept = {name: record for name, record in records.items() if name not in names}
            saved = _written(prepared, compressed, kept, folder / place.name)
            found = verify(reference, saved.files[0], data=feeds, tolerance=tolerance)
            if found.passed:
                break
        words = tuple(site.name for site in blamed)
        if output is None or not found.passed:
            return Mended(words, found)
        files = publish(saved.files, output.parent)
    return Mended(words, found, files[0], saved.bytes)


def _feeds(
    model: Path, data: Any, shapes: Mapping[str, Sequence[int]] | None, samples: int, seed: int
) -> list[Any]:
    from onnxcomp.runtime.inputs import load_inputs, synthesize_inputs

    if data is not None:
        return list(load_inputs(data, model))
    return list(synthesize_inputs(model, shapes=shapes, samples=samples, seed=seed))


def _records(model: ir.Model, prepared: Prepared) -> dict[str, ManifestEntry]:
    records = compressed_records(model)
    if not records:
        raise UsageError("the second model holds no compressed weights", hint="check the order")
    hint = "where the graph itself was changed, give optimize a --tolerance instead"
    check_match(records, prepared.sites, hint)
    return records


def _blamed(
    prepared: Prepared,
    decoded: Mapping[WeightSite, Array],
    feeds: Sequence[Any],
    share: float,
    folder: Path,
) -> list[WeightSite]:
    """Weights without which the error is this share of what it is."""
    sites = list(decoded)
    probe = Probe(prepared.model, sites, feeds, folder)

    def noise(chosen: Sequence[WeightSite]) -> float:
        return probe.noise({site: decoded[site] for site in chosen}, worst=True)

    found = blame(noise, sites, noise(sites) * share**2, sum(site.nbytes for site in sites))
    return sites if found is None else found


def _written(
    prepared: Prepared, compressed: Path, kept: Mapping[str, ManifestEntry], path: Path
) -> Any:
    """The original with the compressed weights that stay."""
    model = copy_model(prepared.model)
    place_stored(model, prepared.sites, load(compressed), kept)
    return save(model, path)
