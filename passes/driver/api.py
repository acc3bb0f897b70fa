"""The functions behind the public API: whole runs from a model to a model.

Every run goes the same way: read, prepare (canonicalise, find the weights), plan, encode, rewrite,
save, verify, publish. The command line calls these functions and holds no logic of its own.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.settings import (
    ExternalData,
    ModeChoice,
    Patterns,
    PruneScore,
    Rule,
    given_settings,
)
from onnxcomp.passes.driver.compile import compile_model, plan_model
from onnxcomp.passes.driver.compile import dry_run as only_plan
from onnxcomp.passes.driver.pareto import frontier as points_of
from onnxcomp.passes.driver.result import RejectedError, Result, TargetMissedError
from onnxcomp.passes.driver.run import Run, worker_count
from onnxcomp.passes.encoding.calibrated import CalibrationMode, check_calibration
from onnxcomp.passes.encoding.encoder import Progress
from onnxcomp.passes.ir.files import publish, read, refuse_overwriting, workspace
from onnxcomp.passes.ir.model import Saved, save
from onnxcomp.passes.planning.pareto import FrontierPoint
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.verification.user_metric import Evaluation, Score, load_function

if TYPE_CHECKING:
    from onnxcomp.passes.driver.mend import Mended
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
    "verify",
]

PathLike = str | os.PathLike[str]


def optimize(
    model: Any,
    output: PathLike | None = None,
    *,
    method: str | Sequence[str] = "auto",
    bits: int | None = None,
    ratio: float | None = None,
    target_size: int | str | None = None,
    max_error: float | None = None,
    max_slowdown: float | None = None,
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
    stock: bool = False,
    rest: str = "keep",
    prune_ratio: float | None = None,
    target_flops: float | None = None,
    prune_score: PruneScore | None = None,
    prune_caches: bool | None = None,
    detect_sharing: bool = False,
    distill: int = 0,
    jobs: int | None = None,
    cache: PathLike | None = None,
    verify: bool = True,
    data: Any = None,
    calibration: CalibrationMode = "sequential",
    shapes: Mapping[str, Sequence[int]] | None = None,
    tolerance: float | None = None,
    evaluate: str | Score | None = None,
    max_drop: float = 0.0,
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
        max_error: Largest relative L2 error of an output. With a target it is a limit; without one
            the output is made as small as it allows.
        max_slowdown: How many times as long as the original the output may run, by measurement; 0.5
            asks for twice the speed. What products cost is measured once on a machine.
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
        stock: Whether only codecs are used whose models need no operator of ours.
        rest: What becomes of weights that no method makes smaller: "keep", "fp16", or "exact"
            for half precision where no value changes.
        prune_ratio: Share of the parameters of layers that can shrink to take out before weights
            are encoded.
        target_flops: Instead: share of the model's FLOPs that is to be left.
        prune_score: What decides which channels go: "obs", "numerical", "wanda", "flap" or
            "magnitude"; without data always "magnitude".
        prune_caches: Whether inputs and outputs that hold a KV cache may shrink.
        detect_sharing: Whether weights whose values repeat in the same order, such as folded ones
            that were trained to share, are stored by those values; they keep their bits.
        distill: Steps of a short training of values that weights share (method "hash"), towards
            the outputs of the dense model on `data`; needs torch.
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
        tolerance: Largest accepted difference to the dense model; None to report it only. Where it
            is exceeded, the weights to blame become dense again.
        evaluate: Your own measure: a function, or ``script.py:function``. It gets a function that
            opens a session of the model, and returns a number; higher is better.
        max_drop: How much less than the dense model's that number may be.
        dry_run: Only plan.
        force: Publish the result even when it fails the gate.
        progress: Told about each weight.

    Raises:
        UsageError: An option or a rule is wrong, or the output is the input.
        ModelError: The input is not a model that can be compiled.
        TargetMissedError: No plan meets the target; the smallest output was written.
        RejectedError: The result failed the gate and was kept as ``*.rejected.onnx``.
    """
    if plan is not None and (bits, ratio, target_size, max_error, max_slowdown) != (None,) * 5:
        raise UsageError("a plan and a target were given together", hint="choose one of them")
    given = Plan.load(plan) if isinstance(plan, str | os.PathLike) else plan
    settings = given.settings if given is not None else given_settings(
        method, target_size, min_size, include, exclude, set_,
        bits=bits, ratio=ratio, max_error=max_error, max_slowdown=max_slowdown, mode=mode,
        precision=precision, external_data=external_data, freeze_inputs=freeze_inputs,
        portable=portable, seed=seed, stock=stock, rest=rest, prune_ratio=prune_ratio,
        target_flops=target_flops, prune_score=prune_score, prune_caches=prune_caches,
        detect_sharing=detect_sharing, distill=distill,
    )  # fmt: skip
    check_calibration(calibration)
    run = Run(
        worker_count(jobs), cache, verify, data, shapes, tolerance, force, progress, calibration,
        evaluation=_evaluation(evaluate, max_drop),
    )  # fmt: skip
    if dry_run:
        path = None if output is None else Path(output)
        return only_plan(model, path, settings, given, run)
    if output is None:
        raise UsageError("no output is given", hint="name one with -o, or ask for a dry run")
    return compile_model(model, Path(output), settings, given, run)


