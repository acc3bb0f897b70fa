"""Portable form of the hyperfunction operators: function bodies and the nodes that call them.

A body is written in the opset of the model it goes into, because an inlined body is checked
against the model's opset and not against the one the function declares. Where ONNX Runtime has no
kernel it inlines the body and folds it to a dense constant when the session is created. Folding
keeps every intermediate result until the pass is over, so the bodies have few large intermediates:
a byte becomes a float once, one product cuts all windows of a group, one undoes the rotation.

Names follow ops/hyper/spec.md: P panels of 16 rows, G groups of g weights in B = g k / 8 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.hyper.format import LANES, NODE_INPUTS, GroupLayout
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload
from onnxcomp.passes.weight import DOMAIN, Attribute, Kind, WeightSite

__all__ = [
    "MINIMUM_OPSET",
    "emit",
    "emit_experts",
    "functions",
    "load_bytes",
    "load_memory",
    "look_up",
    "peak_load_bytes",
    "rotation_matrix",
    "window_matrix",
]

V = TypeVar("V")

MINIMUM_OPSET = 7
_UNIQUE_OPSET = 11

_TENSOR_TYPES = {
    "float32": int(TensorProto.FLOAT),
    "float16": int(TensorProto.FLOAT16),
    "bfloat16": int(TensorProto.BFLOAT16),
}
_FLOAT = int(TensorProto.FLOAT)

# Up to seven bits of the stream lie above a window in its last byte; a table repeated 2^7 times
# does not see them.
_TABLE_REPEATS = 128

# Folding one node holds copies of its input and output beyond what stays: 1.5 (ONNX Runtime 1.31)
# to 3.6 (1.20, 1.23) times the dense weight, measured by benchmarks/bench_portable_load.py.
_FOLDING_COPIES = 2.5

_OPERATORS: dict[Kind, str] = {
    "matmul": "HyperMatMul",
    "gather": "HyperGather",
    "weight": "HyperWeight",
    "decode": "HyperDecode",
}


def window_matrix(body: Body) -> str:
    """Matrix (B, g) whose product with the bytes of a group gives its states."""
    rows = body.cast("taps", int(TensorProto.INT32))
    return body.node("Flatten", body.node("Gather", "window", rows, axis=0), axis=1)


def rotation_matrix(body: Body) -> str:
    """Matrix (g, g) that undoes the rotation of a row vector: H diag(sign) 2^-12."""
    return body.node("Flatten", body.node("Mul", "left", "right"), axis=2)


def look_up(body: Body, states: str) -> str:
    """Float values of float states; what is below or above the window falls away."""
    values = body.node("Tile", body.cast("table", _FLOAT), body.ints(_TABLE_REPEATS))
    return body.node("Gather", values, body.cast(states, int(TensorProto.INT32)), axis=0)


def _rows(opset: int) -> onnx.FunctionProto:
    """HyperRows: bytes (..., G, B) and scales (..., G, 1) -> float32 (..., G, g)."""
    body = Body(opset)
    states = body.node("MatMul", body.cast("octets", _FLOAT), window_matrix(body))
    values = body.node("MatMul", look_up(body, states), rotation_matrix(body))
    body.node("Mul", values, body.cast("factors", _FLOAT))
    return body.finish("HyperRows", ["octets", "factors", "table", *NODE_INPUTS[5:]], [])


def _call_rows(body: Body, octets: str, factors: str) -> str:
    return body.node("HyperRows", octets, factors, "table", *NODE_INPUTS[5:], domain=DOMAIN)


def _rows_of(body: Body) -> tuple[str, str]:
    """Codes as (16 P, G, B) and scales as (16 P, G, 1).

    What is large waits for `blocks`, which `lowering.stages` makes known late.
    """
    lanes = body.node("Transpose", "codes", perm=[0, 3, 1, 2, 4])
    shape = body.node("Gather", "blocks", body.ints(0, 1, 2), axis=0)
    factors = body.node("Flatten", body.node("Transpose", "scales", perm=[0, 2, 1, 3]), axis=2)
    return body.node("Reshape", lanes, shape), body.node("Reshape", factors, body.ints(0, 0, 1))


def _weight(opset: int) -> onnx.FunctionProto:
    """HyperWeight: codes, scales, ... -> float32 (rows, length)."""
    body = Body(opset)
    # No Reshape: ONNX Runtime 1.23 cannot join one whose shape is computed with one behind it.
    padded = body.node("Flatten", _call_rows(body, *_rows_of(body)), axis=1)
    body.crop(padded, (0, 1), "extent", "extent")
    return body.finish("HyperWeight", NODE_INPUTS, ["extent", "group"], calls=True)


def _decode(opset: int) -> onnx.FunctionProto:
    """HyperDecode: the same as HyperWeight."""
    body = Body(opset)
    refs = {
        "extent": ("extent", onnx.AttributeProto.INTS),
        "group": ("group", onnx.AttributeProto.INT),
    }
    body.node("HyperWeight", *NODE_INPUTS, domain=DOMAIN, refs=refs)
    return body.finish("HyperDecode", NODE_INPUTS, ["extent", "group"], calls=True)


def _matmul(opset: int) -> onnx.FunctionProto:
    """HyperMatMul: x (..., length) -> (..., rows).

    The weight is decoded transposed: moving bytes costs an eighth of moving floats.
    """
    body = Body(opset)
    columns = body.node("Transpose", "codes", perm=[1, 2, 4, 0, 3])
    shape = body.node("Gather", "blocks", body.ints(1, 2, 0), axis=0)
    octets = body.cast(body.node("Reshape", columns, shape), _FLOAT)
    windows = body.node("Transpose", window_matrix(body), perm=[1, 0])
    values = look_up(body, body.node("MatMul", windows, octets))
    rotation = body.node("Transpose", rotation_matrix(body), perm=[1, 0])
    factors = body.node("Transpose", "scales", perm=[1, 3, 0, 2])
    factors = body.cast(body.node("Reshape", factors, body.ints(0, 0, -1)), _FLOAT)
    scaled = body.node("Mul", body.node("MatMul", rotation, values), factors)
    weight = body.crop(body.node("Flatten", scaled, axis=2), (1, 0), "extent", "extent")
    product = body.node("MatMul", body.cast("x", _FLOAT), weight)
    body.node("Cast", product, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = ["extent", "group", "dtype", "precision"]
    return body.finish("HyperMatMul", ["x", *NODE_INPUTS], attributes)


def _experts(opset: int) -> onnx.FunctionProto:
    """HyperExperts: x (..., m, length) and indices -> (..., m, rows / experts).

    Bytes of the chosen matrices are picked before anything is decoded, from opset 11 on once for
    each matrix that is named. `stack` is how many matrices there are, and rows of one.
    """
    body = Body(opset)
    size = body.node("Gather", "stack", body.ints(1), axis=0)
    # What is large waits for `blocks`, whose first entry is -1.
    by_expert = body.node(
        "Concat", body.node("Gather", "blocks", body.ints(0), axis=0), "stack", axis=0
    )
    indices = body.node("Reshape", body.cast("experts", int(TensorProto.INT64)), body.ints(-1))
    places = ""
    if opset >= _UNIQUE_OPSET:
        indices, _, places = body.outputs("Unique", indices, 3)

    def picked(bytes_first: str, *target: str) -> str:
        apart = body.node("Reshape", bytes_first, by_expert)
        found = body.node("Gather", body.node("Transpose", apart, perm=[1, 0, 2]), indices, axis=0)
        shape = body.node("Concat", body.ints(-1), *target, size, axis=0)
        return body.cast(body.node("Reshape", found, shape), _FLOAT)

    width = body.node("Gather", "blocks", body.ints(2), axis=0)
    octets = picked(body.node("Transpose", "codes", perm=[1, 2, 4, 0, 3]), width)
    factors = picked(body.node("Transpose", "scales", perm=[1, 3, 0, 2]), body.ints(1))
    windows = body.node("Transpose", window_matrix(body), perm=[1, 0])
    values = look_up(body, body.node("MatMul", windows, octets))
    rotation = body.node("Transpose", rotation_matrix(body), perm=[1, 0])
    scaled = body.node("Mul", body.node("MatMul", rotation, values), factors)
    padded = body.node("Gather", "blocks", body.ints(3), axis=0)
    whole = body.node("Concat", body.ints(-1), padded, size, axis=0)
    columns = body.node("Gather", "extent", body.ints(1), axis=0)
    matrices = body.crop(body.node("Reshape", scaled, whole), (1,), columns, "columns")
    target = body.node("Shape", "experts")
    if places:
        chosen = body.node("Gather", matrices, body.node("Reshape", places, target), axis=0)
    else:
        inner = body.node("Gather", body.node("Shape", matrices), body.ints(1, 2), axis=0)
        chosen = body.node("Reshape", matrices, body.node("Concat", target, inner, axis=0))
    product = body.node("MatMul", body.cast("x", _FLOAT), chosen)
    body.node("Cast", product, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = ["extent", "group", "dtype", "precision", "experts", "columns"]
    return body.finish("HyperExperts", ["x", "experts", *NODE_INPUTS, "stack"], attributes)


def _gather(opset: int) -> onnx.FunctionProto:
    """HyperGather: indices -> float32 indices.shape + (length,).

    Rows are cut to the weight's own before the look-up, so that -1 is the last row.
    """
    body = Body(opset)
    last = {"rows": body.ints(0), "columns": body.ints(1)}
    ends = {name: body.node("Gather", "extent", at, axis=0) for name, at in last.items()}
    parts = (body.crop(part, (0,), ends["rows"], "rows") for part in _rows_of(body))
    rows = (body.node("Gather", part, "indices", axis=0) for part in list(parts))
    decoded = _call_rows(body, *rows)
    width = body.node("Gather", "blocks", body.ints(3), axis=0)
    target = body.node("Concat", body.node("Shape", "indices"), width, axis=0)
    body.crop(body.node("Reshape", decoded, target), (-1,), ends["columns"], "columns")
    attributes = ["extent", "group", "rows", "columns"]
    return body.finish("HyperGather", ["indices", *NODE_INPUTS], attributes, calls=True)


@functools.cache
def functions(opset: int) -> tuple[onnx.FunctionProto, ...]:
    """Bodies of the hyperfunction operators for models of this opset.

    Args:
        opset: Version of the default domain in the model, at least `MINIMUM_OPSET`.

    Returns:
        HyperRows, HyperWeight, HyperDecode, HyperGather, HyperMatMul and HyperExperts. A function
        comes after those it calls: `onnx.reference` resolves calls in this order. They are shared:
        copy one before changing it.
    """
    if opset < MINIMUM_OPSET:
        raise ValueError(f"bodies need opset {MINIMUM_OPSET} or later, not {opset}")
    return tuple(make(opset) for make in (_rows, _weight, _decode, _gather, _matmul, _experts))


def emit(builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None) -> V:
    """Put a payload into the graph as one operator of spec.md section 4.

    Args:
        builder: Makes nodes and initializers.
        site: The weight.
        payload: Tensors `codes` and `scales`, the shared tensors, and the attribute `group`.
        kind: Which operator.
        x: Activations (`matmul`) or indices (`gather`); None for the others.

    Returns:
        The result in the site's dtype.
    """
    weight = _weight_inputs(builder, payload)
    attributes: dict[str, Attribute] = {
        "extent": (site.rows, site.length),
        "group": payload.attributes["group"],
    }
    if kind == "matmul":
        attributes["dtype"] = _TENSOR_TYPES[site.dtype]
        attributes["precision"] = payload.attributes.get("precision", 0)
    elif kind == "gather":
        attributes |= {"rows": (site.rows,), "columns": (site.length,)}
    inputs = weight if x is None else [x, *weight]
    result = builder.node(_OPERATORS[kind], inputs, attributes, domain=DOMAIN)
    if kind == "matmul" or site.dtype == "float32":
        return result
    return builder.node("Cast", [result], {"to": _TENSOR_TYPES[site.dtype]})


def _weight_inputs(builder: Builder[V], payload: Payload) -> list[V]:
    roles = {key.split(".")[1]: key for key in payload.shared} | {k: k for k in payload.tensors}
    return [builder.tensor(roles[name]) for name in NODE_INPUTS]


def emit_experts(builder: Builder[V], site: WeightSite, payload: Payload, x: V, experts: V) -> V:
    """A product with some matrices of a stack, as HyperExperts of spec.md section 4.

    Args:
        builder: Makes nodes and initializers.
        site: The stack; rows of each matrix are whole panels.
        payload: As for `emit`.
        x: Activations ``(..., m, length)``.
        experts: Indices of any shape.

    Returns:
        The product in the site's dtype.
    """
    stack = (site.experts, site.rows // site.experts)
    sizes = builder.constant(f"hyper.stack.{stack[0]}x{stack[1]}", np.array(stack, np.int64))
    attributes: dict[str, Attribute] = {
        "extent": (site.rows, site.length),
        "group": payload.attributes["group"],
        "dtype": _TENSOR_TYPES[site.dtype],
        "precision": payload.attributes.get("precision", 0),
        "experts": site.experts,
        "columns": (site.length,),
    }
    inputs = [x, experts, *_weight_inputs(builder, payload), sizes]
    return builder.node("HyperExperts", inputs, attributes, domain=DOMAIN)


def load_bytes(site: WeightSite, geometry: GroupLayout, kind: Kind) -> int:
    """Memory that folding one operator's body keeps until the session's folding pass is over.

    The sum of the results of all its nodes that depend on constants alone, and the codes; for
    ``weight`` and ``decode`` also of the nodes that bring the matrix into the stored tensor's form.

    Args:
        site: The weight.
        geometry: Sizes of the weight as it is stored.
        kind: Which operator; ``gather`` and ``experts`` fold only what does not depend on the
            indices.
    """
    blocks = geometry.panels * geometry.groups * LANES
    codes = blocks * geometry.block_bytes
    dense = 4 * blocks * geometry.group
    rows_cut = geometry.rows % LANES != 0
    if kind == "gather":  # codes: Transpose, Reshape, Slice; scales: Transpose, Flatten, Reshape
        return (3 + rows_cut) * codes + (4 + rows_cut) * 2 * blocks
    if kind == "experts":  # both: Transpose, Reshape, Transpose
        return 3 * (codes + 2 * blocks)
    cut = rows_cut or geometry.length % geometry.group != 0
    # codes: Transpose, Reshape, Cast; scales: Transpose, Reshape, Cast
    small = (3 + 4) * codes + (3 * 2 + 4) * blocks
    # MatMul, Cast, Gather, MatMul, Mul, Flatten, and Slice
    kept = small + 6 * dense + cut * 4 * site.size
    return (
        kept
        if kind in ("matmul", "batch")
        else kept + _restoring_copies(site, geometry) * site.nbytes
    )


def _restoring_copies(site: WeightSite, geometry: GroupLayout) -> int:
    """How many nodes lie between the decoded matrix and the stored tensor."""
    cast = site.dtype != "float32"
    flat = (geometry.rows, geometry.length) != (site.rows, site.length)
    return cast + flat + site.transposed + (len(site.shape) != 2)


def load_memory(site: WeightSite, geometry: GroupLayout, kind: Kind) -> LoadMemory:
    """Memory to fold one operator's body: what stays until the pass is over, and what does not."""
    looked_up = kind in ("gather", "experts")
    dense = geometry.nbytes if looked_up else 4 * site.size
    result = 0 if looked_up else 4 * site.size
    return LoadMemory(load_bytes(site, geometry, kind), int(_FOLDING_COPIES * dense), result)


def peak_load_bytes(operators: Iterable[tuple[WeightSite, GroupLayout, Kind]]) -> int:
    """Memory that a session without the library needs, at its peak, to fold these operators.

    The results of all nodes stay until the folding pass is over; the node being folded needs more.
    What a session of any model takes (about 10 MB, and 0.2 MB for each operator) is not in it.
    """
    needs = [load_memory(*operator) for operator in operators]
    return sum(need.kept for need in needs) + max((need.working for need in needs), default=0)
