"""One run from a model to a model: read, prepare and plan, emit, ask the gates, publish."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.attempts import attempt
from onnxcomp.passes.driver.plan_model import plan_subject
from onnxcomp.passes.driver.publish import publish
from onnxcomp.passes.driver.result import Result, judged
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.run_report import output_file, planned_sites, run_report
from onnxcomp.passes.driver.state import PlannedModel, Subject
from onnxcomp.passes.ir import files
from onnxcomp.passes.ir.validate import check_kernels, check_runnable
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
    report = run_report(planned, target, planned_sites(plan), run)
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
        if run.verify or run.data is not None or run.evaluation is not None:
            check_kernels()
    with files.workspace(output) as folder, run.with_workers(folder) as run:
        subject = Subject.of(model, loaded, run.data, output.name, folder)
        planned = plan_subject(subject, settings, given, run)
        done = attempt(planned, folder / output.name, output, run)
        accepted = done.verdict.passed or run.force
        saved, chosen = done.written.saved, done.planned.plan.settings
        published = publish(saved, output, chosen, accepted=accepted, verify=run.verify)
    small = output_file(published.files, published.bytes)
    report = run_report(done.planned, small, done.written.sites, run, done.verdict)
    result = Result(published.files[0], done.planned.plan, report, done.verdict.verification)
    return judged(result, "" if accepted else done.verdict.failure)
