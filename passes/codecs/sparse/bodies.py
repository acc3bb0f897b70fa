"""Portable form of the sparse operators: function bodies, and the nodes that call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.codecs.sparse.format import NODE_INPUTS
from onnxcomp.passes.codecs.sparse.integers import INT_INPUTS
from onnxcomp.passes.weight import DOMAIN, Attribute, Kind, WeightSite

__all__ = [
    "LEAST_OPSET",
    "emit",
    "emit_integers",
    "functions",
    "int_functions",
    "int_load_memory",
    "load_memory",
]

V = TypeVar("V")

# The operator set that has CumSum.
LEAST_OPSET = 11

_AXES_AS_INPUT = 18  # of ReduceMax
_INT32, _BOOL = int(TensorProto.INT32), int(TensorProto.BOOL)

# Bytes for each weight that the results of all nodes of the body take beside elements, how often
# elements are copied, and bytes for each weight at a time.
_KEPT, _COPIES, _WORKING = 20, 3, 8

_FLOAT = int(TensorProto.FLOAT)
_TENSOR_TYPES = {
    "float32": _FLOAT,
    "float16": int(TensorProto.FLOAT16),
    "bfloat16": int(TensorProto.BFLOAT16),
}
_INT_OPERATORS: dict[Kind, str] = {
    "matmul": "SparseIntMatMul",
    "weight": "SparseIntWeight",
    "decode": "SparseIntDecode",
}
_FORMAT = ("extent", "group", "bits", "pattern")
_KINDS = {"extent": onnx.AttributeProto.INTS, "pattern": onnx.AttributeProto.INTS}

# The same for integers: bytes for each weight, all in all and at a time.
_INT_KEPT, _INT_WORKING = 64, 12


def _counts(body: Body, table: str) -> str:
    """Kept elements of each of the 256 bytes: the largest rank, int32 (256,)."""
    if body.opset >= _AXES_AS_INPUT:
        return body.node("ReduceMax", table, body.ints(1), keepdims=0)
    return body.node("ReduceMax", table, axes=[1], keepdims=0)


def _index(body: Body) -> str:
    """Places of all elements that a mask says of, 0 for those that are not kept: (rows, B, lanes).

    int32, from the values `mask` and `ranks` of the function.
    """
    codes, table = body.cast("mask", _INT32), body.cast("ranks", _INT32)
    local = body.node("Gather", table, codes, axis=0)
    counts = body.node("Gather", _counts(body, table), codes, axis=0)
    column = body.node("Reshape", counts, body.ints(0, 0, 1))
    flat = body.node("Reshape", column, body.ints(-1))
    before = body.node("CumSum", flat, body.node("Squeeze", body.ints(0)), exclusive=1)
    starts = body.node("Reshape", before, body.node("Shape", column))
    index = body.node("Add", local, starts)
    absent = body.node("Sub", local, local)
    return body.node("Where", body.cast(local, _BOOL), index, absent)


def _weight(opset: int) -> onnx.FunctionProto:
    """SparseWeight: mask, values, ... -> (rows, length) in the type of the values."""
    body = Body(opset)
    picked = body.node("Gather", "values", _index(body), axis=0)
    lines = body.node("Reshape", picked, body.ints(0, -1))
    body.node("Slice", lines, body.ints(0, 0), "extent", body.ints(0, 1))
    return body.finish("SparseWeight", NODE_INPUTS, ("extent",))


def _decode(opset: int) -> onnx.FunctionProto:
    """SparseDecode: the same as SparseWeight."""
    body = Body(opset)
    refs = {"extent": ("extent", onnx.AttributeProto.INTS)}
    body.node("SparseWeight", *NODE_INPUTS, domain=DOMAIN, refs=refs)
    return body.finish("SparseDecode", NODE_INPUTS, ("extent",), calls=True)


def functions(opset: int) -> Sequence[onnx.FunctionProto]:
    """Bodies of the operators that keep every bit; none before `LEAST_OPSET`."""
    return () if opset < LEAST_OPSET else (_weight(opset), _decode(opset))


def emit(builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind) -> V:
    """Put a payload into the graph as one operator of spec.md section 3."""
    roles = {key.split(".")[1]: key for key in payload.shared} | {k: k for k in payload.tensors}
    inputs = [builder.tensor(roles[name]) for name in NODE_INPUTS]
    attributes: dict[str, Attribute] = {"extent": (site.rows, site.length)}
    operator = "SparseDecode" if kind == "decode" else "SparseWeight"
    return builder.node(operator, inputs, attributes, domain=DOMAIN)


def load_memory(site: WeightSite) -> LoadMemory:
    """Memory to fold one operator's body: what stays until the pass is over, and what does not."""
    elements = _COPIES * (4 if site.dtype == "float32" else 2)
    return LoadMemory((_KEPT + elements) * site.size, _WORKING * site.size)


