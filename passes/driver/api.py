"""The functions behind the public API: whole runs from a model to a model.

Every run goes the same way: read, prepare (canonicalise, find the weights), plan, encode, rewrite,
save, verify, publish. The command line calls these functions and holds no logic of its own.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.options import TARGETS, ByteOptions, OptimizeOptions, PlanOptions
from onnxcomp.passes.config.settings import settings_from
from onnxcomp.passes.config.signature import takes, takes_output
from onnxcomp.passes.config.values import TARGET_NAMES, ExternalData, Target, one_of
from onnxcomp.passes.driver.compile import compile_model, plan_model
from onnxcomp.passes.driver.compile import dry_run as only_plan
from onnxcomp.passes.driver.frontier import frontier as points_of
from onnxcomp.passes.driver.result import RejectedError, Result, TargetMissedError
from onnxcomp.passes.driver.run import Run, worker_count
from onnxcomp.passes.ir.files import publish, read, refuse_overwriting, workspace
from onnxcomp.passes.ir.model import Saved, save
from onnxcomp.passes.planning.pareto import FrontierPoint
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.verification.user_metric import Evaluation, Score, load_function

if TYPE_CHECKING:
    from onnxcomp.passes.driver.mend import Mended
    from onnxcomp.passes.driver.retarget import Retargeted
    from onnxcomp.passes.report.inspect import Inspection
    from onnxcomp.passes.verification.fidelity import Verification

__all__ = [
    "RejectedError",
    "Result",
    "TargetMissedError",
    "apply",
    "expand",
    "frontier",
    "inspect",
    "mend",
    "optimize",
    "plan",
    "retarget",
    "verify",
]

PathLike = str | os.PathLike[str]


@takes_output(OptimizeOptions)
def optimize(asked: OptimizeOptions, model: Any, output: PathLike | None = None) -> Result:
    """Write a smaller model with the same inputs and outputs.

    Without bits, ratio or target size every weight gets 4 bits.

    Args:
        model: A path, an onnx.ModelProto, an onnx_ir.Model, an onnx_graphsurgeon.Graph or a torch
            ONNXProgram; never changed.
        output: Path of the new model; may be left out for a dry run.
        asked: The options.

    Raises:
        UsageError: An option or a rule is wrong, or the output is the input.
        ModelError: The input is not a model that can be compiled.
        TargetMissedError: No plan meets the target; the smallest output was written.
        RejectedError: The result failed the gate and was kept as ``*.rejected.onnx``.
    """
    given = _given_plan(asked)
    settings = settings_from(asked) if given is None else given.settings
    run = _run(asked)
    path = None if output is None else Path(output)
    if asked.dry_run:
        return only_plan(model, path, settings, given, run)
    if path is None:
        raise UsageError("no output is given", hint="give one with -o, or use --dry-run")
    return compile_model(model, path, settings, given, run)


def _given_plan(asked: OptimizeOptions) -> Plan | None:
    """The plan to carry out, read where it is a file; its settings take the place of options."""
    if asked.plan is None:
        return None
    targets = (*TARGETS, "max_error", "max_slowdown")
    if any(getattr(asked, name) is not None for name in targets):
        raise UsageError("a plan and a target were given together", hint="choose one of them")
    given = Plan.load(asked.plan) if isinstance(asked.plan, str | os.PathLike) else asked.plan
    if not isinstance(given, Plan):
        raise UsageError(
            f"plan is of type {type(given).__name__}",
            hint="it must be a plan of onnxcomp.plan, or its file",
        )
    usual = ByteOptions()
    ignored = [
        field.name.rstrip("_")
        for field in dataclasses.fields(ByteOptions)
        if getattr(asked, field.name)
        not in (getattr(usual, field.name), getattr(given.settings, field.name))
    ]
    if ignored:
        raise UsageError(
            f"a plan and {' and '.join(ignored)} were given together, and the plan says otherwise",
            hint="leave them out, or make a new plan with them",
        )
    return given


def _run(asked: OptimizeOptions) -> Run:
    """The circumstances of a run."""
    same = {field.name for field in dataclasses.fields(Run)} - {"jobs"}
    options = {name: getattr(asked, name) for name in same if hasattr(asked, name)}
    evaluation = _evaluation(asked.evaluate, asked.max_drop)
    return Run(jobs=worker_count(asked.jobs), evaluation=evaluation, **options)


def _evaluation(evaluate: str | Score | None, max_drop: float) -> Evaluation | None:
    if evaluate is None:
        if max_drop:
            raise UsageError(
                f"max_drop is {max_drop}, but nothing is measured",
                hint="give a function to evaluate",
            )
        return None
    return Evaluation(load_function(evaluate) if isinstance(evaluate, str) else evaluate, max_drop)


@takes(PlanOptions)
def plan(asked: PlanOptions, model: Any) -> Plan:
    """What `optimize` would do with these settings, with exact bytes, without doing it.

    Pruning is done in memory, because the bytes depend on what is left; `Plan.pruned` says what
    is removed. A plan that misses its target is returned as well; its `met` is then false.

    Args:
        model: What `optimize` accepts.
        asked: The options.

    Raises:
        UsageError: An option or a rule is wrong.
        ModelError: The input is not a model that can be compiled.
    """
    run = Run(jobs=1, data=asked.data, calibration=asked.calibration)
    return plan_model(model, settings_from(asked), run)


@takes(PlanOptions)
def frontier(asked: PlanOptions, model: Any) -> list[FrontierPoint]:
    """Size against expected error: the best plans from the smallest to the dense model.

    Args:
        model: What `optimize` accepts.
        asked: The options; a target is not used.

    Raises:
        UsageError: An option or a rule is wrong.
        ModelError: The input is not a model that can be compiled.
    """
    run = Run(jobs=1, data=asked.data, calibration=asked.calibration)
    return points_of(model, settings_from(asked), run)


def apply(model: Any, plan: Plan | PathLike, output: PathLike, **options: Any) -> Result:
    """Write the model a plan describes; the same plan and model give the same bytes.

    Args:
        model: What `optimize` accepts.
        plan: A plan or its file.
        output: Path of the new model.
        options: Other arguments of `optimize`: jobs, cache, verify, data, shapes, ...

    Raises:
        UsageError: The plan names a weight that the model does not have, or does not fit it.
    """
    return optimize(model, output, plan=plan, **options)


def expand(
    model: Any,
    output: PathLike,
    *,
    external_data: ExternalData = "auto",
    keep_codes: bool = False,
) -> Saved:
    """Turn a compressed model back into plain ONNX.

    Args:
        model: What `optimize` accepts.
        output: Path of the new model.
        external_data: Whether large tensors go into a file of their own.
        keep_codes: Leave the weights compressed: definitions are inlined where operators of
            onnxcomp were called.

    Returns:
        The files that were written, and their bytes.

    Raises:
        UsageError: The output is the input.
        ModelError: The input is not a model.
    """
    from onnxcomp.passes.lowering.expand import expand as expand_model
    from onnxcomp.passes.lowering.inline_bodies import inline_bodies

    path = Path(output)
    loaded = read(model)
    refuse_overwriting(loaded.files, path)
    if keep_codes:
        inline_bodies(loaded.model)
    else:
        expand_model(loaded.model)
    with workspace(path) as folder:
        saved = save(loaded.model, folder / path.name, external_data=external_data)
        return dataclasses.replace(saved, files=publish(saved.files, path.parent))


def retarget(
    model: PathLike,
    output: PathLike,
    *,
    target: Target = "any",
    original: PathLike | None = None,
    jobs: int | None = None,
) -> Retargeted:
    """Encode a compressed model again where another class of machines runs other codes faster.

    Args:
        model: Path of the compressed model.
        output: Path of the new one.
        target: The class of machines, as for `optimize`.
        original: Path of the dense model; None to take the decoded weights, at the cost of the new
            codes' error on top of the old ones'.
        jobs: Threads; all processors by default.

    Raises:
        UsageError: The target is unknown, the model is not compressed, or is the output.
        ModelError: The models do not belong together.
    """
    from onnxcomp.passes.driver.retarget import retarget as retarget_model

    one_of("target", target, TARGET_NAMES)
    dense = None if original is None else Path(original)
    return retarget_model(
        Path(model), Path(output), target, original=dense, jobs=worker_count(jobs)
    )


def inspect(model: PathLike) -> Inspection:
    """What is in a model: weights, uses, bytes; for a compressed one also what was done."""
    from onnxcomp.passes.report.inspect import inspect_model

    return inspect_model(model)


def verify(reference: PathLike, compressed: PathLike, **options: Any) -> Verification:
    """Compare a compressed model with its original, with and without the operator library.

    Args:
        reference: Path of the original.
        compressed: Path of the compressed model.
        options: Arguments of `passes.verification.fidelity.verify`: data, shapes, samples, ...
    """
    from onnxcomp.passes.verification.fidelity import verify as verify_models

    return verify_models(reference, compressed, **options)


def mend(
    reference: PathLike, compressed: PathLike, output: PathLike | None = None, **options: Any
) -> Mended:
    """Find the weights that cause the error of a compressed model, and make them dense again.

    Args:
        reference: Path of the original.
        compressed: Path of the compressed model.
        output: Path of the repaired model; None to find the weights only.
        options: Arguments of `onnxcomp.passes.driver.mend.mend`: tolerance, data, shapes, ...
    """
    from onnxcomp.passes.driver.mend import mend as mend_model

    place = None if output is None else Path(output)
    return mend_model(Path(reference), Path(compressed), place, **options)
