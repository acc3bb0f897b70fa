"""The inputs of a model: names, types, shapes, and how large an index may be."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.structure import DOMAIN, nested_nodes, read_structure

if TYPE_CHECKING:
    import onnx

__all__ = ["InputSpec", "expected", "fits", "index_bounds", "read_signature"]

Dim = int | str | None
PathLike = str | os.PathLike[str]

# Operators whose first input holds the same values as their output, if in another order or type.
_SAME_VALUES = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice"})
_SAME_VALUES |= {"Squeeze", "Tile", "Transpose", "Unsqueeze"}
_JOINED = "Concat"

# Look-ups: (domain, operator) -> pairs (input with the indices, input with the table).
_LOOK_UPS: Mapping[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("", "Gather"): ((1, 0),),
    ("com.microsoft", "GatherBlockQuantized"): ((1, 0),),
    ("com.microsoft", "EmbedLayerNormalization"): ((0, 2), (1, 4), (8, 3)),
    ("com.microsoft", "QEmbedLayerNormalization"): ((0, 2), (1, 4)),
}


# Input of GroupQueryAttention that is its rotary cache.
_ROTARY = 7


@dataclasses.dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: Element type; object for text.
        dims: Sizes; a name or None where the size is free.
        bound: Indices must be below it, where the input is used as an index; else None.
        ranked: Whether the model says how many axes it has; `dims` is a guess where it does not.
    """

    name: str
    dtype: np.dtype[Any]
    dims: tuple[Dim, ...]
    bound: int | None = None
    ranked: bool = True

    @property
    def text(self) -> str:
        """Type and shape in words: ``int64 [batch, 128]``."""
        shown = ", ".join("?" if dim is None else str(dim) for dim in self.dims)
        kind = "string" if self.dtype.kind == "O" else self.dtype.name
        return f"{kind} [{shown}]"


def read_signature(model: PathLike) -> tuple[InputSpec, ...]:
    """The inputs a caller must give, in the model's order.

    Raises:
        ModelError: The file is missing, is not an ONNX model, or computes nothing.
        UsageError: An input is not a tensor.
    """
    proto = read_structure(model)
    if not proto.graph.output:
        raise ModelError(f"{os.fspath(model)} has no outputs", hint="export the model again")
    bounds = index_bounds(proto)
    given = {tensor.name for tensor in proto.graph.initializer}
    given |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    heads = dict(_head_sizes(proto))
    return tuple(
        _with_head(_spec(value, bounds.get(value.name)), heads.get(value.name))
        for value in proto.graph.input
        if value.name not in given
    )


def _with_head(spec: InputSpec, size: int | None) -> InputSpec:
    """A cache with the size of its heads, where the model gives that a name alone."""
    if size is None or len(spec.dims) != 4 or isinstance(spec.dims[3], int):
        return spec
    return dataclasses.replace(spec, dims=(*spec.dims[:3], size))


