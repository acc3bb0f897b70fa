"""Portable form of the hash operators: function bodies, and the nodes that call them.

Names follow ops/hash/spec.md: P panels and B blocks of 16, tiles of Q chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.hash.format import LANES, NODE_INPUTS, ChunkLayout
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.weight import DOMAIN, Attribute, Kind, WeightSite

__all__ = ["MINIMUM_OPSET", "emit", "functions", "load_memory"]

V = TypeVar("V")

MINIMUM_OPSET = 7

_FLOAT, _INT = int(TensorProto.FLOAT), int(TensorProto.INT64)
_TENSOR_TYPES = {
    "float32": _FLOAT,
    "float16": int(TensorProto.FLOAT16),
    "bfloat16": int(TensorProto.BFLOAT16),
}
_OPERATORS: dict[Kind, str] = {
    "matmul": "HashMatMul",
    "gather": "HashGather",
    "weight": "HashWeight",
    "decode": "HashDecode",
}
_WORD, _HALF = 2**31, 2**15
_FACTOR, _ADDEND, _ROUNDS = 741103597, 506832693, 4


def _remainder(body: Body, value: str, divisor: str) -> tuple[str, str]:
    """Quotient and remainder of integers that are not negative."""
    quotient = body.node("Div", value, divisor)
    return quotient, body.node("Sub", value, body.node("Mul", quotient, divisor))


def _mix(body: Body, keys: str) -> str:
    """`hash_format.mix`."""
    word, half, twice = body.ints(_WORD), body.ints(_HALF), body.ints(2 * _HALF)
    one, two = body.ints(1), body.ints(2)
    _, x = _remainder(body, keys, word)
    x = body.node("Add", body.node("Mul", x, body.ints(_FACTOR)), body.ints(_ADDEND))
    _, x = _remainder(body, x, word)
    for _ in range(_ROUNDS):
        x = body.node("Mul", x, body.node("Add", body.node("Mul", x, two), one))
        _, x = _remainder(body, x, word)
        high, low = _remainder(body, x, half)
        x = body.node("Add", high, body.node("Mul", low, twice))
    return x


def _moved(body: Body, partition: str) -> str:
    """1 where a partition is not the first of its memory, else 0."""
    return body.cast(body.node("Not", body.node("Equal", partition, body.ints(0))), _INT)


def _fields(body: Body) -> list[str]:
    """base, run, stride, rotate, sign, signed: int64 (1,) each."""
    return [body.node("Gather", "map", body.ints(at), axis=0) for at in range(6)]


def _rotations(body: Body, rotate: str, slots: str) -> tuple[str, str]:
    """Number of the first partition, and rotations of all partitions as a vector."""
    first = body.node("Gather", body.node("Reshape", "heads", body.ints(-1)), body.ints(0), axis=0)
    numbers = body.node("Reshape", body.node("Add", "heads", "tails"), body.ints(-1))
    hashes = _mix(body, body.node("Add", numbers, rotate))
    reduced = body.node("Div", body.node("Mul", hashes, slots), body.ints(_WORD))
    return first, body.node("Mul", reduced, _moved(body, numbers))


def _slots(body: Body, chunks: str, fields: Sequence[str], candidate: str) -> tuple[str, str]:
    """Slot of every chunk, and 1 for every chunk behind the first partition: int64 (P, B, Q)."""
    _, run, stride, rotate, _, _ = fields
    slots = body.node("Gather", body.node("Shape", "memory"), body.ints(0), axis=0)
    partition, offset = _remainder(body, chunks, run)
    first, rotations = _rotations(body, rotate, slots)
    rotation = body.node("Gather", rotations, body.node("Sub", partition, first), axis=0)
    steps = body.node("Add", offset, body.node("Mul", candidate, stride))
    _, slot = _remainder(body, body.node("Add", steps, rotation), slots)
    return slot, _moved(body, partition)


def _weight(opset: int) -> onnx.FunctionProto:
    """HashWeight: memory, scale, codes, map, ... -> float32 (rows, length)."""
    body = Body(opset)
    fields = _fields(body)
    tiles = body.node("Add", body.node("Add", "panels", "blocks"), fields[0])
    deep = body.node("Reshape", tiles, body.ints(0, 0, 1))
    chunks = body.node("Add", body.node("Mul", deep, body.node("Shape", "parts")), "parts")
    candidate, odd = _remainder(body, body.cast("codes", _INT), body.ints(2))
    slot, moved = _slots(body, chunks, fields, candidate)
    top = body.node("Div", _mix(body, body.node("Add", tiles, fields[4])), body.ints(_WORD // 2))
    hashed = body.node("Reshape", body.node("Mul", top, fields[5]), body.ints(0, 0, 1))
    _, negative = _remainder(
        body, body.node("Add", body.node("Mul", hashed, moved), odd), body.ints(2)
    )
    signs = body.node("Sub", body.ints(1), body.node("Mul", negative, body.ints(2)))
    signs = body.node("Reshape", body.cast(signs, _FLOAT), body.ints(0, 0, 0, 1))
    values = body.cast(body.node("Gather", "memory", slot, axis=0), _FLOAT)
    columns = body.node("Reshape", body.node("Mul", values, signs), body.ints(0, -1, LANES))
    padded = body.node("Flatten", body.node("Transpose", columns, perm=[0, 2, 1]), axis=2)
    body.node("Mul", body.crop(padded, (0, 1), "extent", "extent"), "scale")
    return body.finish("HashWeight", NODE_INPUTS, ["extent"])


def _call_weight(body: Body) -> str:
    refs = {"extent": ("extent", onnx.AttributeProto.INTS)}
    return body.node("HashWeight", *NODE_INPUTS, domain=DOMAIN, refs=refs)


def _decode(opset: int) -> onnx.FunctionProto:
    """HashDecode: the same as HashWeight."""
    body = Body(opset)
    _call_weight(body)
    return body.finish("HashDecode", NODE_INPUTS, ["extent"], calls=True)


def _matmul(opset: int) -> onnx.FunctionProto:
    """HashMatMul: x (..., length) -> (..., rows)."""
    body = Body(opset)
    weight = body.node("Transpose", _call_weight(body), perm=[1, 0])
    product = body.node("MatMul", body.cast("x", _FLOAT), weight)
    body.node("Cast", product, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = ["extent", "dtype", "precision"]
    return body.finish("HashMatMul", ["x", *NODE_INPUTS], attributes, calls=True)


def _gather(opset: int) -> onnx.FunctionProto:
    """HashGather: indices -> float32 indices.shape + (length,)."""
    body = Body(opset)
    body.node("Gather", _call_weight(body), "indices", axis=0)
    return body.finish("HashGather", ["indices", *NODE_INPUTS], ["extent"], calls=True)


def functions(opset: int) -> tuple[onnx.FunctionProto, ...]:
    """Bodies of the hash operators for models of this opset.

    Args:
        opset: Version of the default domain in the model, at least `MINIMUM_OPSET`.

    Returns:
        HashWeight, HashDecode, HashGather and HashMatMul; a function comes after those it calls.
    """
    if opset < MINIMUM_OPSET:
        raise ValueError(f"bodies need opset {MINIMUM_OPSET} or later, not {opset}")
    return tuple(make(opset) for make in (_weight, _decode, _gather, _matmul))


def emit(builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None) -> V:
    """Put a payload into the graph as one operator of spec.md section 4.

    Args:
        builder: Makes nodes and initializers.
        site: The weight.
        payload: Tensors by role, and shared tensors by keys ``hash.<role>....``.
        kind: Which operator.
        x: Activations (`matmul`) or indices (`gather`); None for the others.

    Returns:
        The result in the site's dtype.
    """
    tensors = {**payload.shared, **payload.tensors}
    roles = {key.split(".")[1] if "." in key else key: key for key in tensors}
    weight = [builder.tensor(roles[name]) for name in NODE_INPUTS]
    attributes: dict[str, Attribute] = {"extent": (site.rows, site.length)}
    if kind == "matmul":
        attributes["dtype"] = _TENSOR_TYPES[site.dtype]
        # Rounded activations pay with a memory of int8 only; others are products in float32.
        rounded = tensors[roles["memory"]].dtype == np.int8
        attributes["precision"] = payload.attributes.get("precision", 0) if rounded else 0
    inputs = weight if x is None else [x, *weight]
    result = builder.node(_OPERATORS[kind], inputs, attributes, domain=DOMAIN)
    if kind == "matmul" or site.dtype == "float32":
        return result
    return builder.node("Cast", [result], {"to": _TENSOR_TYPES[site.dtype]})


def load_memory(site: WeightSite, geometry: ChunkLayout, kind: Kind) -> LoadMemory:
    """Memory to fold one operator's body: what stays until the pass is over, and what does not.

    Per tile the hash of its sign, per chunk the way to its slot, and per weight the gathered,
    cast, signed, transposed, cut and scaled values.
    """
    dense = 4 * site.size
    chunks, tiles = 8 * geometry.chunks, 8 * geometry.tiles
    kept = (10 + 8 * _ROUNDS) * tiles + 20 * chunks + 7 * dense
    return LoadMemory(kept, int(2.5 * dense), dense)
