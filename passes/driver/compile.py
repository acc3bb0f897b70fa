"""One run from a model to a model: read, prepare and plan, emit, ask the gates, publish."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.attempts import attempt
from onnxcomp.passes.driver.gates import Verdict
from onnxcomp.passes.driver.plan_model import plan_subject
from onnxcomp.passes.driver.result import RejectedError, Result, TargetMissedError
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.run_report import planned_sites, run_report
from onnxcomp.passes.driver.state import PlannedModel, Subject
from onnxcomp.passes.encoding.calibrated import tell_of_plain_factors
from onnxcomp.passes.ir import files
from onnxcomp.passes.ir.model import Saved, load, save
from onnxcomp.passes.ir.validate import check_runnable
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.report.report import OutputFile

__all__ = ["compile_model", "dry_run", "plan_model"]


def _only_planned(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> PlannedModel:
    with run.stage("load"):
        loaded = files.read(model)
        if output is not None:
            files.refuse_overwriting(loaded.files, output)
    name = "out.onnx" if output is None else output.name
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject.of(model, loaded, run.data, name, Path(folder))
        return plan_subject(subject, settings, given, run)


def plan_model(model: Any, settings: Settings, run: Run) -> Plan:
    """The plan for a model, with exact bytes."""
    return _only_planned(model, None, settings, None, run).plan


def dry_run(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> Result:
    """What `compile_model` would do; nothing is written."""
    planned = _only_planned(model, output, settings, given, run)
    plan = planned.plan
    target = OutputFile(None if output is None else str(output), plan.bytes or 0, None, ())
    report = run_report(planned, target, planned_sites(plan), Verdict(), run)
    return Result(None, plan, report, None)


def compile_model(
    model: Any, output: Path, settings: Settings, given: Plan | None, run: Run
) -> Result:
    """Write a smaller model.

    Args:
        model: What `onnxcomp.optimize` accepts.
        output: Path of the new model.
        settings: What is asked for.
        given: A plan to carry out; None to make one.
        run: The circumstances.

    Raises:
        TargetMissedError: No plan meets the target; the smallest output was written.
        RejectedError: The result failed the gate and was kept as ``*.rejected.onnx``.
    """
    with run.stage("load"):
        loaded = files.read(model)
        files.refuse_overwriting(loaded.files, output)
        if run.verify or run.data is not None:
            check_runnable(loaded.model)
    with files.workspace(output) as folder:
        subject = Subject.of(model, loaded, run.data, output.name, folder)
        planned = plan_subject(subject, settings, given, run)
        if run.data is None and run.calibration != "off":
            tell_of_plain_factors(planned.plan)
        done = attempt(planned, folder / output.name, run)
        accepted = done.verdict.passed or run.force
        published = _publish(done.written.saved, output, accepted=accepted)
    size = done.written.saved.bytes
    names = tuple(str(path) for path in published)
    written = OutputFile(names[0], size, files.file_hash(published[0]), names)
    report = run_report(done.planned, written, done.written.sites, done.verdict, run)
    result = Result(published[0], done.planned.plan, report, done.verdict.verification)
    return _judged(result, done.verdict, accepted=accepted)


def _publish(saved: Saved, output: Path, *, accepted: bool) -> tuple[Path, ...]:
    if accepted:
        return files.publish(saved.files, output.parent)
    rejected = files.rejected_path(output)
    if len(saved.files) == 1:
        saved.files[0].replace(rejected)
        return (rejected,)
    # The model refers to its data by name: it is written again under the new one.
    return save(load(saved.files[0]), rejected).files


def _judged(result: Result, verdict: Verdict, *, accepted: bool) -> Result:
    """The result, or the error that goes with it."""
    if not accepted:
        raise RejectedError(
            f"the compressed model failed verification: {verdict.failure}; "
            f"it was kept as {result.path}",
            result,
            hint="look at it with onnxcomp verify; --force publishes it all the same",
        )
    pruned = result.plan.pruned
    if pruned is not None and not pruned.met:
        what = "of the parameters that can go" if pruned.unit == "parameters" else "of the FLOPs"
        raise TargetMissedError(
            f"{result.path}: pruning took {100 * pruned.reached:.1f} % {what}, "
            f"{100 * pruned.asked:.1f} % were asked for",
            result,
            hint="onnxcomp inspect --groups shows what can go and why the rest stays",
        )
    wanted = result.plan.budget.bytes
    if wanted is not None and result.report.output.bytes > wanted:
        raise TargetMissedError(
            f"{result.path} has {result.report.output.bytes} bytes, {wanted} were asked for: "
            "no plan is smaller",
            result,
            hint="allow a larger target, a smaller --min-size or more methods",
        )
    return result
