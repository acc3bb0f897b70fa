"""One run from a model to a model: read, plan, encode, rewrite, save, verify, publish."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.passes.cache import PayloadCache
from onnxcomp.passes.calibrated import load_samples
from onnxcomp.passes.checks import check_runnable
from onnxcomp.passes.evidence import gather_evidence
from onnxcomp.passes.graph import Saved, load, save
from onnxcomp.passes.outcome import RejectedError, Result, TargetMissedError
from onnxcomp.passes.plan import Plan
from onnxcomp.passes.planner import Prepared, make_plan, prepare, settle
from onnxcomp.passes.produce import planned_sites, report, write
from onnxcomp.passes.report import OutputFile, Report
from onnxcomp.passes.run import Run
from onnxcomp.passes.samples import SampleSource
from onnxcomp.passes.settings import Settings
from onnxcomp.passes.source import (
    Loaded,
    file_hash,
    publish,
    read,
    refuse_overwriting,
    rejected_path,
    workspace,
)

if TYPE_CHECKING:
    from onnxcomp.passes.verify import Verification

__all__ = ["compile_model", "dry_run", "plan_model", "reference_file"]


def reference_file(model: Any, loaded: Loaded, path: Path) -> Path:
    """The input as a file; one given in memory is written when somebody is going to run it."""
    if loaded.path is not None:
        return loaded.path
    return path if path.exists() else save(load(model), path).files[0]


def _planned(
    loaded: Loaded,
    settings: Settings,
    given: Plan | None,
    run: Run,
    samples: SampleSource,
    name: str,
) -> tuple[Prepared, Plan]:
    """Prepare a model, and make its plan or settle the given one."""
    with run.stage("plan"):
        prepared = prepare(loaded, settings, samples)
        if given is None:
            evidence = gather_evidence(prepared, settings, samples, calibrated=run.calibrates)
            return prepared, make_plan(prepared, settings, name=name, evidence=evidence)
        return prepared, settle(given, prepared, name=name)


def _only_planned(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> tuple[Prepared, Plan]:
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
        return _planned(loaded, settings, given, run, samples, name)


def plan_model(model: Any, settings: Settings, run: Run) -> Plan:
    """The plan for a model, with exact bytes."""
    return _only_planned(model, None, settings, None, run)[1]


def dry_run(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: Run
) -> Result:
    """What `compile_model` would do; nothing is written."""
    prepared, made = _only_planned(model, output, settings, given, run)
    target = OutputFile(None if output is None else str(output), made.bytes or 0, None, ())
    return Result(None, made, _report(prepared, made, target, planned_sites(made), None, run), None)


def _report(
    prepared: Prepared,
    made: Plan,
    output: OutputFile,
    sites: Sequence[Any],
    verification: Verification | None,
    run: Run,
) -> Report:
    return report(
        made,
        None if prepared.path is None else str(prepared.path),
        output,
        sites,
        verify=None if verification is None else verification.to_json(),
        seconds={**run.seconds, "total": round(sum(run.seconds.values()), 4)},
        config=run.config(made.settings),
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
    cache = None if run.cache is None else PayloadCache(run.cache)
    with workspace(output) as folder:
        reference = functools.partial(
            reference_file, model, loaded, folder / f"reference.{output.name}"
        )
        source = SampleSource(run.data, reference)
        prepared, made = _planned(loaded, settings, given, run, source, output.name)
        with run.stage("load"):
            samples = load_samples(source, run.calibration, prepared.sites, made)
        written = write(
            prepared,
            made,
            folder / output.name,
            jobs=run.jobs,
            cache=cache,
            progress=run.progress,
            stage=run.stage,
            samples=samples,
        )
        verification = None
        if run.verify:
            data = run.data if samples is None else samples.witnesses
            verification = _gate(reference(), written.saved, data, made.settings, run)
        accepted = verification is None or verification.passed or run.force
        files = _publish(written.saved, output, accepted=accepted)
    output_file = OutputFile(
        str(files[0]), written.saved.bytes, file_hash(files[0]), tuple(str(file) for file in files)
    )
    done = _report(prepared, made, output_file, written.sites, verification, run)
    return _judged(Result(files[0], made, done, verification), accepted=accepted)


def _gate(reference: Path, saved: Saved, data: Any, settings: Settings, run: Run) -> Verification:
    """Run the result, with and without the operator library, against the input."""
    from onnxcomp.passes.verify import verify

    with run.stage("verify"):
        limits = [limit for limit in (run.tolerance, settings.max_error) if limit is not None]
        return verify(
            reference,
            saved.files[0],
            data=data,
            shapes=dict(run.shapes or {}),
            seed=settings.seed,
            tolerance=min(limits, default=None),
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


def _judged(result: Result, *, accepted: bool) -> Result:
    """The result, or the error that goes with it."""
    if not accepted:
        failures = result.verify.failures if result.verify is not None else ()
        why = " ".join(failures[0].split()) if failures else "it was not run"
        raise RejectedError(
            f"the compressed model failed verification: {why}; it was kept as {result.path}",
            result,
            hint="look at it with onnxcomp verify; --force publishes it all the same",
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