def _evaluation(evaluate: str | Score | None, max_drop: float) -> Evaluation | None:
    if evaluate is None:
        if max_drop:
            raise UsageError(
                f"max_drop is {max_drop}, but nothing is measured",
                hint="give a function to evaluate",
            )
        return None
    if not max_drop >= 0.0:
        raise UsageError(f"max_drop is {max_drop}", hint="it must not be negative")
    return Evaluation(load_function(evaluate) if isinstance(evaluate, str) else evaluate, max_drop)


def plan(
    model: Any,
    *,
    method: str | Sequence[str] = "auto",
    bits: int | None = None,
    ratio: float | None = None,
    target_size: int | str | None = None,
    max_error: float | None = None,
    max_slowdown: float | None = None,
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
    stock: bool = False,
    rest: str = "keep",
    prune_ratio: float | None = None,
    target_flops: float | None = None,
    prune_score: PruneScore | None = None,
    prune_caches: bool | None = None,
    detect_sharing: bool = False,
    distill: int = 0,
    data: Any = None,
    calibration: CalibrationMode = "sequential",
) -> Plan:
    """What `optimize` would do with these settings, with exact bytes, without doing it.

    Pruning is done, in memory, since what is left decides about the rest; `Plan.pruned` says what
    goes. A plan that misses its target is returned all the same; its `met` is false then. The
    arguments are those of `optimize`.

    Raises:
        UsageError: An option or a rule is wrong.
        ModelError: The input is not a model that can be compiled.
    """
    settings = given_settings(
        method, target_size, min_size, include, exclude, set_,
        bits=bits, ratio=ratio, max_error=max_error, max_slowdown=max_slowdown, mode=mode,
        precision=precision, external_data=external_data, freeze_inputs=freeze_inputs,
        portable=portable, seed=seed, stock=stock, rest=rest, prune_ratio=prune_ratio,
        target_flops=target_flops, prune_score=prune_score, prune_caches=prune_caches,
        detect_sharing=detect_sharing, distill=distill,
    )  # fmt: skip
    check_calibration(calibration)
    return plan_model(model, settings, Run(jobs=1, data=data, calibration=calibration))


def frontier(model: Any, **options: Any) -> list[FrontierPoint]:
    """Size against expected error: the best plans from the smallest to the dense model.

    Args:
        model: What `optimize` accepts.
        options: Arguments of `plan`: method, data, include, ...; a target is not used.

    Raises:
        UsageError: An option or a rule is wrong.
        ModelError: The input is not a model that can be compiled.
    """
    data, calibration = options.pop("data", None), options.pop("calibration", "sequential")
    settings = given_settings(**options)
    check_calibration(calibration)
    return points_of(model, settings, Run(jobs=1, data=data, calibration=calibration))


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
    from onnxcomp.passes.lowering.expand import expand as expand_model

    path = Path(output)
    loaded = read(model)
    refuse_overwriting(loaded.files, path)
    expand_model(loaded.model)
    with workspace(path) as folder:
        saved = save(loaded.model, folder / path.name, external_data=external_data)
        return dataclasses.replace(saved, files=publish(saved.files, path.parent))


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
    """Find the weights that are to blame for the error of a compressed model, and give them back.

    Args:
        reference: Path of the original.
        compressed: Path of the compressed model.
        output: Path of the mended model; None to find the weights only.
        options: Arguments of `onnxcomp.passes.driver.mend.mend`: tolerance, data, shapes, ...
    """
    from onnxcomp.passes.driver.mend import mend as mend_model

    place = None if output is None else Path(output)
    return mend_model(Path(reference), Path(compressed), place, **options)
