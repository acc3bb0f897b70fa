"""The functions behind the public API: whole runs from a model to a model.

Every run goes the same way: read, prepare (canonicalise, find the weights), plan, encode, rewrite,
save, verify, publish. The command line calls these functions and holds no logic of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.cache import PayloadCache
from onnxcomp.passes.calibrated import (
    CalibrationMode,
    check_calibration,
    load_samples,
)
from onnxcomp.passes.encode import Progress
from onnxcomp.passes.graph import Saved, load, save
from onnxcomp.passes.outcome import RejectedError, Result, TargetMissedError
from onnxcomp.passes.plan import Plan
from onnxcomp.passes.planner import Prepared, make_plan, prepare, settle
from onnxcomp.passes.produce import planned_sites, report, write
from onnxcomp.passes.report import OutputFile, Report
from onnxcomp.passes.settings import (
    ExternalData,
    ModeChoice,
    Rule,
    Settings,
    parse_rule,
    parse_size,
)
from onnxcomp.passes.source import (
    file_hash,
    publish,
    read,
    refuse_overwriting,
    rejected_path,
    workspace,
)

if TYPE_CHECKING:
    from onnxcomp.passes.inspect import Inspection
    from onnxcomp.passes.verify import Verification

__all__ = [
    "RejectedError",
    "Result",
    "TargetMissedError",
    "apply",
    "expand",
    "inspect",
    "optimize",
    "plan",
    "verify",
]

log = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]
Patterns = str | Sequence[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """How one run goes about its work; none of it decides which bytes are written.

    Attributes:
        jobs: Threads of the encoders.
        cache: Folder of payloads of earlier runs.
        verify: Whether the fidelity gate runs.
        data: Inputs for calibration and for the gate; None for made-up ones in the gate.
        calibration: How `data` decides about codes: "sequential", "parallel" or "off".
        shapes: Sizes of inputs with free dimensions, for made-up inputs.
        tolerance: Largest accepted difference to the dense model; None to report it only.
        force: Whether a model that fails the gate is published.
        progress: Told about each weight.
        seconds: Wall-clock seconds by stage, filled in as they end.
    """

    jobs: int
    cache: PathLike | None = None
    verify: bool = True
    data: Any = None
    shapes: Mapping[str, Sequence[int]] | None = None
    tolerance: float | None = None
    force: bool = False
    progress: Progress | None = None
    calibration: CalibrationMode = "sequential"
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.seconds[name] = round(spent, 4)

    def config(self, settings: Settings) -> dict[str, Any]:
        """Settings in effect, for the report."""
        return {
            **settings.to_json(),
            "jobs": self.jobs,
            "cache": None if self.cache is None else str(self.cache),
            "verify": self.verify,
            "data": None if self.data is None else str(self.data),
            "calibration": "off" if self.data is None else self.calibration,
            "shapes": {name: list(dims) for name, dims in (self.shapes or {}).items()},
            "tolerance": self.tolerance,
            "force": self.force,
        }


def _cores() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _rules(rules: str | Rule | Sequence[str | Rule]) -> tuple[Rule, ...]:
    given = [rules] if isinstance(rules, str | Rule) else rules
    return tuple(rule if isinstance(rule, Rule) else parse_rule(rule) for rule in given)


def _settings(
    method: str | Sequence[str],
    target_size: int | str | None,
    min_size: int | str,
    include: Patterns,
    exclude: Patterns,
    set_: str | Rule | Sequence[str | Rule],
    **others: Any,
) -> Settings:
    return Settings(
        method=(method,) if isinstance(method, str) else tuple(method),
        target_size=None if target_size is None else parse_size(target_size),
        min_size=parse_size(min_size),
        include=_patterns(include),
        exclude=_patterns(exclude),
        rules=_rules(set_),
        **others,
    )


def optimize(
    model: Any,
    output: PathLike | None = None,
    *,
    method: str | Sequence[str] = "auto",
    bits: int | None = None,
    ratio: float | None = None,
    target_size: int | str | None = None,
    min_size: int | str = 16384,
    mode: ModeChoice = "auto",
    include: Patterns = (),
    exclude: Patterns = (),
    set_: str | Rule | Sequence[str | Rule] = (),
    plan: Plan | PathLike | None = None,
    precision: str = "int8",
    external_data: ExternalData = "auto",
    freeze_inputs: bool = False,
    portable: bool = True,
    seed: int = 0,
    jobs: int | None = None,
    cache: PathLike | None = None,
    verify: bool = True,
    data: Any = None,
    calibration: CalibrationMode = "sequential",
    shapes: Mapping[str, Sequence[int]] | None = None,
    tolerance: float | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Write a smaller model with the same inputs and outputs.

    Without bits, ratio or target size every weight gets 4 bits.

    Args:
        model: A path, an onnx.ModelProto, an onnx_ir.Model, an onnx_graphsurgeon.Graph or a torch
            ONNXProgram; never changed.
        output: Path of the new model; may be left out for a dry run.
        method: Codecs to choose from; "auto" for all that make weights smaller.
        bits: Bits per weight, the same for all.
        ratio: Input bytes over output bytes to reach.
        target_size: Most bytes of the output: a number, or text such as "120MB".
        min_size: Bytes below which a tensor is left alone.
        mode: How uses of weights are served.
        include: Regular expressions; when given, only matching weights are touched.
        exclude: Regular expressions of weights left alone.
        set_: Rules for single weights, ``'RE:method=hyper,bits=5'``; the first match wins.
        plan: A plan or its file; its settings are used and the ones above are not.
        precision: Arithmetic of fused products: "exact" or "int8".
        external_data: Whether large tensors go to ``<output>.data``: "auto" from 64 MiB on.
        freeze_inputs: Whether initializers that are also inputs become constants.
        portable: Whether the model carries bodies that run without the operator library.
        seed: Seed of every random choice.
        jobs: Threads; None for all processors. The bytes do not depend on it.
        cache: Folder of payloads of earlier runs.
        verify: Whether the result is run and compared.
        data: Inputs for it and for calibration: paths or arrays, see `runtime.inputs.load_inputs`.
            Without any, weights are encoded by their values alone, and the result is run on
            made-up inputs.
        calibration: Whether weights are encoded for what the model behind the compressed earlier
            ones feeds them ("sequential"), what the dense model feeds them ("parallel"), or by
            their values alone ("off").
        shapes: Sizes of free dimensions, for made-up inputs.
        tolerance: Largest accepted difference to the dense model; None to report it only.
        dry_run: Only plan.
        force: Publish the result even when it fails the gate.
        progress: Told about each weight.

    Raises:
        UsageError: An option or a rule is wrong, or the output is the input.
        ModelError: The input is not a model that can be compiled.
        TargetMissedError: No plan meets the target; the smallest output was written.
        RejectedError: The result failed the gate and was kept as ``*.rejected.onnx``.
    """
    if plan is not None and (bits, ratio, target_size) != (None, None, None):
        raise UsageError("a plan and a target were given together", hint="choose one of them")
    given = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    settings = given.settings if given is not None else _settings(
        method, target_size, min_size, include, exclude, set_,
        bits=bits, ratio=ratio, mode=mode, precision=precision,
        external_data=external_data, freeze_inputs=freeze_inputs, portable=portable, seed=seed,
    )  # fmt: skip
    check_calibration(calibration)
    run = _Run(_jobs(jobs), cache, verify, data, shapes, tolerance, force, progress, calibration)
    if dry_run:
        return _dry_run(model, output, settings, given, run)
    if output is None:
        raise UsageError("no output is given", hint="name one with -o, or ask for a dry run")
    return _optimize(model, Path(output), settings, given, run)


