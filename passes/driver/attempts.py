"""The third stage of a run: emit a plan and ask the gates, with another plan while they object."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError
from onnxcomp.passes.driver.emit import Written, emit
from onnxcomp.passes.driver.gates import Verdict, accepted_error, ask_gates, error_to_reach
from onnxcomp.passes.driver.repair import Repair
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import PlannedModel
from onnxcomp.passes.encoding.calibrated import Samples, load_samples, tell_of_plain_factors
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.planning.plan import Plan

__all__ = ["Attempt", "attempt"]

log = logging.getLogger(__name__)

# Plans that are tried where gates object.
_ATTEMPTS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One plan, carried out.

    Attributes:
        planned: What was emitted.
        written: The files.
        verdict: What the gates say.
    """

    planned: PlannedModel
    written: Written
    verdict: Verdict


def attempt(planned: PlannedModel, path: Path, run: Run) -> Attempt:
    """Emit a plan and ask the gates; while they object, the next plan that is in sight.

    Args:
        planned: The model and its plan. Without gates that judge the loss it is changed in place.
        path: The .onnx file; temporary files lie in its folder.
        run: The circumstances.

    Returns:
        The last attempt.
    """
    if run.data is None and run.calibration != "off":
        tell_of_plain_factors(planned.plan)
    limit = accepted_error(planned.plan.settings, run)
    slow = planned.plan.settings.max_slowdown
    judged = limit is not None or slow is not None or run.evaluation is not None
    planned = _comparable(planned, path)
    cache = _payloads(run, path.parent, again=judged)
    repair = Repair(planned.prepared, planned.candidates, path.name, timing=planned.timing)
    last = _ATTEMPTS - 1 if judged else 0
    for number in range(last + 1):
        done = _emitted(planned, path, cache, run, again=judged)
        if done.verdict.passed or number == last:
            break
        with run.stage("repair"):
            other = _other_plan(repair, done, path, limit)
        if other is None:
            break
        plan = dataclasses.replace(other, division=planned.plan.division)
        planned = dataclasses.replace(planned, plan=plan)
    return done


def _comparable(planned: PlannedModel, path: Path) -> PlannedModel:
    """With what the result can be compared: where inputs have new shapes, the pruned model."""
    if not planned.prepared.has_new_inputs:
        return planned
    pruned = save(planned.prepared.model, path.with_name(f"pruned.{path.name}")).files[0]
    return dataclasses.replace(planned, subject=planned.subject.without_inputs(lambda: pruned))


def _payloads(run: Run, folder: Path, *, again: bool) -> PayloadCache | None:
    """Where payloads are kept: in the user's folder, or beside the output for the next attempt."""
    kept = folder / "payloads" if run.cache is None and again else run.cache
    return None if kept is None else PayloadCache(kept)


def _emitted(
    planned: PlannedModel, path: Path, cache: PayloadCache | None, run: Run, *, again: bool
) -> Attempt:
    """Emit a plan and ask the gates.

    Args:
        planned: The model and its plan.
        path: The .onnx file.
        cache: Payloads of earlier attempts.
        run: The circumstances.
        again: Whether the model may be emitted once more, and so must not change.
    """
    prepared, subject, plan = planned.prepared, planned.subject, planned.plan
    with run.stage("load"):
        samples = load_samples(subject.samples, run.calibration, prepared.sites, plan)
    model = copy_model(prepared.model) if again else prepared.model
    written = emit(
        dataclasses.replace(prepared, model=model),
        plan,
        path,
        jobs=run.jobs,
        cache=cache,
        progress=run.progress,
        stage=run.stage,
        samples=samples,
    )
    verdict = Verdict()
    if run.verify or again:
        data = _inputs(planned, samples, run)
        verdict = ask_gates(subject.reference(), written.saved.files[0], data, plan.settings, run)
    return Attempt(planned, written, verdict)


def _inputs(planned: PlannedModel, samples: Samples | None, run: Run) -> Any:
    """What models are compared on: a few of the inputs that something was fitted to."""
    if planned.prepared.has_new_inputs:
        return None
    if samples is None and planned.prepared.pruned is not None and run.data is not None:
        samples = Samples(planned.subject.samples() or ())
    return run.data if samples is None else samples.witnesses


def _other_plan(repair: Repair, done: Attempt, path: Path, limit: float | None) -> Plan | None:
    """The plan to try after one that a gate objected to; None where none is in sight."""
    plan, verdict = done.planned.plan, done.verdict
    if verdict.slowdown is not None and not verdict.slowdown.passed:
        return repair.faster(plan, verdict.slowdown)
    aim = error_to_reach(verdict, limit)
    if aim is None:
        return None
    try:
        feeds = done.planned.subject.samples()
        return repair.plan(plan, path, feeds, error=aim[0], wanted=aim[1])
    except ModelError as error:  # of the probe: an output may hold no floating point
        log.warning("the weights that cause the error cannot be found: %s", error.message)
        return None