def _head_sizes(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Caches that GroupQueryAttention reads, and the size of a head there.

    It is that of the product which makes queries, keys and values, or twice that of a row of the
    rotary cache.
    """
    producers = {output: node for node in model.graph.node for output in node.output if output}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        names = [*node.input, *[""] * _ROTARY]
        query, heads = (_attribute(node, name) or [0] for name in ("num_heads", "kv_num_heads"))
        count = query[0] + (0 if names[1] else 2 * heads[0])
        width = _product_width(names[0], producers, shapes)
        rotary = shapes.get(names[_ROTARY], ())
        if width and count:
            size = width // count
        elif len(rotary) == 2:
            size = 2 * rotary[1]
        else:
            continue
        yield from ((name, size) for name in names[3:5] if name)


def _product_width(
    name: str,
    producers: Mapping[str, onnx.NodeProto],
    shapes: Mapping[str, tuple[int, ...]],
) -> int:
    """Width of a product with a stored weight, a bias behind it or not; 0 where it is not known."""
    node = producers.get(name)
    if node is not None and node.op_type == "Add":
        found = [producers[value] for value in node.input if value in producers]
        node = found[0] if len(found) == 1 else None
    if node is None or node.op_type != "MatMul":
        return 0
    return shapes.get(node.input[1], (0,))[-1]


def fits(spec: InputSpec, shape: Sequence[int]) -> bool:
    """Whether an input may have this shape."""
    if not spec.ranked:
        return True
    return len(shape) == len(spec.dims) and all(
        size == dim if isinstance(dim, int) else size >= 0
        for size, dim in zip(shape, spec.dims, strict=True)
    )


def expected(specs: Sequence[InputSpec]) -> str:
    """The inputs in words, for hints."""
    return "inputs: " + "; ".join(f"{spec.name}: {spec.text}" for spec in specs)


def _spec(value: onnx.ValueInfoProto, bound: int | None) -> InputSpec:
    import onnx

    if value.type.WhichOneof("value") != "tensor_type":
        kind = value.type.WhichOneof("value")
        raise UsageError(
            f"input {value.name!r} is a {kind}, not a tensor",
            hint="such models can be compressed, but not run by onnxcomp: use --no-verify",
        )
    tensor = value.type.tensor_type
    if tensor.elem_type == onnx.TensorProto.STRING:
        dtype: np.dtype[Any] = np.dtype(object)
    else:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if not tensor.HasField("shape"):
        return InputSpec(value.name, dtype, (None, None), bound, ranked=False)
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param or None
        for dim in tensor.shape.dim
    )
    return InputSpec(value.name, dtype, dims, bound)


def index_bounds(model: onnx.ModelProto) -> dict[str, int]:
    """Upper bounds of the graph inputs that reach a look-up as indices.

    Found through casts and changes of shape, in subgraphs and in model-local functions. An input
    with several look-ups gets the least bound.
    """
    model = _inlined(model)
    nodes = list(nested_nodes(model.graph.node))
    producers = {output: node for node in nodes for output in node.output if output}
    shapes = dict(_constant_shapes(model, nodes))
    inputs = {value.name for value in model.graph.input}
    bounds: dict[str, float] = {}
    for node in nodes:
        for index, bound in _look_ups(node, producers, shapes, model):
            for name in _sources(index, producers):
                if name in inputs:
                    bounds[name] = min(bound, bounds.get(name, math.inf))
    return {name: int(bound) for name, bound in bounds.items()}


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions expanded, but for the operators of com.onnxcomp."""
    others = [(f.domain, f.name) for f in model.functions if f.domain != DOMAIN]
    if not others:
        return model
    import onnx.inliner

    return onnx.inliner.inline_selected_functions(model, others)


def _graphs(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _constant_shapes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes of initializers and constants of all scopes."""
    nodes = list(nodes)
    for graph in _graphs(model.graph, nodes):
        for tensor in graph.initializer:
            yield tensor.name, tuple(tensor.dims)
    for node in nodes:
        if node.op_type == "Constant" and node.domain == "":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], tuple(attribute.t.dims)


def _look_ups(
    node: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    shapes: Mapping[str, tuple[int, ...]],
    model: onnx.ModelProto,
) -> Iterator[tuple[str, int]]:
    """Names of indices and their bounds."""
    if node.domain == DOMAIN and node.op_type.endswith("Gather"):
        extent = _attribute(node, "extent")
        if extent:
            yield node.input[0], extent[0]
    elif node.domain == DOMAIN and node.op_type.endswith("Experts"):
        experts = _attribute(node, "experts")
        if experts:
            yield node.input[1], experts[0]
    elif node.domain == "" and node.op_type == "OneHot":
        depth = _scalar(node.input[1], model, producers)
        if depth is not None:
            yield node.input[0], depth
    elif (
        node.domain == ""
        and node.op_type == "GatherND"
        and _attribute(node, "batch_dims") in (None, [0])
    ):
        shape = _table_shape(node.input[0], producers, shapes)
        if shape:  # entries of a tuple are of different axes
            yield node.input[1], min(shape)
    axis = (_attribute(node, "axis") or [0])[0]
    for index, table in _LOOK_UPS.get((node.domain, node.op_type), ()):
        if max(index, table) < len(node.input) and node.input[index]:
            shape = _table_shape(node.input[table], producers, shapes)
            if shape is not None and -len(shape) <= axis < len(shape):
                yield node.input[index], shape[axis]


def _attribute(node: onnx.NodeProto, name: str) -> list[int] | None:
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) or [attribute.i]
    return None


def _scalar(
    name: str, model: onnx.ModelProto, producers: Mapping[str, onnx.NodeProto]
) -> int | None:
    """The value of a constant of one element, if it is in the file."""
    from onnx import numpy_helper

    tensors = [tensor for tensor in model.graph.initializer if tensor.name == name]
    if name in producers and producers[name].op_type == "Constant":
        tensors = [item.t for item in producers[name].attribute if item.name == "value"]
    if not tensors or tensors[0].external_data:
        return None
    values = numpy_helper.to_array(tensors[0]).reshape(-1)
    return int(values[0]) if len(values) == 1 else None


def _table_shape(
    name: str,
    producers: Mapping[str, onnx.NodeProto],
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[int, ...] | None:
    """Shape of a look-up table: stored, converted, or decoded from a compressed weight."""
    while name not in shapes:
        node = producers.get(name)
        if node is None:
            return None
        if node.domain == DOMAIN:
            extent = _attribute(node, "extent")
            return tuple(extent) if extent else None
        if node.op_type == "Transpose":
            shape = _table_shape(node.input[0], producers, shapes)
            perm = _attribute(node, "perm")
            return shape and tuple(shape[axis] for axis in perm or range(len(shape))[::-1])
        if node.op_type not in ("Cast", "Identity", "DequantizeLinear"):
            return None
        name = node.input[0]
    return shapes[name]


def _sources(name: str, producers: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    """Names that a value takes its elements from, going up."""
    pending, seen = [name], {name}
    while pending:
        current = pending.pop()
        yield current
        node = producers.get(current)
        if node is None or node.domain != "":
            continue
        if node.op_type in _SAME_VALUES:
            above = list(node.input[:1])
        else:
            above = list(node.input) if node.op_type == _JOINED else []
        pending += [value for value in above if value and value not in seen]
        seen.update(above)
