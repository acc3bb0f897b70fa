"""Take products with experts out of the fused operator for a mixture of them.

``MoE(x, r, W1, b1, W2, b2; k)`` becomes, for tokens x (t, h) and logits r (t, e)::

    i = TopK(r, k)      p = GatherElements(Softmax(r), i), divided by its sum if that is asked for
    u = activation(MatMul(x, Gather(W1^T, i)) + Gather(b1, i))
    y = sum over k of p (MatMul(u, Gather(W2^T, i)) + Gather(b2, i))

Inside the operator all experts are decoded when a session starts; here, only those that are chosen.
What ONNX Runtime's CPU provider computes is what the nodes compute. Weights are ``(e, out, in)``;
the older layout and what that provider cannot run stay as they are: `kept_experts` tells why.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import default_opset
from onnxcomp.passes.transforms.fused_node import FusedNode

__all__ = ["kept_experts", "split_experts", "worthwhile"]

_DOMAIN = "com.microsoft"

# The operator set from which on axes are inputs, of ReduceSum and others, and Softmax has one axis.
_LEAST_OPSET = 13

_FIRST, _FIRST_BIAS, _SECOND, _SECOND_BIAS, _THIRD = 2, 3, 4, 5, 6

_ACTIVATIONS = ("relu", "gelu", "silu", "swiglu", "identity")

# Rows of a panel: matrices of other numbers of rows are not told apart on their codes.
_PANEL = 16


def worthwhile(settings: Settings) -> bool:
    """Whether a codec may be used that has products with chosen experts, or some are to go."""
    able = {name for name, codec in CODECS.items() if codec.experts is not None}
    if settings.prune_experts is not None:
        return True
    return bool({"auto", *able} & set(settings.method)) and not settings.stock


def kept_experts(model: ir.Model, node: ir.Node) -> str | None:
    """Why a mixture of experts stays as it is; None where it can be split."""
    if (default_opset(model) or 0) < _LEAST_OPSET:
        return f"the model's operator set is older than {_LEAST_OPSET}"
    kind = node.attributes.get_string("activation_type", "relu")
    if kind not in _ACTIVATIONS:
        return f"its activation is {kind}"
    if kind == "swiglu" and node.attributes.get_int("swiglu_fusion", 0) != 1:
        return "its two parts are not interleaved"
    if node.attributes.get_int("use_sparse_mixer", 0):
        return "it uses the sparse mixer"
    if any(value is not None for value in node.inputs[_THIRD:]):
        return "it has a third product"
    tensors = [_tensor(node, index) for index in (_FIRST, _SECOND)]
    if tensors[0] is None or tensors[1] is None:
        return "its weights are not constant"
    width = _width(node)
    if width is None:
        return "the width of its input is not known"
    return _layout_kept(shape_of(tensors[0]), shape_of(tensors[1]), width, kind)


def _width(node: ir.Node) -> int | None:
    """Width of tokens: layouts differ in nothing but the order of their axes."""
    offset = _tensor(node, _SECOND_BIAS)
    if offset is not None:
        return shape_of(offset)[-1]
    for value in (node.inputs[0], node.outputs[0]):
        last = None if value is None or not value.shape else value.shape[-1]
        if isinstance(last, int):
            return last
    return None


def _layout_kept(
    first: tuple[int, ...], second: tuple[int, ...], width: int, kind: str
) -> str | None:
    parts = 2 if kind == "swiglu" else 1
    if len(first) != 3 or len(second) != 3 or first[0] != second[0] or first[0] < 2:
        return f"its weights have shapes {first} and {second}"
    if first[1:] != (parts * second[2], width) or second[1] != width:
        return f"its weights {first} and {second} have the older layout"
    odd = next((rows for rows in (first[1], second[1]) if rows % _PANEL), None)
    if odd is not None:
        return f"its experts have {odd} output channels, no multiple of {_PANEL}"
    return None


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.is_graph_input() else value.const_value


def split_experts(make: FusedNode) -> None:
    """Put plain nodes in the place of a mixture of experts that `kept_experts` lets go."""
    x = make.input(0)
    tensor = _tensor(make.node, _FIRST)
    assert tensor is not None
    width = shape_of(tensor)[2]
    chosen, shares = _routed(make)
    tokens = make.one("Reshape", [x, _ints(make, "tokens", -1, 1, 1, width)])
    hidden = _product(make, tokens, chosen, _FIRST, _FIRST_BIAS)
    hidden = _activated(make, hidden, shape_of(tensor)[1])
    found = _product(make, hidden, chosen, _SECOND, _SECOND_BIAS)
    found = make.one("Squeeze", [found, _ints(make, "row", 2)])
    shares = make.one("Unsqueeze", [shares, _ints(make, "column", 1)])
    total = make.one("MatMul", [shares, found])
    shape = make.one("Shape", [x])
    shape.type = ir.TensorType(ir.DataType.INT64)
    make.replace(make.one("Reshape", [total, shape]))


def _routed(make: FusedNode) -> tuple[ir.Value, ir.Value]:
    """Indices (t, k) of the experts of each token, and their shares."""
    node, logits = make.node, make.input(1)
    count = _ints(make, "k", node.attributes.get_int("k", 1))
    _, chosen = make.add("TopK", [logits, count], {"axis": -1}, outputs=2)
    chosen.type = ir.TensorType(ir.DataType.INT64)
    shares = make.one("Softmax", [logits], {"axis": -1})
    shares = make.one("GatherElements", [shares, chosen], {"axis": 1})
    if node.attributes.get_int("normalize_routing_weights", 0):
        total = make.one("ReduceSum", [shares, _ints(make, "last", -1)], {"keepdims": 1})
        shares = make.one("Div", [shares, total])
    return chosen, shares


def _product(make: FusedNode, x: ir.Value, chosen: ir.Value, weight: int, bias: int) -> ir.Value:
    """``x (t, k or 1, 1, in)`` with the chosen experts: (t, k, 1, out)."""
    turned = make.one("Transpose", [make.input(weight)], {"perm": [0, 2, 1]})
    matrices = make.one("Gather", [turned, chosen], {"axis": 0})
    product = make.one("MatMul", [x, matrices])
    if make.input(bias) is None:
        return product
    offset = make.one("Gather", [make.input(bias), chosen], {"axis": 0})
    offset = make.one("Unsqueeze", [offset, _ints(make, f"offset.{bias}", 2)])
    return make.one("Add", [product, offset])


def _activated(make: FusedNode, x: ir.Value, width: int) -> ir.Value:
    kind = make.node.attributes.get_string("activation_type", "relu")
    if kind == "identity":
        return x
    if kind == "relu":
        return make.one("Relu", [x])
    if kind == "gelu":
        return make.add("FastGelu", [x], domain=_DOMAIN)[0]
    if kind == "silu":
        return make.one("Mul", [x, make.one("Sigmoid", [x])])
    return _gated(make, x, width)


def _gated(make: FusedNode, x: ir.Value, width: int) -> ir.Value:
    """``a sigmoid(alpha a) (b + beta)`` of pairs (a, b), both limited."""
    attributes = make.node.attributes
    limit = attributes.get_float("swiglu_limit", math.inf)
    pairs = make.one("Reshape", [x, _ints(make, "pairs", 0, 0, 0, width // 2, 2)])
    gate, linear = (
        make.one("Gather", [pairs, make.constant(name, np.array(at, np.int64))], {"axis": -1})
        for at, name in enumerate(("gate", "linear"))
    )
    if math.isfinite(limit):
        most, least = (_number(make, name, v) for name, v in (("limit", limit), ("least", -limit)))
        gate = make.one("Min", [gate, most])
        linear = make.one("Clip", [linear, least, most])
    alpha = _number(make, "alpha", attributes.get_float("activation_alpha", 1.0))
    beta = _number(make, "beta", attributes.get_float("activation_beta", 0.0))
    gate = make.one("Mul", [gate, make.one("Sigmoid", [make.one("Mul", [gate, alpha])])])
    return make.one("Mul", [gate, make.one("Add", [linear, beta])])


def _ints(make: FusedNode, name: str, *values: int) -> ir.Value:
    return make.constant(name, np.array(values, np.int64))


def _number(make: FusedNode, name: str, value: float) -> ir.Value:
    tensor = _tensor(make.node, _FIRST)
    assert tensor is not None
    return make.constant(name, np.array(value, tensor.dtype.numpy()))