def _jobs(jobs: int | None) -> int:
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}", hint="it must be at least 1")
    return _cores() if jobs is None else jobs


def _planned(
    model: Any, output: Path | None, settings: Settings, given: Plan | None, run: _Run
) -> tuple[Prepared, Plan]:
    """Read and prepare a model, and make its plan or settle the given one."""
    name = "out.onnx" if output is None else output.name
    with run.stage("load"):
        loaded = read(model)
        if output is not None:
            refuse_overwriting(loaded.files, output)
    with run.stage("plan"):
        prepared = prepare(loaded, settings)
        if given is None:
            return prepared, make_plan(prepared, settings, name=name)
        return prepared, settle(given, prepared, name=name)


def _dry_run(
    model: Any, output: PathLike | None, settings: Settings, given: Plan | None, run: _Run
) -> Result:
    path = None if output is None else Path(output)
    prepared, made = _planned(model, path, settings, given, run)
    target = OutputFile(None if path is None else str(path), made.bytes or 0, None, ())
    return Result(None, made, _report(prepared, made, target, planned_sites(made), None, run), None)


def _report(
    prepared: Prepared,
    made: Plan,
    output: OutputFile,
    sites: Sequence[Any],
    verification: Verification | None,
    run: _Run,
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


def _optimize(
    model: Any, output: Path, settings: Settings, given: Plan | None, run: _Run
) -> Result:
    prepared, made = _planned(model, output, settings, given, run)
    cache = None if run.cache is None else PayloadCache(run.cache)
    with workspace(output) as folder:
        with run.stage("load"):
            reference = _reference(model, prepared, folder / f"reference.{output.name}", run)
            samples = load_samples(run.data, reference, run.calibration, prepared.sites, made)
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
            verification = _gate(reference, written.saved, data, made.settings.seed, run)
        accepted = verification is None or verification.passed or run.force
        files = _publish(written.saved, output, accepted=accepted)
    output_file = OutputFile(
        str(files[0]), written.saved.bytes, file_hash(files[0]), tuple(str(file) for file in files)
    )
    done = _report(prepared, made, output_file, written.sites, verification, run)
    return _judged(Result(files[0], made, done, verification), accepted=accepted)


def _reference(model: Any, prepared: Prepared, path: Path, run: _Run) -> Path:
    """The input as a file; one given in memory is written where somebody is going to run it."""
    if prepared.path is not None:
        return prepared.path
    return save(load(model), path).files[0] if run.verify or run.data is not None else path


def _gate(reference: Path, saved: Saved, data: Any, seed: int, run: _Run) -> Verification:
    """Run the result, with and without the operator library, against the input."""
    from onnxcomp.passes.verify import verify

    with run.stage("verify"):
        options: dict[str, Any] = {} if run.tolerance is None else {"tolerance": run.tolerance}
        return verify(
            reference,
            saved.files[0],
            data=data,
            shapes=dict(run.shapes or {}),
            seed=seed,
            **options,
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
        raise RejectedError(
            f"the compressed model failed verification and was kept as {result.path}",
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


def plan(
    model: Any,
    *,
    method: str | Sequence[str] = "auto",
    bits: int | None = None,
    ratio: float | None = None,
    target_size: int | str | None = None,
    min_size: int | str = 16384,
    mode: ModeChoice = "auto",
    include: Patterns = (),
    exclude: Patterns = (),
    set_: str | Rule | Sequence[str | Rule] = (),
    precision: str = "int8",
    external_data: ExternalData = "auto",
    freeze_inputs: bool = False,
    portable: bool = True,
    seed: int = 0,
) -> Plan:
    """What `optimize` would do with these settings, with exact bytes, without doing it.

    A plan that misses its target is returned all the same; its `met` is false then.

    Raises:
        UsageError: An option or a rule is wrong.
        ModelError: The input is not a model that can be compiled.
    """
    settings = _settings(
        method, target_size, min_size, include, exclude, set_,
        bits=bits, ratio=ratio, mode=mode, precision=precision,
        external_data=external_data, freeze_inputs=freeze_inputs, portable=portable, seed=seed,
    )  # fmt: skip
    return _planned(model, None, settings, None, _Run(jobs=1))[1]


def apply(model: Any, plan: Plan | PathLike, output: PathLike, **options: Any) -> Result:
    """Write the model a plan describes; the same plan and model give the same bytes.

    Args:
        model: What `optimize` accepts.
        plan: A plan or its file.
        output: Path of the new model.
        options: Other arguments of `optimize`: jobs, cache, verify, data, shapes, ...

    Raises:
        UsageError: The plan names a site the model lacks, or does not fit it.
    """
    return optimize(model, output, plan=plan, **options)


def expand(model: Any, output: PathLike, *, external_data: ExternalData = "auto") -> Saved:
    """Turn a compressed model back into plain dense ONNX.

    Returns:
        The files that were written, and their bytes.

    Raises:
        UsageError: The output is the input.
        ModelError: The input is not a model.
    """
    from onnxcomp.passes.expand import expand as expand_model

    path = Path(output)
    loaded = read(model)
    refuse_overwriting(loaded.files, path)
    expand_model(loaded.model)
    with workspace(path) as folder:
        saved = save(loaded.model, folder / path.name, external_data=external_data)
        return dataclasses.replace(saved, files=publish(saved.files, path.parent))


def inspect(model: PathLike) -> Inspection:
    """What is in a model: weights, uses, bytes; for a compressed one also what was done."""
    from onnxcomp.passes.inspect import inspect_model

    return inspect_model(model)


def verify(reference: PathLike, compressed: PathLike, **options: Any) -> Verification:
    """Compare a compressed model with its original, with and without the operator library.

    Args:
        reference: Path of the original.
        compressed: Path of the compressed model.
        options: Arguments of `onnxcomp.passes.verify.verify`: data, shapes, samples, seed, ...
    """
    from onnxcomp.passes.verify import verify as verify_models

    return verify_models(reference, compressed, **options)
