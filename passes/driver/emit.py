"""From a plan to a file: encode, rewrite, save; and the report of what was done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.encoding.calibrated import Samples
from onnxcomp.passes.encoding.distill import distilled
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.encoder import Progress, encode
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.model import Saved, save
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.lowering.split_operators import has_place
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.report.report import (
    InputFile,
    OutputFile,
    Report,
    SiteReport,
    coverage,
    versions,
)
from onnxcomp.passes.report.spectra import Spectrum, spectra
from onnxcomp.runtime.memory import peak_rss

# Gives a block that times one stage, by the stage's name.
Stage = Callable[[str], contextlib.AbstractContextManager[None]]

__all__ = ["Stage", "Written", "planned_sites", "report", "write"]


def _untimed(name: str) -> contextlib.AbstractContextManager[None]:
    del name
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """A model on disk.

    Attributes:
        saved: Its files.
        sites: What became of each weight.
    """

    saved: Saved
    sites: tuple[SiteReport, ...]


def write(
    prepared: Prepared,
    plan: Plan,
    path: Path,
    *,
    jobs: int = 1,
    cache: PayloadCache | None = None,
    progress: Progress | None = None,
    stage: Stage = _untimed,
    samples: Samples | None = None,
) -> Written:
    """Encode the weights, rewrite the model in place and save it.

    Args:
        prepared: The model and its weights; the model is changed.
        plan: A settled plan.
        path: The .onnx file; temporary files lie in its folder.
        jobs: Threads of the encoders.
        cache: Payloads of earlier runs.
        progress: Told about each weight.
        stage: Times a part of the work by its name.
        samples: Calibration inputs; None to encode plainly.
    """
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
        )
    if plan.settings.distill:
        with stage("distill"):
            encoded = distilled(model, encoded, plan, samples, path.parent)
    with stage("write"):
        placements = [item.placement for item in encoded if item.placement is not None]
        found = spectra(model, placements)
        if placements:
            rewrite(model, placements, portable=plan.settings.portable)
        saved = save(model, path, external_data=plan.settings.external_data)
    return Written(saved, (*(_site(item, found) for item in encoded), *_skipped(plan)))


def _site(item: EncodedWeight, spectra: Mapping[str, Spectrum]) -> SiteReport:
    choice, placement = item.choice, item.placement
    if placement is None:
        kept = Choice.kept_dense(item.site, item.reason)
        return _planned(kept)
    return dataclasses.replace(
        _planned(choice),
        mode=_served(placement),
        bytes_after=placement.payload.nbytes,
        weight_error=item.error,
        output_error=item.output_error,
        note=item.note,
        spectrum=spectra.get(item.site.name),
    )


def _served(placement: Placement) -> str:
    """How the weight's products and look-ups are served."""
    if placement.mode == "decode":
        return "decode"
    kinds = placement.codec.kinds(placement.site)
    splits = placement.codec.factors is not None
    fusable = any(
        use.need in kinds or (splits and has_place(placement.site, use))
        for use in placement.site.uses
    )
    return "fused" if fusable and placement.mode != "folded" else "folded"


def _planned(choice: Choice) -> SiteReport:
    return SiteReport(
        name=choice.site,
        shape=choice.shape,
        dtype=choice.dtype,
        uses=choice.uses,
        method=choice.codec,
        params=choice.params.to_json(),
        mode="" if choice.kept else choice.mode,
        bytes_before=choice.before,
        bytes_after=choice.before if choice.bytes is None else choice.bytes,
        reason=choice.reason,
    )


def _skipped(plan: Plan) -> Iterable[SiteReport]:
    for tensor in plan.skipped:
        yield SiteReport(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            uses=tensor.uses,
            method="dense",
            params={},
            mode="",
            bytes_before=tensor.bytes,
            bytes_after=tensor.bytes,
            reason=tensor.reason,
        )


def planned_sites(plan: Plan) -> tuple[SiteReport, ...]:
    """What would become of each weight."""
    return (*(_planned(choice) for choice in plan), *_skipped(plan))


def report(
    plan: Plan,
    source: str | None,
    output: OutputFile,
    sites: Sequence[SiteReport],
    *,
    verify: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    prune: Mapping[str, Any] | None = None,
    speed: Mapping[str, Any] | None = None,
) -> Report:
    """Put the report of a run together.

    Args:
        plan: The plan, settled.
        source: Path of the input; None for a model in memory.
        output: The model that was written.
        sites: What became of each weight.
        verify: Result of the fidelity gate.
        seconds: Wall-clock seconds by stage.
        config: Settings in effect.
        evaluation: Scores by the user's own measure.
        prune: What pruning did.
        speed: Times of both models.
    """
    target = None
    if plan.budget.bytes is not None:
        target = {"bytes": plan.budget.bytes, "met": output.bytes <= plan.budget.bytes}
    return Report(
        input=InputFile(source, plan.source.bytes, plan.source.sha256),
        output=output,
        ratio=plan.source.bytes / max(1, output.bytes),
        coverage=coverage(sites, plan.settings.min_size),
        sites=tuple(sites),
        verify=verify,
        seconds=dict(seconds),
        peak_rss_bytes=peak_rss(),
        versions=versions(),
        config=dict(config),
        target=target,
        evaluation=evaluation,
        prune=prune,
        speed=speed,
        division=list(plan.division) or None,
    )
