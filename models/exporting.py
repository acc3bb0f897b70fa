"""Export a torch module to ONNX, compile it on the way out, and compare both with the module."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError, UsageError, VerifyError
from onnxcomp.models.exporters import export_graph
from onnxcomp.models.torch_calls import (
    Array,
    Call,
    as_arrays,
    bind,
    for_inference,
    import_torch,
    run,
)
from onnxcomp.passes.driver.result import RejectedError, Result, TargetMissedError
from onnxcomp.passes.ir.files import refuse_overwriting, workspace
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.sharing_note import write_note
from onnxcomp.passes.verification.numerics import (
    MINIMUM_AGREEMENT,
    Comparison,
    Metrics,
    export_tolerance,
)

__all__ = ["ExportResult", "TorchCheck", "export"]

PathLike = str | os.PathLike[str]

# Options of `optimize` that do not say that weights are to be compressed.
_NEUTRAL = frozenset({"cache", "external_data", "force", "jobs", "progress", "verify"})


@dataclasses.dataclass(frozen=True, slots=True)
class TorchCheck:
    """How far the exported graph and the written model are from the torch module.

    Attributes:
        exported: The graph as torch exported it, run in ONNX Runtime, by output name.
        written: The model that was written.
        tolerance: Largest relative L2 difference of `exported` that passes.
        samples: How many inputs were run.
    """

    exported: Mapping[str, Metrics]
    written: Mapping[str, Metrics]
    tolerance: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        forms = {"exported": self.exported, "written": self.written}
        shown = {
            form: {name: found.to_json() for name, found in outputs.items()}
            for form, outputs in forms.items()
        }
        return {**shown, "tolerance": self.tolerance, "samples": self.samples}


@dataclasses.dataclass(frozen=True, slots=True)
class ExportResult(Result):
    """What `export` returns: that of `optimize`, and the comparison with the module.

    Attributes:
        exporter: The exporter that was used.
        torch: The comparison; None where `verify` is off.
    """

    exporter: str = ""
    torch: TorchCheck | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Sample:
    """One input and what the module makes of it, both by the names of the graph."""

    feed: Mapping[str, Array]
    wanted: Mapping[str, Array]


def export(
    module: Any,
    args: Any,
    path: PathLike,
    *,
    kwargs: Mapping[str, Any] | None = None,
    exporter: str = "dynamo",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    checks: Iterable[Any] = (),
    module_tolerance: float | None = None,
    dense: PathLike | None = None,
    **options: Any,
) -> ExportResult:
    """Export a torch module and write it, compressed if `options` ask for it.

    The module is exported in evaluation mode, its own mode is restored. The exported graph must
    compute what the module does, within rounding; the difference of the written model is measured.

    Args:
        module: A torch.nn.Module.
        args: Example arguments: a tuple, or a single argument. Dicts, tuples and lists of tensors
            are inputs as well, named by parameter and key: ``state_0``; a cache of transformers
            is the tensors ``past_key_values.0.key`` and so on, and makes ``present.0.key`` results.
        path: The model to write.
        kwargs: Example keyword arguments.
        exporter: "dynamo" (torch.export) or "torchscript".
        input_names: Other names for the inputs, one for each tensor.
        output_names: Other names for the outputs; by default "output", "output_0", or the keys
            of the dict that the module returns.
        dynamic_shapes: Free dimensions, as for `torch.onnx.export`: ``{"x": {0: "batch"}}``.
            Arguments without an entry have fixed sizes, but for caches.
        opset: Version of the default domain; None for the exporter's choice.
        checks: More inputs to compare on: tuples of arguments, or dicts of keyword arguments.
        module_tolerance: Largest relative L2 difference between module and exported graph; None
            for the bound of `numerics.export_tolerance`.
        dense: Where to leave the exported graph, too.
        options: Arguments of `optimize`: ratio, bits, data, method, ... Without one of them the
            model is written as it was exported.

    Raises:
        RuntimeMissingError: torch or ONNX Runtime is missing.
        UsageError: An argument is wrong.
        ModelError: torch cannot export the module, or ONNX Runtime cannot run the result.
        VerifyError: The exported graph does not compute what the module does.
        TargetMissedError: As from `optimize`.
        RejectedError: As from `optimize`.
    """
    import_torch()
    from onnxcomp.models.sharing import memories, multiplied_out

    output, call = Path(path), bind(module, args, kwargs)
    _check_outputs(output, dense)
    calls = [call, *(_check_call(module, check) for check in checks)]
    with workspace(output) as folder:
        with for_inference(module):
            found = [run(module, one) for one in calls]
            inputs = _names(input_names, list(call.inputs), "input_names")
            outputs = _names(output_names, list(found[0]), "output_names")
            with multiplied_out(module):
                graph = export_graph(
                    exporter, module, call, folder, input_names=inputs, output_names=outputs,
                    dynamic_shapes=dynamic_shapes, opset=opset, compared=len(calls) > 1,
                )  # fmt: skip
        if shared := memories(module):
            write_note(graph, shared)
        plain = save(graph, folder / f"dense.{output.name}").files[0]
        given = [value.name or "" for value in graph.graph.inputs if not value.is_initializer()]
        samples = _samples(calls, found, inputs, outputs, given)
        bound = _bound(module, call) if module_tolerance is None else module_tolerance
        check = None
        if options.get("verify", True):
            check = TorchCheck(_compare(plain, samples), {}, bound, len(samples))
            _judge(check, type(module).__name__, exporter)
        if dense is not None:
            save(load(plain), dense)
        return _compile(plain, output, samples, options, exporter, check)


def _check_outputs(output: Path, dense: PathLike | None) -> None:
    refuse_overwriting(frozenset(), output)
    if dense is None:
        return
    refuse_overwriting(frozenset(), Path(dense))
    if os.path.realpath(dense) == os.path.realpath(output):
        raise UsageError(f"{output} is given twice", hint="give the exported graph another name")


def _check_call(module: Any, check: Any) -> Call:
    return bind(module, (), check) if isinstance(check, Mapping) else bind(module, check)


def _names(given: Sequence[str] | None, natural: list[str], what: str) -> list[str]:
    if given is None:
        return natural
    if len(given) != len(natural):
        raise UsageError(
            f"{what} has {len(given)} names for {len(natural)} tensors",
            hint=f"one for each of {', '.join(natural) or 'none'}",
        )
    return list(given)


def _samples(
    calls: Sequence[Call],
    found: Sequence[Mapping[str, Any]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    given: Sequence[str],
) -> list[_Sample]:
    """Inputs and results by the graph's names; inputs that the graph does not have are left out."""
    samples = []
    for call, results in zip(calls, found, strict=True):
        if len(call.inputs) != len(inputs) or len(results) != len(outputs):
            raise UsageError(
                "the inputs to compare on differ in structure from the example",
                hint="give the same tensors in the same places",
            )
        feed = as_arrays(dict(zip(inputs, call.inputs.values(), strict=True)))
        wanted = as_arrays(dict(zip(outputs, results.values(), strict=True)))
        samples.append(_Sample({n: array for n, array in feed.items() if n in given}, wanted))
    return samples


