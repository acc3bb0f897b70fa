"""The two exporters of torch behind one signature; both return an `onnx_ir.Model`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.models.torch_calls import Call, import_torch, named_leaves
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.suggest import suggest

__all__ = ["EXPORTERS", "export_graph"]

# Opset asked of the older exporter where none is given. The newer one has its own default.
_OPSET = 18

# Name under which the wrapper of `_torchscript` holds the module.
_INNER = "module"


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

    Raises:
        UsageError: There is no such exporter.
        ModelError: torch cannot export the module.
    """
    if exporter not in EXPORTERS:
        raise UsageError(f"exporter {exporter!r} is unknown", hint=suggest(exporter, EXPORTERS))
    options = {"input_names": list(input_names), "output_names": list(output_names)}
    try:
        with warnings.catch_warnings():
            # What torch says about its own future is not for users of this function.
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", kind)
            return EXPORTERS[exporter](module, call, folder, dynamic_shapes, opset, options)
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # of every kind: torch runs the module's own code
        other = next(name for name in EXPORTERS if name != exporter)
        raise ModelError(
            f"torch cannot export {type(module).__name__} with {exporter}: {_reason(error)}",
            hint=f"try exporter={other!r}, or torch.onnx.export to see all that torch says",
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _dynamo(
    module: Any, call: Call, _: Path, shapes: Any, opset: int | None, options: Mapping[str, Any]
) -> ir.Model:
    torch = import_torch()
    args, kwargs = call.copies()
    program = torch.onnx.export(
        module,
        args,
        kwargs=kwargs,
        dynamo=True,
        verbose=False,
        dynamic_shapes=shapes,
        opset_version=opset,
        **options,
    )
    return load(program)


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
    args, kwargs = call.copies()
    names: Sequence[str] = options["input_names"]
    axes = {
        name: _named_axes(name, _followed(shapes, keys, call))
        for name, keys in zip(names, call.paths, strict=True)
    }
    tensors = tuple(tensor for _, _, tensor in named_leaves((args, kwargs)))
    torch.onnx.export(
        _flat(module, (args, kwargs)),
        tensors,
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


def _flat(module: Any, example: Any) -> Any:
    """A module from tensors to tensors: this exporter knows neither keywords nor dicts."""
    torch = import_torch()
    if isinstance(module, torch.jit.ScriptModule):  # compiled: it is not traced at all
        return module
    from torch.utils import _pytree

    leaves, structure = _pytree.tree_flatten(example)
    constants = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]

    def forward(self: Any, *tensors: Any) -> tuple[Any, ...]:
        given = iter(tensors)
        filled = [next(given) if constant is None else constant[0] for constant in constants]
        args, kwargs = _pytree.tree_unflatten(filled, structure)
        found = named_leaves(getattr(self, _INNER)(*args, **kwargs))
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


def _followed(shapes: Any, keys: Sequence[Any], call: Call) -> Any:
    """The part of `dynamic_shapes` that is about one tensor; None where there is none."""
    if shapes is None:
        return None
    if not isinstance(shapes, Mapping):
        parameters = list(dict.fromkeys(path[0] for path in call.paths))
        shapes = dict(zip(parameters, shapes, strict=False))
    for key in keys:
        try:
            shapes = shapes[key]
        except (KeyError, IndexError, TypeError):
            return None
    return shapes


def _named_axes(name: str, dims: Any) -> dict[int, str]:
    """Free axes of one tensor with the names of their sizes."""
    return dict(_axes(name, dims))


def _axes(name: str, dims: Any) -> Iterator[tuple[int, str]]:
    pairs = dims.items() if isinstance(dims, Mapping) else enumerate(dims or ())
    for axis, dim in pairs:
        if isinstance(dim, str):
            yield axis, dim
        elif dim is not None and not isinstance(dim, int) and "STATIC" not in str(dim):
            # Dim("batch") has a name; Dim.DYNAMIC and Dim.AUTO have none.
            yield axis, getattr(dim, "__name__", f"{name}_dim_{axis}")


EXPORTERS: Mapping[str, Callable[..., ir.Model]] = {
    "dynamo": _dynamo,
    "torchscript": _torchscript,
}
