"""Products with matrices of a stack: what chooses them, and the operand that they meet.

``MatMul(x, Reshape(Gather(W, i))) -> HyperExperts(x, Reshape(i), codes, ...)``: what was done with
the axes in front of the matrices is done with the indices. Where no matrices are chosen, all are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.constant_arguments import integers
from onnxcomp.passes.analysis.einsum_products import EinsumProduct, einsum_product
from onnxcomp.passes.lowering.builder import GraphBuilder
from onnxcomp.passes.weight import Use

__all__ = ["expert_product"]

# Squeeze, Unsqueeze and Slice take their arguments as inputs from these operator sets on.
_AXES_OPSET, _SLICE_OPSET = 13, 10


def expert_product(
    emit: Callable[[ir.Value, ir.Value], ir.Value],
    experts: int,
    use: Use,
    node: ir.Node,
    path: Sequence[ir.Node],
    builder: GraphBuilder,
) -> ir.Value:
    """The value that takes the place of the output of a product with a stack.

    Args:
        emit: Makes the product of activations and indices of matrices.
        experts: How many matrices there are.
        use: The product.
        node: Its node.
        path: Nodes from the initializer to the product.
        builder: Makes nodes in front of it.
    """
    x = node.inputs[1 - use.input_index]
    assert x is not None
    chosen = _chosen(experts, path, builder)
    summed = einsum_product(node, use.input_index)
    if summed is not None:
        return _back(emit(_to_product(x, summed, builder), chosen), summed, builder)
    if use.input_index == 1:
        return emit(x, chosen)
    return _turned(emit(_turned(x, x, builder), chosen), node.outputs[0], builder)


def _to_product(x: ir.Value, summed: EinsumProduct, builder: GraphBuilder) -> ir.Value:
    """The operand of an Einsum as that of a MatMul."""
    x = _permuted(x, summed.perm, builder)
    return _axes(builder, "Unsqueeze", x, summed.added) if summed.added else x


def _back(product: ir.Value, summed: EinsumProduct, builder: GraphBuilder) -> ir.Value:
    """The result of an Einsum from that of a MatMul."""
    if not summed.rows:
        product = _axes(builder, "Squeeze", product, (-2,))
    return _permuted(product, summed.order, builder)


def _permuted(value: ir.Value, perm: tuple[int, ...], builder: GraphBuilder) -> ir.Value:
    if perm == tuple(range(len(perm))):
        return value
    return builder.node("Transpose", [value], {"perm": perm})


def _turned(value: ir.Value, like: ir.Value, builder: GraphBuilder) -> ir.Value:
    """The transposes of matrices that have as many axes in front of them as those of `like`."""
    assert like.shape is not None
    rank = len(like.shape)
    return builder.node("Transpose", [value], {"perm": [*range(rank - 2), rank - 1, rank - 2]})


def _chosen(experts: int, path: Sequence[ir.Node], builder: GraphBuilder) -> ir.Value:
    """Indices of the matrices, in the shape of what stands before their last two axes."""
    chosen: ir.Value | None = None
    for node in path:
        if node.op_type == "Gather":
            chosen = node.inputs[1]
        elif node.op_type == "GatherND" and node.inputs[1] is not None:
            chosen = _axes(builder, "Squeeze", node.inputs[1], (-1,))
        elif chosen is not None and node.op_type in ("Squeeze", "Unsqueeze"):
            chosen = _with_axes(node, chosen, builder)
        elif chosen is not None and node.op_type == "Reshape":
            chosen = _reshaped(node, chosen, builder)
    if chosen is not None:
        return chosen
    return builder.constant(f"experts.{experts}", np.arange(experts, dtype=np.int64))


def _with_axes(node: ir.Node, chosen: ir.Value, builder: GraphBuilder) -> ir.Value:
    axes = integers(node, "axes")
    assert axes is not None
    # Counted from the end, there are two axes less.
    axes = tuple(axis + 2 if axis < 0 else axis for axis in axes)
    return _axes(builder, node.op_type, chosen, axes)


def _axes(builder: GraphBuilder, op_type: str, value: ir.Value, axes: tuple[int, ...]) -> ir.Value:
    """A Squeeze or Unsqueeze."""
    if builder.opset < _AXES_OPSET:
        return builder.node(op_type, [value], {"axes": axes})
    return builder.node(op_type, [value, _ints(builder, *axes)])


def _reshaped(node: ir.Node, chosen: ir.Value, builder: GraphBuilder) -> ir.Value:
    target, shape = integers(node, "shape"), node.inputs[1] if len(node.inputs) > 1 else None
    if target is not None:
        return builder.node("Reshape", [chosen, _ints(builder, *target[:-2])])
    assert shape is not None
    if builder.opset < _SLICE_OPSET:
        front = builder.node("Slice", [shape], {"starts": [0], "ends": [-2]})
    else:
        front = builder.node("Slice", [shape, _ints(builder, 0), _ints(builder, -2)])
    return builder.node("Reshape", [chosen, front])


def _ints(builder: GraphBuilder, *values: int) -> ir.Value:
    name = f"ints.{'x'.join(map(str, values))}" if values else "ints.none"
    return builder.constant(name, np.array(values, np.int64))
