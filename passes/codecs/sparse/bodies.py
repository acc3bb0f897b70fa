"""Portable form of the sparse operators: function bodies, and the nodes that call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.codecs.sparse.format import NODE_INPUTS, shared_keys
from onnxcomp.passes.codecs.sparse.integers import INT_INPUTS
from onnxcomp.passes.codecs.sparse.masks import MaskForm
from onnxcomp.passes.weight import DOMAIN, DTYPES, Attribute, Kind, WeightSite

__all__ = [
    "LEAST_OPSET",
    "bits_of",
    "emit_integers",
    "first_values",
    "functions",
    "int_functions",
    "int_load_memory",
    "load_memory",
    "place",
]

V = TypeVar("V")

# The operator set that has CumSum.
LEAST_OPSET = 11

_AXES_AS_INPUT = 18  # of ReduceMax
_INT32, _BOOL = int(TensorProto.INT32), int(TensorProto.BOOL)
_UINT8 = int(TensorProto.UINT8)

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


def place(builder: Builder[V], site: WeightSite, mask: V, values: V, kind: Kind) -> V:
    """One operator of spec.md section 3, with what it reads as it is stored or as nodes made it."""
    keys = shared_keys(site.rows, site.length)
    inputs = [mask, values, *(builder.tensor(keys[name]) for name in NODE_INPUTS[2:])]
    attributes: dict[str, Attribute] = {"extent": (site.rows, site.length)}
    operator = "SparseDecode" if kind == "decode" else "SparseWeight"
    return builder.node(operator, inputs, attributes, domain=DOMAIN)


def bits_of(builder: Builder[V], form: MaskForm, mask: V) -> V:
    """Standard operators that make what operators read of a stored mask: `MaskForm.bits`."""
    high, wide = form.block
    width = -(-form.length // 8)
    made = mask
    if form.paired:
        made = _bits_of_pairs(builder, mask)
    elif wide > 1:
        places = builder.node("Cast", [mask], {"to": _INT32})
        spread = builder.tensor(f"sparse.spread.{wide}")
        made = builder.node("Gather", [spread, places], {"axis": 0})
    if made is not mask:
        lines = builder.node("Reshape", [made, _ints(builder, 0, -1)])
        limits = [_ints(builder, 0), _ints(builder, width), _ints(builder, 1)]
        made = builder.node("Slice", [lines, *limits])
    if form.paired or high == 1:
        return made
    apart = builder.node("Reshape", [made, _ints(builder, 0, 1, -1)])
    again = builder.node("Expand", [apart, _ints(builder, form.rows // high, high, width)])
    return builder.node("Reshape", [again, _ints(builder, form.rows, width)])


def _bits_of_pairs(builder: Builder[V], mask: V) -> V:
    """Three bytes of every two, ``(rows, B / 2, 3)``."""
    pairs = builder.node(
        "Reshape", [builder.node("Cast", [mask], {"to": _INT32}), _ints(builder, 0, -1, 2)]
    )
    parts = []
    for at, key in enumerate(("sparse.first.12", "sparse.second.12")):
        column = builder.constant(f"sparse.column.{at}", np.array(at, np.int64))
        places = builder.node("Gather", [pairs, column], {"axis": 2})
        parts.append(builder.node("Gather", [builder.tensor(key), places], {"axis": 0}))
    return builder.node("Cast", [builder.node("Add", parts)], {"to": _UINT8})


def _ints(builder: Builder[V], *numbers: int) -> V:
    key = f"sparse.ints.{'.'.join(map(str, numbers))}"
    return builder.constant(key, np.array(numbers, np.int64))


def first_values(builder: Builder[V], site: WeightSite, matrix: V, count: int, size: int) -> V:
    """What SparseWeight reads of a matrix: zero, and the first so many of its elements."""
    flat = builder.node("Reshape", [matrix, _ints(builder, -1)])
    if count < size:
        limits = [_ints(builder, number) for number in (0, count, 0)]
        flat = builder.node("Slice", [flat, *limits])
    zero = builder.constant(f"sparse.zero.{site.dtype}", np.zeros(1, DTYPES[site.dtype]))
    return builder.node("Concat", [zero, flat], {"axis": 0})


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
