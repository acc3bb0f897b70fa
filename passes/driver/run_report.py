"""The report of a run: what was planned, what was written, what the gates say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxcomp.passes.driver.gates import Verdict
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import PlannedModel
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
from onnxcomp.runtime.memory import peak_rss

__all__ = ["planned_site", "planned_sites", "run_report", "skipped_sites"]


def planned_site(choice: Choice) -> SiteReport:
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
    """What becomes of tensors that no codec is asked about."""
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
    return (*(planned_site(choice) for choice in plan), *skipped_sites(plan))


def run_report(
    planned: PlannedModel,
    output: OutputFile,
    sites: Sequence[SiteReport],
    verdict: Verdict,
    run: Run,
) -> Report:
    """Put the report of a run together.

    Args:
        planned: The model and its plan.
        output: What was written, or would be.
        sites: What became of each weight.
        verdict: What the gates say.
        run: The circumstances, with the seconds of each stage.
    """
    plan, source, pruned = planned.plan, planned.prepared.path, planned.prepared.pruned
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
