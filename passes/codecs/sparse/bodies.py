"""Portable form of the sparse operators: function bodies, and the nodes that call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.codecs.sparse.format import NODE_INPUTS
from onnxcomp.passes.weight import DOMAIN, Attribute, Kind, WeightSite

__all__ = ["LEAST_OPSET", "emit", "functions", "load_memory"]

V = TypeVar("V")

# The operator set that has CumSum.
LEAST_OPSET = 11

_AXES_AS_INPUT = 18  # of ReduceMax
_INT32, _BOOL = int(TensorProto.INT32), int(TensorProto.BOOL)

# Bytes for each weight that the results of all nodes of the body take beside elements, how often
# elements are copied, and bytes for each weight at a time.
_KEPT, _COPIES, _WORKING = 15, 3, 8


def _counts(body: Body, table: str) -> str:
    """Kept elements of each of the 256 bytes: the largest rank, int32 (256,)."""
    if body.opset >= _AXES_AS_INPUT:
        return body.node("ReduceMax", table, body.ints(1), keepdims=0)
    return body.node("ReduceMax", table, axes=[1], keepdims=0)


def _weight(opset: int) -> onnx.FunctionProto:
    """SparseWeight: mask, values, ... -> (rows, length) in the type of the values."""
    body = Body(opset)
    codes, table = body.cast("mask", _INT32), body.cast("ranks", _INT32)
    local = body.node("Gather", table, codes, axis=0)
    counts = body.node("Gather", _counts(body, table), codes, axis=0)
    column = body.node("Reshape", counts, body.ints(0, 0, 1))
    flat = body.node("Reshape", column, body.ints(-1))
    before = body.node("CumSum", flat, body.node("Squeeze", body.ints(0)), exclusive=1)
    starts = body.node("Reshape", before, body.node("Shape", column))
    index = body.node("Add", local, starts)
    absent = body.node("Sub", local, local)
    index = body.node("Where", body.cast(local, _BOOL), index, absent)
    picked = body.node("Gather", "values", index, axis=0)
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
    """Bodies of the sparse operators for models of this opset; none before `LEAST_OPSET`."""
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
