"""Take products and look-ups with weights out of the fused operators of ONNX Runtime.

A weight inside of a fused operator can only be decoded as a whole; beside it, it computes on codes
and sees calibration. Exact up to the order of sums, which ONNX Runtime does not promise either:

* ``FusedMatMul(x, W; transB, alpha) -> Mul(MatMul(x, Transpose(W)), alpha)``
* ``FusedGemm(x, W, c; activation) -> activation(Gemm(x, W, c))``
* ``Attention(x, W, b, mask, , s) -> MultiHeadAttention(Split(Add(MatMul(x, W), b)), , mask, s)``
* ``EmbedLayerNormalization(ids, segments, W, P, S, ...) -> LayerNormalization(Add(Gather(W, ids),
  Gather(P, positions), Gather(S, segments)))``
* ``MoE(x, r, W1, ...)``: products with the chosen experts, see `split_moe`

`kept` tells why a fused operator stays as it is. Visits the main graph and all subgraphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import WEIGHT_TYPES, shape_of
from onnxcomp.passes.ir.traversal import Names, default_opset, scopes
from onnxcomp.passes.transforms.fused_node import FusedNode
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.transforms.split_moe import kept_experts, split_experts, worthwhile

__all__ = ["SplitFused", "kept"]

log = logging.getLogger(__name__)

_DOMAIN = "com.microsoft"

# The operator set that has LayerNormalization; Split takes its sizes as an input from 13 on.
_LEAST_OPSET = 17

# Activations of FusedGemm that are operators of their own with the attributes of FusedGemm.
_ACTIVATIONS = ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")

# Inputs of Attention: what it attends with in the past stays inside of it.
_WEIGHT, _BIAS, _MASK, _PAST, _SCORES, _PAST_LENGTH = 1, 2, 3, 4, 5, 6

# Attributes that MultiHeadAttention has as well.
_SHARED = ("num_heads", "unidirectional", "scale", "mask_filter_value")


class SplitFused(GraphPass):
    """Weights beside fused operators in the place of weights inside them."""

    name: ClassVar[str] = "split_fused"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Always."""
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place."""
        names, notes = Names(model), []
        for scope in scopes(model):
            for node in list(scope.graph):
                weight = _weight(node)
                tensor = None if weight is None else weight.const_value
                if tensor is None or tensor.nbytes < context.settings.min_size:
                    continue
                if node.op_type == "MoE" and not worthwhile(context.settings):
                    continue
                reason = kept(model, node)
                if reason is None:
                    _SPLITS[node.op_type](FusedNode(model, node, names))
                    notes.append(f"{node.name}: {node.op_type} was split")
                else:
                    log.info("%s: %s stays, %s", node.name, node.op_type, reason)
        return Change(len(notes), tuple(notes))


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight inside of a fused operator that can be split."""
    place = {"EmbedLayerNormalization": 2, "MoE": 2}.get(node.op_type, _WEIGHT)
    if node.domain != _DOMAIN or node.op_type not in _SPLITS or len(node.inputs) <= place:
        return None
    value = node.inputs[place]
    tensor = None if value is None else value.const_value
    rank = 3 if node.op_type == "MoE" else 2
    if tensor is None or tensor.dtype not in WEIGHT_TYPES or len(shape_of(tensor)) != rank:
        return None
    return value


def kept(model: ir.Model, node: ir.Node) -> str | None:
    """Why a fused operator stays as it is; None where it can be split."""
    if node.op_type == "MoE":
        return kept_experts(model, node)
    if (default_opset(model) or 0) < _LEAST_OPSET:
        return f"the model's operator set is older than {_LEAST_OPSET}"
    if node.op_type == "FusedMatMul":
        names = ("transA", "transBatchA", "transBatchB")
        turned = next((name for name in names if node.attributes.get_int(name, 0)), None)
        return turned and f"{turned} turns its input"
    if node.op_type == "FusedGemm":
        kind = node.attributes.get_string("activation", "")
        return None if kind in _ACTIVATIONS else f"its activation is {kind}"
    if node.op_type == "Attention":
        return _attention_kept(node)
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "more than its first output is read"
    positions = node.inputs[8] if len(node.inputs) > 8 else None
    return None if positions is None else "positions are given"