def _values(body: Body) -> str:
    """All codes as float32, the zero in front among them."""
    column = body.node("Reshape", body.cast("codes", _INT32), body.ints(-1, 1))
    half = body.node("Div", "base", body.cast(body.ints(2), _INT32))
    raised = body.node("Add", body.node("Div", column, "steps"), half)
    whole = body.node("Mul", body.node("Div", raised, "base"), "base")
    signed = body.node("Sub", body.node("Sub", raised, whole), half)
    return body.cast(body.node("Reshape", signed, body.ints(-1)), _FLOAT)


def _int_weight(opset: int) -> onnx.FunctionProto:
    """SparseIntWeight: mask, codes, scales, ... -> float32 (rows, length)."""
    body = Body(opset)
    picked = body.node("Gather", _values(body), _index(body), axis=0)
    lines = body.node("Reshape", picked, body.ints(0, -1))
    sizes = [body.node("Gather", "blocks", body.ints(place), axis=0) for place in (1, 2)]
    width = body.node("Mul", *sizes)
    whole = body.node("Slice", lines, body.ints(0), width, body.ints(1))
    groups = body.node("Reshape", whole, "blocks")
    scaled = body.node("Mul", groups, body.cast("scales", _FLOAT))
    flat = body.node("Reshape", scaled, body.ints(0, -1))
    body.node("Slice", flat, body.ints(0, 0), "extent", body.ints(0, 1))
    return body.finish("SparseIntWeight", INT_INPUTS, _FORMAT)


def _call_int_weight(body: Body) -> str:
    refs = {name: (name, _KINDS.get(name, onnx.AttributeProto.INT)) for name in _FORMAT}
    return body.node("SparseIntWeight", *INT_INPUTS, domain=DOMAIN, refs=refs)


def _int_decode(opset: int) -> onnx.FunctionProto:
    """SparseIntDecode: the same as SparseIntWeight."""
    body = Body(opset)
    _call_int_weight(body)
    return body.finish("SparseIntDecode", INT_INPUTS, _FORMAT, calls=True)


def _int_matmul(opset: int) -> onnx.FunctionProto:
    """SparseIntMatMul: x (..., length) -> (..., rows)."""
    body = Body(opset)
    weight = body.node("Transpose", _call_int_weight(body), perm=[1, 0])
    product = body.node("MatMul", body.cast("x", _FLOAT), weight)
    body.node("Cast", product, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = (*_FORMAT, "dtype", "precision")
    return body.finish("SparseIntMatMul", ("x", *INT_INPUTS), attributes, calls=True)


def int_functions(opset: int) -> Sequence[onnx.FunctionProto]:
    """Bodies of the operators for integers; none before `LEAST_OPSET`."""
    return (
        () if opset < LEAST_OPSET else (_int_weight(opset), _int_decode(opset), _int_matmul(opset))
    )


def emit_integers(
    builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
) -> V:
    """Put a payload into the graph as one operator of spec.md section 6."""
    roles = {key.split(".")[1]: key for key in payload.shared} | {k: k for k in payload.tensors}
    inputs = [builder.tensor(roles[name]) for name in INT_INPUTS]
    attributes: dict[str, Attribute] = {
        name: payload.attributes[name] for name in ("group", "bits", "pattern")
    }
    attributes["extent"] = (site.rows, site.length)
    if kind == "matmul" and x is not None:
        attributes["dtype"] = _TENSOR_TYPES[site.dtype]
        attributes["precision"] = payload.attributes.get("precision", 0)
        inputs = [x, *inputs]
    result = builder.node(_INT_OPERATORS[kind], inputs, attributes, domain=DOMAIN)
    if kind == "matmul" or site.dtype == "float32":
        return result
    return builder.node("Cast", [result], {"to": _TENSOR_TYPES[site.dtype]})


def int_load_memory(site: WeightSite) -> LoadMemory:
    """Memory to fold one operator's body: what stays until the pass is over, and what does not."""
    return LoadMemory(_INT_KEPT * site.size, _INT_WORKING * site.size, 4 * site.size)
