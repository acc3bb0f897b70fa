"""Portable form of the winding operators: function bodies, and the nodes that call them.

Names follow ops/winding/spec.md: G groups of n blocks of 8 pairs, a block in B bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.codecs.winding.format import NODE_INPUTS
from onnxcomp.passes.weight import DOMAIN, Attribute, Kind, WeightSite

__all__ = ["emit", "functions", "load_memory"]

V = TypeVar("V")

_FLOAT, _INT = int(TensorProto.FLOAT), int(TensorProto.INT64)
_TENSOR_TYPES = {"float16": int(TensorProto.FLOAT16), "bfloat16": int(TensorProto.BFLOAT16)}
_ATTRIBUTES = ("extent", "count")

# Bytes for each weight that the results of all nodes of the body take, and copies at a time.
_KEPT, _WORKING = 100, 24


def _remainder(body: Body, value: str, divisor: str) -> tuple[str, str]:
    """Quotient and remainder of integers, both towards zero."""
    quotient = body.node("Div", value, divisor)
    return quotient, body.node("Sub", value, body.node("Mul", quotient, divisor))


def _offsets(body: Body, index: str, order: str) -> str:
    """Places of indices (G, n, 8, 1), relative to the centre of the box: (G, n, 8, 2)."""
    steps = body.node("Mul", body.node("Sub", index, body.ints(1)), "generator")
    _, turns = _remainder(body, steps, order)
    places = body.node("Div", body.cast(turns, _FLOAT), body.cast(order, _FLOAT))
    half = body.node("Div", body.cast(body.ints(1), _FLOAT), body.cast(body.ints(2), _FLOAT))
    moved = body.cast(body.node("Not", body.node("Equal", index, body.ints(0))), _FLOAT)
    return body.node("Mul", body.node("Sub", places, half), moved)


def _weight(opset: int) -> onnx.FunctionProto:
    """WindingWeight: codes, scales, ... -> float32 (rows, length)."""
    body = Body(opset)
    modulus, points, order = (
        body.node("Gather", "sizes", body.ints(position), axis=0) for position in range(3)
    )
    cut = body.node("MatMul", body.cast("codes", _FLOAT), "window")
    _, codes = _remainder(body, body.cast(body.node("Floor", cut), _INT), modulus)
    classes, index = _remainder(body, codes, points)
    span = body.node("Gather", "spans", classes, axis=0)
    span = body.node("Mul", span, body.cast("scales", _FLOAT))
    deep = body.ints(0, 0, 0, 1)
    offsets = _offsets(body, body.node("Reshape", index, deep), order)
    moved = body.node("Mul", offsets, body.node("Reshape", span, deep))
    flat = body.node("Reshape", body.node("Add", moved, "centre"), body.ints(-1))
    body.node("Reshape", body.crop(flat, (0,), "count", "count"), "extent")
    return body.finish("WindingWeight", NODE_INPUTS, _ATTRIBUTES)


def _decode(opset: int) -> onnx.FunctionProto:
    """WindingDecode: the same as WindingWeight."""
    body = Body(opset)
    refs = {name: (name, onnx.AttributeProto.INTS) for name in _ATTRIBUTES}
    body.node("WindingWeight", *NODE_INPUTS, domain=DOMAIN, refs=refs)
    return body.finish("WindingDecode", NODE_INPUTS, _ATTRIBUTES, calls=True)


def functions(opset: int) -> Sequence[onnx.FunctionProto]:
    """Bodies of the winding operators for models of this opset, at least 7."""
    return (_weight(opset), _decode(opset))


def emit(builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind) -> V:
    """Put a payload into the graph as one operator of spec.md section 3."""
    roles = {key.split(".")[1]: key for key in payload.shared} | {k: k for k in payload.tensors}
    inputs = [builder.tensor(roles[name]) for name in NODE_INPUTS]
    attributes: dict[str, Attribute] = {
        "extent": (site.rows, site.length),
        "count": (site.size,),
    }
    operator = "WindingDecode" if kind == "decode" else "WindingWeight"
    result = builder.node(operator, inputs, attributes, domain=DOMAIN)
    if site.dtype == "float32":
        return result
    return builder.node("Cast", [result], {"to": _TENSOR_TYPES[site.dtype]})


def load_memory(site: WeightSite) -> LoadMemory:
    """Memory to fold one operator's body: what stays until the pass is over, and what does not."""
    return LoadMemory(_KEPT * site.size, _WORKING * site.size)
