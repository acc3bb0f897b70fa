"""What stands in the way of pruning: biases that several nodes share, or that are nodes.

``Constant() -> b`` becomes an initializer ``b``; a vector that several nodes read becomes one for
each. `tidy` merges vectors that are still equal in the end. Visits the main graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.tensors import is_float, shape_of
from onnxcomp.passes.ir.traversal import (
    Names,
    add_initializer,
    is_default_domain,
    new_initializer,
    remove_initializer,
)

__all__ = ["prepare", "tidy"]

_COPY_OF = "onnxcomp.prune.copy_of"
_ADDED = "onnxcomp.prune.added"


def prepare(model: ir.Model, *, biases: bool = False) -> None:
    """Make vectors initializers that one node reads.

    Args:
        model: Changed in place.
        biases: Also give products without a bias one of zeros; `tidy` removes those still zero.
    """
    names = Names(model)
    for node in list(model.graph):
        _lift(model, node)
    for value in list(model.graph.initializers.values()):
        _untie(model, names, value)
    if biases:
        for node in list(model.graph):
            _add_bias(model, names, node)


def _lift(model: ir.Model, node: ir.Node) -> None:
    attribute = node.attributes.get("value")
    if node.op_type != "Constant" or attribute is None or attribute.type != ir.AttributeType.TENSOR:
        return
    tensor, output = attribute.as_tensor(), node.outputs[0]
    if not is_float(tensor.dtype) or len(tensor.shape) != 1 or tensor.size < 2:
        return
    if output.is_graph_output() or not is_default_domain(node.domain):
        return
    value = ir.Value(
        name=output.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape_of(tensor))
    )
    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=output.name)
    output.replace_all_uses_with(value)
    model.graph.remove(node, safe=True)
    add_initializer(model, value)


def _untie(model: ir.Model, names: Names, value: ir.Value) -> None:
    tensor = value.const_value
    vector = tensor is not None and is_float(tensor.dtype) and len(tensor.shape) == 1
    uses = list(value.uses())
    if not vector or len(uses) < 2 or value.is_graph_output() or value.is_graph_input():
        return
    for use in uses[1:]:
        if use.node.graph is not model.graph:
            continue
        copy = ir.Value(name=names.value(value.name or "bias"), type=value.type, shape=value.shape)
        assert tensor is not None
        copy.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=copy.name)
        copy.meta[_COPY_OF] = value
        add_initializer(model, copy)
        use.node.replace_input_with(use.idx, copy)


def _add_bias(model: ir.Model, names: Names, node: ir.Node) -> None:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type != "MatMul" or weight is None or weight.const_value is None:
        return
    tensor, out = weight.const_value, node.outputs[0]
    uses = list(out.uses())
    constants = [
        other
        for use in uses
        if use.node.op_type == "Add"
        for other in use.node.inputs
        if other is not None and other.is_initializer()
    ]
    if len(tensor.shape) != 2 or constants or out.is_graph_output():
        return
    zeros = ir.Tensor(np.zeros(shape_of(tensor)[1], tensor.dtype.numpy()), dtype=tensor.dtype)
    bias = new_initializer(model, names.value(f"{weight.name}.bias"), zeros)
    made = ir.node("Add", [out, bias])
    made.name = names.node(f"{node.name}/bias")
    made.outputs[0].name = names.value(f"{out.name}.biased")
    made.outputs[0].type, made.outputs[0].shape = out.type, out.shape
    made.meta[_ADDED] = True
    model.graph.insert_after(node, made)
    for use in uses:
        use.node.replace_input_with(use.idx, made.outputs[0])


def tidy(model: ir.Model) -> None:
    """Undo what `prepare` did where it came to nothing, and drop initializers nobody reads."""
    for node in list(model.graph):
        bias = node.inputs[1] if len(node.inputs) > 1 else None
        added = node.meta.get(_ADDED) and bias is not None and bias.const_value is not None
        if added and bias is not None and not np.any(bias.const_value.numpy()):  # type: ignore[union-attr]
            source = node.inputs[0]
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
    for value in list(model.graph.initializers.values()):
        original = value.meta.get(_COPY_OF)
        if original is not None and original.const_value is not None and _equal(original, value):
            value.replace_all_uses_with(original)
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            remove_initializer(value)


def _equal(left: ir.Value, right: ir.Value) -> bool:
    assert left.const_value is not None
    assert right.const_value is not None
    return np.array_equal(left.const_value.numpy(), right.const_value.numpy())
