"""The third stage of a run: emit a plan and ask the gates, with another plan while they object."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError
from onnxcomp.passes.driver.emit import Written, emit
from onnxcomp.passes.driver.gates import (
    Verdict,
    accepted_error,
    ask_gates,
    error_to_reach,
    largest_error,
)
from onnxcomp.passes.driver.repair import Repair
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.size_search import SizeSearch
from onnxcomp.passes.driver.state import PlannedModel
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Samples, load_samples, warn_of_uncalibrated_factors
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.ir.unverified import kept_unverified
from onnxcomp.passes.planning.plan import Plan

__all__ = ["Attempt", "attempt"]

log = logging.getLogger(__name__)

# Plans that are tried where gates object, and where the smallest output is looked for.
_ATTEMPTS, _SEARCHES = 5, 12


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


def attempt(planned: PlannedModel, path: Path, output: Path, run: Run) -> Attempt:
    """Emit a plan and run the gates, with other plans until one passes or none is left.

    Args:
        planned: The model and its plan. Without gates that judge the loss it is changed in place.
        path: The .onnx file; temporary files lie in its folder.
        output: Where it goes in the end; beside it a model lies while gates look at it.
        run: The circumstances.

    Returns:
        The attempt that the gates accepted, the smallest where size is what is looked for; the
        last one where they accepted none.
    """
    if run.data is None and run.calibration != "off":
        warn_of_uncalibrated_factors(planned.plan)
    limit = accepted_error(planned.plan.settings, run)
    slow = planned.plan.settings.max_slowdown
    planned = _comparable(planned, path)
    if limit is None and slow is None and run.evaluation is None:
        cache = None if run.cache is None else PayloadCache(run.cache)
        return _emitted(planned, path, output, cache, run, again=False)
    return _searched(planned, path, output, run, limit)


def _searched(
    planned: PlannedModel, path: Path, output: Path, run: Run, limit: float | None
) -> Attempt:
    """Attempts with one plan after the other."""
    own = path.parent / "payloads"
    cache = PayloadCache(own, lasting=False) if run.cache is None else PayloadCache(run.cache)
    free = _has_free_size(planned, run)
    repair = Repair(
        planned.prepared, planned.candidates, path.name, timing=planned.timing, free=free
    )
    weights = sum(site.size for site in planned.prepared.sites)
    search = SizeSearch(functools.partial(repair.within, planned.plan), weights) if free else None
    best: Attempt | None = None
    last = (_SEARCHES if free else _ATTEMPTS) - 1
    for number in range(last + 1):
        folder = path.parent / f"attempt{number}"
        folder.mkdir()
        done = _emitted(planned, folder / path.name, output, cache, run, again=True)
        other = None
        if number < last:
            with run.stage("repair"):  # looks at the files of the attempt
                other = _other_plan(repair, search, done, limit)
        best = _better(best, done)
        if other is None:
            break
        plan = dataclasses.replace(other, division=planned.plan.division)
        planned = dataclasses.replace(planned, plan=plan)
    assert best is not None
    return best


def _has_free_size(planned: PlannedModel, run: Run) -> bool:
    """Whether a run says what has to be kept, and neither how large the output is nor its bits."""
    settings = planned.plan.settings
    sized = (settings.bits, settings.ratio, settings.target_size) != (None, None, None)
    limited = settings.max_error is not None or run.evaluation is not None
    return limited and not sized and planned.candidates is not None


def _better(best: Attempt | None, done: Attempt) -> Attempt:
    """The smaller of two attempts that passed, or the one that did, or the later one.

    The files of the other one are removed.
    """
    if best is None:
        return done
    if best.verdict.passed and (
        not done.verdict.passed or done.written.saved.bytes >= best.written.saved.bytes
    ):
        kept, gone = best, done
    else:
        kept, gone = done, best
    shutil.rmtree(gone.written.saved.files[0].parent)
    return kept


def _comparable(planned: PlannedModel, path: Path) -> PlannedModel:
    """With what the result can be compared: where inputs have new shapes, the pruned model."""
    if not planned.prepared.has_new_inputs:
        return planned
    pruned = save(planned.prepared.model, path.with_name(f"pruned.{path.name}")).files[0]
    return dataclasses.replace(planned, subject=planned.subject.without_inputs(lambda: pruned))


def _emitted(
    planned: PlannedModel,
    path: Path,
    output: Path,
    cache: PayloadCache | None,
    run: Run,
    *,
    again: bool,
) -> Attempt:
    """Emit a plan and ask the gates.

    Args:
        planned: The model and its plan.
        path: The .onnx file.
        output: Where it goes in the end.
        cache: Payloads of earlier attempts.
        run: The circumstances.
        again: Whether the model may be emitted once more, and so must not change.
    """
    prepared, subject, plan = planned.prepared, planned.subject, planned.plan
    with run.stage("load"):
        samples = load_samples(
            subject.samples, run.calibration, prepared.sites, plan, tune=run.tune
        )
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
        workers=run.workers,
    )
    verdict = Verdict()
    if run.verify or again:
        data = _inputs(planned, samples, run)
        with kept_unverified(written.saved.files, output) as small:
            verdict = ask_gates(subject.reference(), small, data, plan.settings, run)
    return Attempt(planned, written, verdict)


def _inputs(planned: PlannedModel, samples: Samples | None, run: Run) -> Any:
    """What models are compared on: a few of the inputs that something was fitted to."""
    if planned.prepared.has_new_inputs:
        return None
    if samples is None and planned.prepared.pruned is not None and run.data is not None:
        samples = Samples(planned.subject.samples() or ())
    return run.data if samples is None else samples.verification_feeds


def _other_plan(
    repair: Repair, search: SizeSearch | None, done: Attempt, limit: float | None
) -> Plan | None:
    """The plan to try after this attempt; None where there is none."""
    plan, verdict = done.planned.plan, done.verdict
    if verdict.slowdown is not None and (search is None or not verdict.slowdown.passed):
        return repair.paced(plan, verdict.slowdown)
    aim = error_to_reach(verdict, limit)
    if verdict.passed or aim is None:
        if search is None or not verdict.passed:
            return None
        return search.next(plan, passed=True, excess=_excess(verdict, limit))
    larger = None
    if search is not None:
        larger = search.next(plan, passed=False, excess=_excess(verdict, limit))
    try:
        feeds = done.planned.subject.samples()
        path = done.written.saved.files[0]
        below = None if larger is None else larger.bytes
        found = repair.plan(plan, path, feeds, error=aim[0], wanted=aim[1], below=below)
    except ModelError as error:  # of the probe: an output may hold no floating point
        log.warning("the weights that cause the error cannot be found: %s", error.message)
        return larger
    if found is not None and search is not None:
        search.forget_failures()
    return larger if found is None else found


def _excess(verdict: Verdict, limit: float | None) -> float | None:
    """The measured error over the allowed one; None where it is a score that decides."""
    error = largest_error(verdict)
    return None if limit is None or error is None else error / limit
