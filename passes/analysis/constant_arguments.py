"""Arguments of nodes that are known: attributes, or inputs that are constants."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.tensors import WEIGHT_TYPES

__all__ = ["cast_type", "constant", "integers"]


def integers(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """A constant integer argument, given as attribute or as second input."""
    if name in node.attributes:
        return tuple(node.attributes[name].as_ints())
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if value is None else constant(value)
    if tensor is None or tensor.dtype != ir.DataType.INT64:
        return None
    return tuple(int(item) for item in np.ravel(tensor.numpy()))


def cast_type(node: ir.Node) -> ir.DataType | None:
    """What a Cast casts to; None where weights are not stored in that type."""
    to = node.attributes.get_int("to", 0)
    return next((dtype for dtype in WEIGHT_TYPES if int(dtype) == to), None)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a value that no caller of the model can change; None for others."""
    if value.const_value is not None:
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant":
        return None
    if "value" in node.attributes:
        return node.attributes["value"].as_tensor()
    for name in ("value_int", "value_ints"):
        if name in node.attributes:
            return ir.tensor(np.array(node.attributes[name].value, np.int64))
    return None
