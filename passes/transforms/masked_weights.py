"""Weights that a model computes from two tensors that it holds: ``Mul(W, mask) -> W * mask``.

Exporters leave the masks of pruned layers, and factors that training put beside a weight, as nodes.
A runtime multiplies them out when it loads the model; weights are looked for before that. Sums,
differences, products and quotients of two tensors, and what Where takes of two, are computed here
as a runtime does, with one rounding, bit for bit. Visits the main graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.config.policy import selected
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import is_matrix, shape_of
from onnxcomp.passes.ir.traversal import (
    LISTING_IR,
    Names,
    add_initializer,
    is_default_domain,
    remove_dead,
    remove_initializer,
    rename_initializer,
)
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.weight import Array

__all__ = ["MaskedWeights"]

_OPERATORS: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Where": np.where,
}

# Elements of a tensor that tell masks and integers from weights: values other than 0 that are this
# few, and as often there.
_LOOKED_AT, _FEW, _REPEATS = 4096, 256, 4

# Types in which numpy and runtimes round alike.
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class MaskedWeights(GraphPass):
    """One weight in the place of two tensors and the node that joins them."""

    name: ClassVar[str] = "masked_weights"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Always: no value changes."""
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place; what was joined may be joined with a third tensor."""
        settings, names = context.settings, Names(model)
        listed = model.ir_version >= LISTING_IR and not settings.freeze_inputs
        notes = []
        for node in list(model.graph):
            weight = _weight_of(node, settings.min_size, listed)
            if weight is None or not selected(
                _names_of(node, weight), settings.include, settings.exclude
            ):
                continue
            notes.append(f"{weight.name}: {node.op_type} of two tensors of the model")
            _join(model, node, weight, names)
        return Change(len(notes), tuple(notes))


def _names_of(node: ir.Node, weight: ir.Value) -> list[str]:
    """Names of a weight, of the node that makes it, and of those that read it."""
    readers = [use.node.name for use in node.outputs[0].uses()]
    return [name for name in (weight.name, node.name, *readers) if name]


def _tensor(value: ir.Value | None, listed: bool) -> ir.TensorProtocol | None:
    """The tensor of an initializer of the main graph that nobody can override."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    if value.is_graph_output() or (value.is_graph_input() and listed):
        return None
    return value.const_value


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is cast from; the value where it is not."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Cast" or not is_default_domain(producer.domain):
        return value
    return producer.inputs[0]


def _weight_of(node: ir.Node, min_size: int, listed: bool) -> ir.Value | None:
    """The tensor in whose place the result of a node can stand: of its shape, and read by it alone.

    Args:
        node: A node.
        min_size: Bytes from which a tensor is a weight.
        listed: Whether graph inputs may be overridden.
    """
    if not is_default_domain(node.domain) or node.op_type not in _OPERATORS:
        return None
    tensors = [_tensor(_source(value), listed) for value in node.inputs]
    if any(tensor is None for tensor in tensors) or node.outputs[0].is_graph_output():
        return None
    shapes = [shape_of(tensor) for tensor in tensors if tensor is not None]
    try:
        result = np.broadcast_shapes(*shapes)
    except ValueError:
        return None
    found: list[ir.Value] = []
    for value, tensor in zip(node.inputs, tensors, strict=True):
        assert value is not None and tensor is not None
        if _source(value) is not value or len(value.uses()) != 1 or tensor.dtype not in _TYPES:
            continue
        if shape_of(tensor) == result and is_matrix(tensor) and tensor.nbytes >= min_size:
            found.append(value)
    return next((value for value in found if not _has_few_values(value)), None)


def _has_few_values(value: ir.Value) -> bool:
    """Whether the first elements are of few values, as those of masks and of integers are.

    Without its scales, such a tensor is stored by its values: smaller than the product, and exact.
    """
    assert value.const_value is not None
    first = np.asarray(value.const_value.numpy()).reshape(-1)[:_LOOKED_AT]
    elements = first[first != 0]
    count = len(np.unique(elements))
    return count <= _FEW and count * _REPEATS <= len(elements)


def _join(model: ir.Model, node: ir.Node, weight: ir.Value, names: Names) -> None:
    """Put one tensor, computed whenever it is read, in the place of a node."""
    assert weight.const_value is not None and weight.name is not None
    dtype, shape = weight.const_value.dtype, ir.Shape(shape_of(weight.const_value))
    sources = [_source(value) for value in node.inputs]
    operands = [value.const_value for value in sources if value is not None and value.const_value]
    casts = [value.producer() for value in node.inputs if value is not None and value.producer()]
    compute = functools.partial(_computed, node.op_type, operands, dtype)
    name = weight.name
    joined = ir.LazyTensor(compute, dtype, shape, cache=False, name=name)
    value = ir.Value(name=f"{name}/joined", const_value=joined, shape=shape)
    value.type = ir.TensorType(dtype)
    node.outputs[0].replace_all_uses_with(value)
    remove_dead([node, *(cast for cast in casts if cast is not None)])
    for source in sources:
        if source is not None and not source.uses():
            remove_initializer(source)
    rename_initializer(value, names.value(name) if name in model.graph.initializers else name)
    add_initializer(model, value)


def _computed(
    operator: str, operands: list[ir.TensorProtocol], dtype: ir.DataType
) -> ir.TensorProtocol:
    """The result of a node; a condition keeps its type, all else has that of the weight."""
    arrays = [np.asarray(tensor.numpy()) for tensor in operands]
    kind = dtype.numpy()
    first = 1 if operator == "Where" else 0
    arrays = [*arrays[:first], *(array.astype(kind, copy=False) for array in arrays[first:])]
    with np.errstate(all="ignore"):
        return ir.Tensor(np.asarray(_OPERATORS[operator](*arrays)), dtype=dtype)
