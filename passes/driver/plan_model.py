"""The second stage of a run: from a subject to a plan."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare, with_small_weights
from onnxcomp.passes.driver.prune_budget import Trial, best_share, output_noise, witnesses
from onnxcomp.passes.driver.referee import referee_of
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import PlannedModel, Subject
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.planning.candidate_sets import candidate_sets
from onnxcomp.passes.planning.measurements import measure
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.planning.planner import plan_from, settle
from onnxcomp.passes.weight import Feed

__all__ = ["plan_subject"]


def plan_subject(
    subject: Subject, settings: Settings, given: Plan | None, run: Run
) -> PlannedModel:
    """Prepare a model, and make its plan or settle the given one.

    Raises:
        UsageError: The plan needs inputs that are not given, or does not fit the model.
    """
    if given is not None and given.pruned and given.pruned.calibrated and run.data is None:
        raise UsageError(
            "the plan prunes by calibration inputs, but none are given",
            hint="give the --data it was made with",
        )
    with run.stage("plan"):
        if settings.divide and given is None:
            return _divided(subject, settings, run)
        return _planned(subject, settings, given, run)


def _planned(
    subject: Subject, settings: Settings, given: Plan | None, run: Run, *, compared: bool = True
) -> PlannedModel:
    if given is None:
        settings = with_small_weights(subject.loaded, settings)
    prepared = prepare(subject.loaded, settings, subject.samples, threads=run.jobs)
    if prepared.has_new_inputs:
        subject = subject.without_inputs(subject.reference)
    if given is not None:
        return PlannedModel(subject, prepared, settle(given, prepared, name=subject.name), None)
    measured = measure(prepared, settings, subject.samples, calibrated=run.calibrates)
    candidates = candidate_sets(prepared, measured, threads=run.jobs)
    referee = referee_of(prepared, settings, subject, run) if compared else None
    plan = plan_from(
        candidates,
        prepared,
        settings,
        name=subject.name,
        timing=measured.timing,
        referee=referee,
    )
    return PlannedModel(subject, prepared, plan, candidates, measured.timing)


def _divided(subject: Subject, settings: Settings, run: Run) -> PlannedModel:
    """The plan for the division of a budget between pruning and codecs with the least loss."""
    feeds = subject.samples()
    if feeds is None or settings.prune_caches:
        why = "inputs decide" if feeds is None else "models with equal inputs are compared"
        raise UsageError(
            f"the size cannot be divided between pruning and codecs: {why}",
            hint="give --data without --prune-caches, or a share with --prune-ratio 0.2",
        )
    seen = witnesses(feeds)

    def attempt(share: float) -> tuple[Trial, PlannedModel] | None:
        """The plan where pruning takes this share; None where it cannot."""
        score = settings.prune_score if share else None
        own = dataclasses.replace(
            settings, divide=None, prune_ratio=share or None, prune_score=score
        )
        planned = _planned(subject.copy(), own, None, run, compared=False)
        if planned.plan.pruned is not None and not planned.plan.pruned.met:
            return None
        noise = _pruning_noise(planned, seen) if share else 0.0
        return _trial(share, planned.plan, noise), planned

    best, trials = best_share(attempt)
    division = tuple(trial.to_json() for trial in trials)
    return dataclasses.replace(best, plan=dataclasses.replace(best.plan, division=division))


def _trial(share: float, plan: Plan, noise: float) -> Trial:
    codes = plan.error if any(not choice.kept for choice in plan) else 0.0
    return Trial(share, plan.bytes or 0, plan.met, math.sqrt(noise), codes)


def _pruning_noise(planned: PlannedModel, feeds: Sequence[Feed]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        pruned = save(planned.prepared.model, Path(folder) / "pruned.onnx").files[0]
        return output_noise(planned.subject.reference(), pruned, feeds)
