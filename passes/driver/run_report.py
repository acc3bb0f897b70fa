"""The report of a run: what was planned, what was written, what the gates say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from onnxcomp.passes.driver.gates import Verdict
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import PlannedModel
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.ir.files import file_hash
from onnxcomp.passes.lowering.rewrite import Placement
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
from onnxcomp.passes.report.spectra import Spectrum
from onnxcomp.runtime.memory import peak_rss

__all__ = ["encoded_site", "output_file", "planned_sites", "run_report", "skipped_sites"]


def encoded_site(item: EncodedWeight, spectra: Mapping[str, Spectrum]) -> SiteReport:
    """What became of a weight."""
    placement = item.placement
    if placement is None:
        return _planned_site(Choice.kept_dense(item.site, item.reason))
    return dataclasses.replace(
        _planned_site(item.choice),
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


def _planned_site(choice: Choice) -> SiteReport:
    """What would become of a weight."""
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


def skipped_sites(plan: Plan) -> Iterator[SiteReport]:
    """Report entries of tensors that no codec is asked about."""
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
    """How each weight would be stored."""
    return (*(_planned_site(choice) for choice in plan), *skipped_sites(plan))


def run_report(
    planned: PlannedModel,
    output: OutputFile,
    sites: Sequence[SiteReport],
    run: Run,
    verdict: Verdict | None = None,
) -> Report:
    """Put the report of a run together.

    Args:
        planned: The model and its plan.
        output: What was written, or would be.
        sites: What became of each weight.
        run: The circumstances, with the seconds of each stage.
        verdict: What the gates say; None where nothing was written.
    """
    plan, source, pruned = planned.plan, planned.prepared.path, planned.prepared.pruned
    verdict = Verdict() if verdict is None else verdict
    gates = (verdict.verification, verdict.evaluation, verdict.slowdown)
    verify, evaluation, speed = (None if gate is None else gate.to_json() for gate in gates)
    target = None
    if plan.budget.bytes is not None:
        target = {"bytes": plan.budget.bytes, "met": output.bytes <= plan.budget.bytes}
    return Report(
        input=InputFile(
            None if source is None else str(source), plan.source.bytes, plan.source.sha256
        ),
        output=output,
        ratio=plan.source.bytes / max(1, output.bytes),
        coverage=coverage(sites, plan.settings.min_size),
        sites=tuple(sites),
        verify=verify,
        seconds={**run.seconds, "total": round(sum(run.seconds.values()), 4)},
        peak_rss_bytes=peak_rss(),
        versions=versions(),
        config=run.config(plan.settings),
        target=target,
        evaluation=evaluation,
        prune=None if pruned is None else pruned.to_json(),
        speed=speed,
        division=list(plan.division) or None,
    )


def output_file(files: Sequence[Path], size: int) -> OutputFile:
    """What is reported of an output: its files, the model's first, and their bytes."""
    names = tuple(str(path) for path in files)
    return OutputFile(names[0], size, file_hash(files[0]), names)
