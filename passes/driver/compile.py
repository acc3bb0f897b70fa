"""One run from a model to a model: read, plan, encode, rewrite, save, verify, publish."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.dataset import SampleSource
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.emit import Written, planned_sites, report, write
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.driver.prune_budget import (
    Trial,
    best_share,
    output_noise,
    said_once,
    witnesses,
)
from onnxcomp.passes.driver.repair import Repair
from onnxcomp.passes.driver.result import RejectedError, Result, TargetMissedError
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.encoding.calibrated import Samples, load_samples, tell_of_plain_factors
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.files import (
    Loaded,
    file_hash,
    publish,
    read,
    refuse_overwriting,
    rejected_path,
    workspace,
)
from onnxcomp.passes.ir.model import Saved, copy_model, load, save
from onnxcomp.passes.ir.validate import check_runnable
from onnxcomp.passes.latency.measure import Slowdown, measure_slowdown
from onnxcomp.passes.latency.model import Timing
from onnxcomp.passes.planning.measurements import gather_evidence
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.planning.planner import make_menus, plan_from, settle
from onnxcomp.passes.planning.search_space import Menu
from onnxcomp.passes.report.report import OutputFile, Report
from onnxcomp.passes.verification.user_metric import Evaluation
from onnxcomp.passes.weight import Feed

if TYPE_CHECKING:
    from onnxcomp.passes.verification.fidelity import Verification

__all__ = ["compile_model", "dry_run", "plan_model", "reference_file"]


log = logging.getLogger(__name__)

# Plans that are tried where gates object.
_ATTEMPTS = 5


def reference_file(model: Any, loaded: Loaded, path: Path) -> Path:
    """The input as a file; one given in memory is written when somebody is going to run it."""
    if loaded.path is not None:
        return loaded.path
    return path if path.exists() else save(load(model), path).files[0]


@dataclasses.dataclass(slots=True)
class _Work:
    """A model that is being planned.

    Attributes:
        prepared: The model and its weights.
        plan: What was decided.
        menus: What there was to choose from; None where the plan was given.
        timing: What settings cost in time; None where that does not matter.
    """

    prepared: Prepared
    plan: Plan
    menus: list[Menu] | None
    timing: Timing | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Task:
    """A model that is to be planned.

    Attributes:
        loaded: The model; it may be changed.
        reference: Gives the path of its file.
        samples: Gives its inputs.
        name: File name of the output.
        run: The circumstances.
    """

    loaded: Loaded
    reference: Callable[[], Path]
    samples: SampleSource
    name: str
    run: Run


def _planned(task: _Task, settings: Settings, given: Plan | None) -> _Work:
    """Prepare a model, and make its plan or settle the given one."""
    run = task.run
    if given is not None and given.pruned and given.pruned["calibrated"] and run.data is None:
        raise UsageError(
            "the plan prunes by inputs, and none are given", hint="give the --data it was made with"
        )
    with run.stage("plan"):
        if settings.divide and given is None:
            return _divided(task, settings)
        return _work(task, settings, given)


def _work(task: _Task, settings: Settings, given: Plan | None = None) -> _Work:
    prepared = prepare(task.loaded, settings, task.samples)
    samples = task.samples
    if _has_new_shapes(prepared):
        samples = SampleSource(None, Path)  # inputs of the original do not fit
    if given is not None:
        return _Work(prepared, settle(given, prepared, name=task.name), None)
    evidence = gather_evidence(prepared, settings, samples, calibrated=task.run.calibrates)
    menus = make_menus(prepared, settings, evidence)
    made = plan_from(menus, prepared, settings, name=task.name, timing=evidence.timing)
    return _Work(prepared, made, menus, evidence.timing)


def _divided(task: _Task, settings: Settings) -> _Work:
    """The plan for the division of a budget between pruning and codes that loses least."""
    feeds = task.samples()
    if feeds is None or settings.prune_caches:
        why = "inputs decide" if feeds is None else "models with equal inputs are compared"
        raise UsageError(
            f"how a size is divided between pruning and codes is not said, and {why}",
            hint="give --data without --prune-caches, or say how much with --prune-ratio 0.2",
        )
    seen = witnesses(feeds)
    found: list[tuple[Trial, _Work]] = []

    def attempt(share: float) -> Trial | None:
        """The plan where pruning takes this share; None where it cannot."""
        score = settings.prune_score if share else None
        own = dataclasses.replace(
            settings, divide=None, prune_ratio=share or None, prune_score=score
        )
        copy = dataclasses.replace(task.loaded, model=copy_model(task.loaded.model))
        work = _work(dataclasses.replace(task, loaded=copy), own)
        if work.plan.pruned is not None and not work.plan.pruned["met"]:
            return None
        noise = _pruning_noise(task, work.prepared, seen) if share else 0.0
        codes = work.plan.error if any(not choice.kept for choice in work.plan) else 0.0
        size, met = work.plan.bytes or 0, work.plan.met
        trial = Trial(share, size, met, math.sqrt(noise), codes)
        found[:] = [min([*found, (trial, work)], key=lambda pair: pair[0].rank)]
        return trial

    with said_once():
        trials = best_share(attempt)
    best = found[0][1]
    best.plan = dataclasses.replace(best.plan, division=tuple(t.to_json() for t in trials))
    return best


def _pruning_noise(task: _Task, prepared: Prepared, feeds: Sequence[Feed]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        pruned = save(prepared.model, Path(folder) / "pruned.onnx").files[0]
        return output_noise(task.reference(), pruned, feeds)


def _only_planned(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> _Work:
    with run.stage("load"):
        loaded = read(model)
        if output is not None:
            refuse_overwriting(loaded.files, output)
    with tempfile.TemporaryDirectory() as folder:
        reference = functools.partial(
            reference_file, model, loaded, Path(folder) / "reference.onnx"
        )
        samples = SampleSource(run.data, reference)
        name = "out.onnx" if output is None else output.name
        return _planned(_Task(loaded, reference, samples, name, run), settings, given)


def plan_model(model: Any, settings: Settings, run: Run) -> Plan:
    """The plan for a model, with exact bytes."""
    return _only_planned(model, None, settings, None, run).plan


def dry_run(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> Result:
    """What `compile_model` would do; nothing is written."""
    work = _only_planned(model, output, settings, given, run)
    prepared, made = work.prepared, work.plan
    target = OutputFile(None if output is None else str(output), made.bytes or 0, None, ())
    return Result(
        None, made, _report(prepared, made, target, planned_sites(made), _Verdict(), run), None
    )


def _report(
    prepared: Prepared,
    made: Plan,
    output: OutputFile,
    sites: Sequence[Any],
    verdict: _Verdict,
    run: Run,
) -> Report:
    return report(
        made,
        None if prepared.path is None else str(prepared.path),
        output,
        sites,
        verify=None if verdict.verification is None else verdict.verification.to_json(),
        seconds={**run.seconds, "total": round(sum(run.seconds.values()), 4)},
        config=run.config(made.settings),
        evaluation=None if verdict.evaluation is None else verdict.evaluation.to_json(),
        prune=prepared.facts.get("prune"),
        speed=None if verdict.slowdown is None else verdict.slowdown.to_json(),
    )


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
        loaded = read(model)
        refuse_overwriting(loaded.files, output)
        if run.verify or run.data is not None:
            check_runnable(loaded.model)
    with workspace(output) as folder:
        reference = functools.partial(
            reference_file, model, loaded, folder / f"reference.{output.name}"
        )
        source = SampleSource(run.data, reference)
        work = _planned(_Task(loaded, reference, source, output.name, run), settings, given)
        if run.data is None and run.calibration != "off":
            tell_of_plain_factors(work.plan)
        written, verdict = _attempts(work, folder / output.name, reference, source, run)
        accepted = verdict.passed or run.force
        files = _publish(written.saved, output, accepted=accepted)
    output_file = OutputFile(
        str(files[0]), written.saved.bytes, file_hash(files[0]), tuple(str(file) for file in files)
    )
    done = _report(work.prepared, work.plan, output_file, written.sites, verdict, run)
    result = Result(files[0], work.plan, done, verdict.verification)
    return _judged(result, verdict, accepted=accepted)


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """What the gates say; None stands for a gate that did not run.

    Attributes:
        verification: The fidelity gate, with the limit of the error.
        evaluation: The user's own measure.
        slowdown: Times of both models.
    """

    verification: Verification | None = None
    evaluation: Evaluation | None = None
    slowdown: Slowdown | None = None

    @property
    def passed(self) -> bool:
        """Whether no gate objects."""
        faithful = self.verification is None or self.verification.passed
        others = (self.evaluation, self.slowdown)
        return faithful and all(gate is None or gate.passed for gate in others)

    @property
    def failure(self) -> str:
        """The first objection, on one line."""
        if self.verification is not None and not self.verification.passed:
            return " ".join(self.verification.failures[0].split())
        if self.slowdown is not None and not self.slowdown.passed:
            return self.slowdown.failure
        if self.evaluation is None or self.evaluation.passed:
            return ""
        scores = self.evaluation
        return f"its score is {scores.compressed:.5g}, the dense model's {scores.dense:.5g}"


def _attempts(
    work: _Work, path: Path, reference: Callable[[], Path], source: SampleSource, run: Run
) -> tuple[Written, _Verdict]:
    """Write the model and ask the gates; with other plans while they object and one is in sight."""
    limit = _limit(work.plan.settings, run)
    new_shapes = _has_new_shapes(work.prepared)
    if new_shapes:  # inputs of the original do not fit: what is left before encoding stands for it
        original = save(work.prepared.model, path.with_name(f"pruned.{path.name}")).files[0]
        reference, source = (lambda: original), SampleSource(None, lambda: original)
    slow = work.plan.settings.max_slowdown
    judged = limit is not None or slow is not None or run.evaluation is not None
    folder = path.parent / "payloads" if run.cache is None and judged else run.cache
    cache = None if folder is None else PayloadCache(folder)
    repair = Repair(work.prepared, work.menus, path.name, timing=work.timing)
    for attempt in range(_ATTEMPTS if judged else 1):
        with run.stage("load"):
            samples = load_samples(source, run.calibration, work.prepared.sites, work.plan)
        fresh = work.prepared
        if judged:
            fresh = dataclasses.replace(fresh, model=copy_model(fresh.model))
        written = write(
            fresh,
            work.plan,
            path,
            jobs=run.jobs,
            cache=cache,
            progress=run.progress,
            stage=run.stage,
            samples=samples,
        )
        verdict = _Verdict()
        if run.verify or judged:
            data = None if new_shapes else _witnesses(work.prepared, samples, source, run)
            verdict = _gates(reference(), written.saved, data, work.plan.settings, run)
        if verdict.passed or attempt == _ATTEMPTS - 1:
            break
        with run.stage("repair"):
            other = _other_plan(repair, work.plan, path, verdict, limit, source)
        if other is None:
            break
        work.plan = dataclasses.replace(other, division=work.plan.division)
    return written, verdict


def _witnesses(prepared: Prepared, samples: Samples | None, source: SampleSource, run: Run) -> Any:
    """What models are compared on: a few of the inputs that something was fitted to."""
    if samples is None and "prune" in prepared.facts and run.data is not None:
        samples = Samples(source() or ())
    return run.data if samples is None else samples.witnesses


def _has_new_shapes(prepared: Prepared) -> bool:
    """Whether pruning has changed shapes of inputs."""
    pruned = prepared.facts.get("prune")
    return pruned is not None and bool(pruned["inputs"])


def _other_plan(
    repair: Repair,
    made: Plan,
    path: Path,
    verdict: _Verdict,
    limit: float | None,
    source: SampleSource,
) -> Plan | None:
    """The plan to try after one that a gate objected to; None where none is in sight."""
    if verdict.slowdown is not None and not verdict.slowdown.passed:
        return repair.faster(made, verdict.slowdown)
    aim = _aim(verdict, limit)
    if aim is None:
        return None
    try:
        return repair.plan(made, path, source(), error=aim[0], wanted=aim[1])
    except ModelError as error:  # of the probe: an output may hold no floating point
        log.warning("weights to blame cannot be found: %s", error.message)
        return None


def _limit(settings: Settings, run: Run) -> float | None:
    """Largest accepted error of an output; None where there is none."""
    limits = [limit for limit in (run.tolerance, settings.max_error) if limit is not None]
    return min(limits, default=None)


def _aim(verdict: _Verdict, limit: float | None) -> tuple[float, float] | None:
    """The measured error and the one to reach; None where it is not errors that are wrong."""
    found = verdict.verification
    if (
        found is None
        or not found.agreement.passed
        or any(o.problem for o in found.outputs.values())
    ):
        return None
    error = found.error
    if limit is not None and error > limit:
        return error, limit
    # How a score follows from errors is not known: half the error is a step.
    return (error, error / 2) if error > 0.0 and verdict.evaluation is not None else None


def _gates(reference: Path, saved: Saved, data: Any, settings: Settings, run: Run) -> _Verdict:
    """Run the result against the input, and the user's measure where that is passed."""
    verdict = _Verdict(_gate(reference, saved, data, settings, run) if run.verify else None)
    if not verdict.passed:
        return verdict
    if run.evaluation is not None:
        with run.stage("evaluate"):
            run.evaluation.run(reference, saved.files[0])
        verdict = dataclasses.replace(verdict, evaluation=run.evaluation)
    if settings.max_slowdown is None or not verdict.passed:
        return verdict
    with run.stage("time"):
        small = saved.files[0]
        slowdown = measure_slowdown(
            reference, small, settings.max_slowdown, data, run.shapes, settings.seed
        )
    return dataclasses.replace(verdict, slowdown=slowdown)