def _bound(module: Any, call: Call) -> float:
    """Tolerance of the exported graph, from the weights and types of the module."""
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    terms = max((math.prod(weight.shape[1:]) for weight in weights), default=1)
    tensors = [*module.parameters(), *module.buffers(), *call.inputs.values()]
    kinds = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return max((export_tolerance(len(weights), terms, kind) for kind in kinds), default=0.0)


def _compare(model: Path, samples: Sequence[_Sample]) -> dict[str, Metrics]:
    """Differences of a model's outputs to those of the module."""
    from onnxcomp.runtime.evaluate import run_model

    comparisons: dict[str, Comparison] = {}
    for sample, outputs in zip(samples, run_model(model, [s.feed for s in samples]), strict=True):
        for name, wanted in sample.wanted.items():
            if name not in outputs:
                raise ModelError(f"the exported graph has no output {name!r}")
            comparisons.setdefault(name, Comparison(name)).add(wanted, outputs[name])
    return {name: comparison.result() for name, comparison in comparisons.items()}


def _judge(check: TorchCheck, module: str, exporter: str) -> None:
    for name, found in check.exported.items():
        problem = _problem(found, check.tolerance)
        if problem:
            raise VerifyError(
                f"the graph that {exporter} exported does not compute what {module} does: "
                f"output {name!r}: {problem}",
                hint="try the other exporter, or accept the difference with module_tolerance",
            )


def _problem(found: Metrics, tolerance: float) -> str:
    """What is wrong with an output, in words; nothing if it is within the tolerance."""
    if found.problem:
        return found.problem
    if found.agreement is not None:
        few = found.agreement < MINIMUM_AGREEMENT
        return f"only {found.agreement:.2%} of its elements agree" if few else ""
    if found.rel_l2 <= tolerance:
        return ""
    return f"relative difference {found.rel_l2:.3g} > {tolerance:.3g}"


def _compile(
    plain: Path,
    output: Path,
    samples: Sequence[_Sample],
    options: Mapping[str, Any],
    exporter: str,
    check: TorchCheck | None,
) -> ExportResult:
    """Write the model with `optimize`, which checks it on the same inputs unless given others."""
    from onnxcomp.passes.driver.api import optimize

    chosen = dict(options)
    if not chosen.keys() - _NEUTRAL:
        # Nothing is a weight to compress, so that all of them keep their names.
        chosen |= {"method": "dense", "exclude": "."}
    own = "data" not in chosen and all(sample.feed for sample in samples)
    if own:
        chosen |= {"data": [dict(sample.feed) for sample in samples], "calibration": "off"}

    def finished(result: Result) -> ExportResult:
        """The result without traces of temporary files, with the comparison."""
        done = result.report
        config = {**done.config, "data": "the example inputs"} if own else done.config
        source = dataclasses.replace(done.input, path=None, sha256=None)
        found = check
        if found is not None and result.path is not None:
            found = dataclasses.replace(found, written=_compare(result.path, samples))
        return ExportResult(
            result.path,
            result.plan,
            dataclasses.replace(done, input=source, config=config),
            result.verify,
            exporter,
            found,
        )

    try:
        return finished(optimize(plain, output, **chosen))
    except (RejectedError, TargetMissedError) as error:
        error.result = finished(error.result)
        raise
