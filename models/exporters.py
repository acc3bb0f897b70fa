"""The two exporters of torch behind one signature; both return an `onnx_ir.Model`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.models.free_axes import free_axes, named_axes
from onnxcomp.models.quiet import ASKED, quiet
from onnxcomp.models.torch_calls import Call, as_arrays, import_torch, unflatten
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.suggest import suggest

__all__ = ["EXPORTERS", "export_graph"]

log = logging.getLogger(__name__)

# What torch notes at every node.
_TRACES = ("pkg.torch.", "pkg.onnxscript.", "namespace")

# Dimensions of a weight that an exporter transposes.
_MATRIX = 2

# Opset asked of the older exporter where none is given. The newer one has its own default.
_OPSET = 18

# Names in the wrapper: of the module, and of the parameter that takes all tensors.
_INNER, _TENSORS = "module", "tensors"


def export_graph(
    exporter: str,
    module: Any,
    call: Call,
    folder: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: Any,
    opset: int | None,
    compared: bool = False,
) -> ir.Model:
    """Export a module that is in evaluation mode already.

    Args:
        exporter: "dynamo" or "torchscript".
        module: The module.
        call: Example arguments.
        folder: Where files may be left that the result refers to.
        input_names: One for each tensor of the call.
        output_names: One for each tensor that the module returns.
        dynamic_shapes: As `torch.onnx.export` takes them: by parameter of `forward` or by
            position, ``{axis: "name"}``.
        opset: Version of the default domain; None for the exporter's choice.
        compared: Whether the graph will be compared with the module on other inputs as well.

    Raises:
        UsageError: There is no such exporter.
        ModelError: torch cannot export the module.
    """
    if exporter not in EXPORTERS:
        raise UsageError(f"exporter {exporter!r} is unknown", hint=suggest(exporter, EXPORTERS))
    options = {"input_names": list(input_names), "output_names": list(output_names)}
    try:
        with quiet() as warned:
            model = EXPORTERS[exporter](module, call, folder, dynamic_shapes, opset, options)
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # of every kind: torch runs the module's own code
        other = next(name for name in EXPORTERS if name != exporter)
        without = ", or kwargs={'use_cache': False, ...}" if call.cached else ""
        raise ModelError(
            f"torch cannot export {type(module).__name__} with {exporter}: {_reason(error)}",
            hint=f"try exporter={other!r}{without}; TORCH_LOGS=+onnx shows all that torch says",
        ) from error
    lost = sum(w.category.__name__ == "TracerWarning" for w in warned)
    if lost and not compared:
        log.warning(
            "tracing took %d values of %s for constants: compare on inputs of other sizes, "
            "checks=[...]", lost, type(module).__name__,
        )  # fmt: skip
    _name_by_parameters(model, module)
    _drop_traces(model)
    return model


def _reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _drop_traces(model: ir.Model) -> None:
    """Forget how torch came to each node: two kilobytes for each, with paths of this machine."""
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key.startswith(_TRACES)]:
            del node.metadata_props[key]


def _name_by_parameters(model: ir.Model, module: Any) -> None:
    """Give weights the names of their parameters, and store each once.

    Exporters name a tied weight by any of its names, and store the transpose of a weight under a
    name of their own, also beside the weight itself.
    """
    values = model.graph.initializers
    parameters = dict(module.named_parameters())
    own = {id(parameter): name for name, parameter in parameters.items()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = own[id(parameter)]
        if name == first or name not in values or values[name].is_graph_output():
            continue
        if first in values:
            values[name].replace_all_uses_with(values[first])
            del values[name]
        else:
            values[name].name = first
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, parameter in parameters.items():
        by_shape.setdefault(tuple(parameter.shape), []).append(name)
    for value in [value for name, value in values.items() if name not in parameters]:
        _name_transposed(model, value, by_shape, parameters)


def _name_transposed(
    model: ir.Model,
    value: ir.Value,
    by_shape: Mapping[tuple[int, ...], list[str]],
    parameters: Mapping[str, Any],
) -> None:
    """Name one weight by the parameter that it is the transpose of, if it is one."""
    values, tensor = model.graph.initializers, value.const_value
    names = [] if tensor is None else by_shape.get(shape_of(tensor)[::-1], [])
    if tensor is None or len(tensor.shape) != _MATRIX or not names or value.is_graph_output():
        return
    array = tensor.numpy()
    same = (n for n in names if np.array_equal(as_arrays({n: parameters[n]})[n].T, array))
    name = next(same, None)
    if name is None:
        return
    if name not in values:
        value.name = name
        return
    turned = ir.Node("", "Transpose", [values[name]], [ir.AttrInt64s("perm", [1, 0])])
    turned.outputs[0].shape, turned.outputs[0].type = value.shape, value.type
    model.graph.insert_before(model.graph[0], turned)
    del values[value.name or ""]
    turned.outputs[0].name, value.name = value.name, None
    value.replace_all_uses_with(turned.outputs[0])


def _dynamo(
    module: Any, call: Call, _: Path, shapes: Any, opset: int | None, options: Mapping[str, Any]
) -> ir.Model:
    torch = import_torch()
    tensors = tuple(tensor.detach().clone() for tensor in call.inputs.values())
    program = torch.onnx.export(
        _flat(module, call),
        tensors,
        dynamo=True,
        verbose=False,
        dynamic_shapes=None if shapes is None else {_TENSORS: tuple(free_axes(call, shapes))},
        opset_version=opset,
        **options,
    )
    model = load(program)
    _drop_prefix(model)
    return model


def _torchscript(
    module: Any,
    call: Call,
    folder: Path,
    shapes: Any,
    opset: int | None,
    options: Mapping[str, Any],
) -> ir.Model:
    torch = import_torch()
    path = folder / "torchscript.onnx"
    names: Sequence[str] = options["input_names"]
    free = zip(names, free_axes(call, shapes), strict=True)
    axes = {name: named_axes(name, dims) for name, dims in free}
    with _no_dumps(torch):
        torch.onnx.export(
            _flat(module, call),
            tuple(tensor.detach().clone() for tensor in call.inputs.values()),
            str(path),
            dynamo=False,
            opset_version=_OPSET if opset is None else opset,
            dynamic_axes={name: found for name, found in axes.items() if found},
            # Folding would store a transposed copy of a tied weight, under another name.
            do_constant_folding=False,
            **options,
        )
    model = load(path)
    _drop_prefix(model)
    return model


@contextlib.contextmanager
def _no_dumps(torch: Any) -> Iterator[None]:
    """Keep the older exporter from printing the whole graph on an error, from C++."""
    name = "_jit_onnx_log"
    dump = getattr(torch._C, name, None)
    if dump is None or os.environ.get(ASKED):
        yield
        return
    setattr(torch._C, name, lambda *graph: None)
    try:
        yield
    finally:
        setattr(torch._C, name, dump)


def _flat(module: Any, call: Call) -> Any:
    """A module from tensors to tensors: exporters know little of keywords, dicts and caches."""
    torch = import_torch()
    if isinstance(module, torch.jit.ScriptModule):  # compiled: it is not traced at all
        return module
    example = (call.args, dict(call.kwargs))

    def forward(self: Any, *tensors: Any) -> tuple[Any, ...]:
        args, kwargs = unflatten(example, tensors)
        found = call.results(getattr(self, _INNER)(*args, **kwargs))
        return tuple(tensor for _, _, tensor in found)

    wrapper = type("Flat", (torch.nn.Module,), {"forward": forward})()
    wrapper.add_module(_INNER, module)
    wrapper.training = module.training
    return wrapper


def _drop_prefix(model: ir.Model) -> None:
    """Give parameters and nodes the names they have without the wrapper."""
    values = dict(model.graph.initializers)
    for name, value in values.items():
        plain = name.removeprefix(f"{_INNER}.")
        if plain != name and plain not in values:
            value.name = plain
    for node in model.graph.all_nodes():
        if node.name and node.name.startswith(f"/{_INNER}/"):
            node.name = node.name.removeprefix(f"/{_INNER}")


EXPORTERS: Mapping[str, Callable[..., ir.Model]] = {
    "dynamo": _dynamo,
    "torchscript": _torchscript,
}