def _gate(reference: Path, saved: Saved, data: Any, settings: Settings, run: Run) -> Verification:
    """Run the result, with and without the operator library, against the input."""
    from onnxcomp.passes.verification.fidelity import verify

    with run.stage("verify"):
        return verify(
            reference,
            saved.files[0],
            data=data,
            shapes=dict(run.shapes or {}),
            seed=settings.seed,
            tolerance=_limit(settings, run),
        )


def _publish(saved: Saved, output: Path, *, accepted: bool) -> tuple[Path, ...]:
    if accepted:
        return publish(saved.files, output.parent)
    rejected = rejected_path(output)
    if len(saved.files) == 1:
        saved.files[0].replace(rejected)
        return (rejected,)
    # The model refers to its data by name: it is written again under the new one.
    return save(load(saved.files[0]), rejected).files


def _judged(result: Result, verdict: _Verdict, *, accepted: bool) -> Result:
    """The result, or the error that goes with it."""
    if not accepted:
        raise RejectedError(
            f"the compressed model failed verification: {verdict.failure}; "
            f"it was kept as {result.path}",
            result,
            hint="look at it with onnxcomp verify; --force publishes it all the same",
        )
    pruned = result.report.prune
    if pruned is not None and not pruned["met"]:
        what = "of the parameters that can go" if pruned["unit"] == "parameters" else "of the FLOPs"
        raise TargetMissedError(
            f"{result.path}: pruning took {100 * pruned['reached']:.1f} % {what}, "
            f"{100 * pruned['asked']:.1f} % were asked for",
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
