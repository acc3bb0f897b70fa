"""From a plan to a file: encode, rewrite, save."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.driver.run_report import encoded_site, skipped_sites
from onnxcomp.passes.encoding.distill import distilled
from onnxcomp.passes.encoding.encoder import SPILL_BYTES, Workers, encode
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Samples
from onnxcomp.passes.ir.model import Saved, save
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.report.report import SiteReport
from onnxcomp.passes.report.spectra import spectra

# Gives a block that times one stage, by the stage's name.
Stage = Callable[[str], contextlib.AbstractContextManager[None]]

__all__ = ["Stage", "Written", "emit"]


def _untimed(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()


def _check_space(path: Path, plan: Plan) -> None:
    """Refuse a disk that would be full in the end: what the output takes is known exactly.

    Payloads of large models lie in a temporary file beside it until it is written.
    """
    payloads = sum(choice.bytes or 0 for choice in plan if not choice.kept)
    needed = (plan.bytes or 0) + (payloads if payloads > SPILL_BYTES else 0)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UsageError(
            f"cannot write {path.name}: it and its temporary file take {needed / 1e6:,.1f} MB, "
            f"and {free / 1e6:,.1f} MB of the disk are free",
            hint="choose a folder with enough free space",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A model on disk.

    Attributes:
        saved: Its files.
        sites: How each weight is stored.
    """

    saved: Saved
    sites: tuple[SiteReport, ...]


def emit(
    prepared: Prepared,
    plan: Plan,
    path: Path,
    *,
    jobs: int = 1,
    cache: PayloadCache | None = None,
    progress: Progress | None = None,
    stage: Stage = _untimed,
    samples: Samples | None = None,
    workers: Workers | None = None,
) -> Written:
    """Encode the weights, rewrite the model in place and save it.

    Args:
        prepared: The model and its weights; the model is changed.
        plan: A settled plan.
        path: The .onnx file; temporary files lie in its folder.
        jobs: Threads of the encoders.
        cache: Payloads of earlier runs.
        progress: Called before each weight and after the last one.
        stage: Times a part of the work by its name.
        samples: Calibration inputs; None to encode plainly.
        workers: Encode weights by their values; None to do so here.

    Raises:
        UsageError: The disk has no space for the output.
    """
    _check_space(path, plan)
    model, sites = prepared.model, prepared.sites
    with stage("encode"):
        encoded = encode(
            model,
            sites,
            plan,
            jobs=jobs,
            cache=cache,
            progress=progress,
            folder=path.parent,
            samples=samples,
            workers=workers,
        )
    if plan.settings.distill:
        with stage("distill"):
            encoded = distilled(model, encoded, plan, samples, path.parent)
    with stage("write"):
        placements = [item.placement for item in encoded if item.placement is not None]
        found = spectra(model, placements)
        settings = plan.settings
        lower(model, placements, portable=settings.portable, functions=settings.functions)
        saved = save(model, path, external_data=plan.settings.external_data)
    return Written(saved, (*(encoded_site(item, found) for item in encoded), *skipped_sites(plan)))