def _attention_kept(node: ir.Node) -> str | None:
    given = {index for index, value in enumerate(node.inputs) if value is not None}
    if {_PAST, _PAST_LENGTH} & given or len(node.outputs) > 1:
        return "it keeps a cache of both keys and values"
    if node.attributes.get_int("do_rotary", 0):
        return "it turns queries and keys"
    if _BIAS not in given:
        return "it has no bias"
    mask = node.inputs[_MASK] if _MASK in given else None
    if mask is not None and (mask.shape is None or len(mask.shape) != 2):
        return "its mask is not one of tokens"
    return None


def _split_matmul(make: FusedNode) -> None:
    node = make.node
    weight = make.input(_WEIGHT)
    if node.attributes.get_int("transB", 0):
        weight = make.one("Transpose", [weight], {"perm": [1, 0]})
    result = make.one("MatMul", [make.input(0), weight])
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha != 1.0:
        dtype = _dtype(make.input(_WEIGHT))
        result = make.one("Mul", [result, make.constant("alpha", np.array(alpha, dtype))])
    make.replace(result)


def _dtype(value: ir.Value | None) -> Any:
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    return tensor.dtype.numpy()


def _split_gemm(make: FusedNode) -> None:
    own = ("alpha", "beta", "transA", "transB")
    kept_attributes = {n: a.value for n, a in make.node.attributes.items() if n in own}
    product = make.one("Gemm", list(make.node.inputs), kept_attributes)
    make.replace(make.one(make.node.attributes.get_string("activation", ""), [product]))


def _split_attention(make: FusedNode) -> None:
    node, weight = make.node, make.input(_WEIGHT)
    assert weight is not None and weight.const_value is not None
    width = shape_of(weight.const_value)[1]
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", ())) or [width // 3] * 3
    product = make.one("MatMul", [make.input(0), weight])
    product = make.one("Add", [product, make.input(_BIAS)])
    split = make.constant("sizes", np.array(sizes, np.int64))
    parts = make.add("Split", [product, split], {"axis": -1}, outputs=3)
    inputs = [*parts, None, make.input(_MASK), make.input(_SCORES)]
    while inputs[-1] is None:
        inputs.pop()
    shared = {n: a.value for n, a in node.attributes.items() if n in _SHARED}
    make.replace(make.add("MultiHeadAttention", inputs, shared, domain=_DOMAIN)[0])


def _split_embedding(make: FusedNode) -> None:
    ids, segments = make.input(0), make.input(1)
    zero, one = (
        make.constant(name, np.array(i, np.int64)) for i, name in enumerate(("zero", "one"))
    )
    rows = make.one("Gather", [make.input(2), ids])
    shape = make.one("Shape", [ids])
    length = make.one("Gather", [shape, one])
    positions = make.one("Range", [zero, length, one])
    for value in (shape, length, positions):
        value.type = ir.TensorType(ir.DataType.INT64)
    total = make.one("Add", [rows, make.one("Gather", [make.input(3), positions])])
    if segments is not None and make.input(4) is not None:
        total = make.one("Add", [total, make.one("Gather", [make.input(4), segments])])
    epsilon = {"epsilon": make.node.attributes.get_float("epsilon", 1e-12), "axis": -1}
    make.replace(make.one("LayerNormalization", [total, make.input(5), make.input(6)], epsilon))


_SPLITS: Mapping[str, Callable[[FusedNode], None]] = {
    "Attention": _split_attention,
    "EmbedLayerNormalization": _split_embedding,
    "FusedGemm": _split_gemm,
    "FusedMatMul": _split_matmul,
    "MoE": split_experts,
}
