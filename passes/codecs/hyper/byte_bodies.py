"""Bodies for four bits per weight, which look both weights of a byte up at once.

What the bodies of `bodies` compute, bit for bit, with half of the look-ups and of the states, which
is most of what ONNX Runtime takes to fold a body. The state of a byte are the bits that the windows
of both weights meet: `2^(L + 4)` states give two weights each.

Names follow ops/hyper/spec.md: P panels of 16 rows, G groups of g weights in B = g / 2 bytes.
"""

from __future__ import annotations

import functools

import onnx
from onnx import TensorProto

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.hyper.bodies import rotation_matrix
from onnxcomp.passes.codecs.hyper.format import NODE_INPUTS

__all__ = [
    "BITS",
    "filters",
    "finished_product",
    "matmul",
    "pair_values",
    "weight",
    "window_matrix",
]

# Bits per weight that fill bytes in pairs.
BITS = 4

_FLOAT = int(TensorProto.FLOAT)
_INT32 = int(TensorProto.INT32)


def window_matrix(body: Body) -> str:
    """Matrix (B, B) whose product with the bytes of a group gives the state of each byte.

    It has every other column of that of `bodies`: the window of the first weight of a byte ends
    there with the whole byte.
    """
    first = body.node("Gather", "window", body.ints(0, 2, 4, 6), axis=1)
    rows = body.node("Gather", first, body.cast("taps", _INT32), axis=0)
    return body.node("Flatten", rows, axis=1)


def pair_values(body: Body, bits: int = BITS) -> str:
    """Both weights of every window of two, (2^(L + bits), 2).

    The first ends with the lower bits of the window, whatever the `bits` above them are; the
    second is what lies above the lowest `bits`.
    """
    first = body.node("Tile", body.cast("table", _FLOAT), body.ints(1 << bits))
    square = body.node("Reshape", first, body.ints(1 << bits, -1))
    second = body.node("Flatten", body.node("Transpose", square, perm=[1, 0]), axis=0)
    rows = body.node("Concat", body.node("Flatten", first, axis=0), second, axis=0)
    return body.node("Transpose", rows, perm=[1, 0])


def filters(body: Body) -> str:
    """The rotation of columns as filters (g, B, 1, 2) over the two weights of a byte.

    A convolution needs no copy of them in the order of the matrix. Its sums are of integers, and so
    exact.
    """
    matrix = body.node("Transpose", rotation_matrix(body), perm=[1, 0])
    return body.node("Reshape", matrix, body.ints(0, -1, 1, 2))


@functools.cache
def matmul(opset: int, *, padded: bool, cast: bool) -> onnx.FunctionProto:
    """HyperMatMul: x (..., length) -> (..., rows).

    Args:
        opset: Version of the default domain in the model.
        padded: Whether rows or columns of a weight are padded. A node less for each product counts.
        cast: Whether products compute in other types than float32.
    """
    body = Body(opset)
    columns = body.node("Transpose", "codes", perm=[1, 2, 4, 0, 3])
    shape = body.node("Gather", "blocks", body.ints(1, 2, 0), axis=0)
    octets = body.cast(body.node("Reshape", columns, shape), _FLOAT)
    windows = body.node("Transpose", window_matrix(body), perm=[1, 0])
    states = body.cast(body.node("MatMul", windows, octets), _INT32)
    pairs = body.node("Gather", pair_values(body), states, axis=0)
    factors = body.node("Transpose", "scales", perm=[1, 3, 0, 2])
    factors = body.cast(body.node("Reshape", factors, body.ints(0, 0, -1, 1)), _FLOAT)
    scaled = body.node("Mul", body.node("Conv", pairs, filters(body)), factors)
    matrix = body.node("Flatten", scaled, axis=2)
    return finished_product(body, matrix, padded=padded, cast=cast)


def finished_product(body: Body, matrix: str, *, padded: bool, cast: bool) -> onnx.FunctionProto:
    """HyperMatMul, once its weight is there.

    Args:
        body: The body.
        matrix: Name of the weight, float32 (length, rows), padded to whole groups and panels.
        padded: Whether it is. A node less for each product counts.
        cast: Whether products compute in other types than float32.
    """
    if padded:
        matrix = body.crop(matrix, (1, 0), "extent", "extent")
    product = body.node("MatMul", body.cast("x", _FLOAT) if cast else "x", matrix)
    if cast:
        body.node("Cast", product, refs={"to": ("dtype", onnx.AttributeProto.INT)})
    attributes = ["extent", "group", "dtype", "precision"]
    return body.finish("HyperMatMul", ["x", *NODE_INPUTS], attributes)


@functools.cache
def weight(opset: int) -> onnx.FunctionProto:
    """HyperWeight: codes, scales, ... -> float32 (rows, length)."""
    body = Body(opset)
    lanes = body.node("Transpose", "codes", perm=[0, 3, 1, 2, 4])
    shape = body.node("Gather", "blocks", body.ints(0, 1, 2), axis=0)
    octets = body.cast(body.node("Reshape", lanes, shape), _FLOAT)
    states = body.cast(body.node("MatMul", octets, window_matrix(body)), _INT32)
    pairs = body.node("Gather", pair_values(body), states, axis=0)
    rows = body.node("Reshape", pairs, body.ints(0, 0, -1))
    factors = body.node("Flatten", body.node("Transpose", "scales", perm=[0, 2, 1, 3]), axis=2)
    factors = body.cast(body.node("Reshape", factors, body.ints(0, 0, 1)), _FLOAT)
    scaled = body.node("Mul", body.node("MatMul", rows, rotation_matrix(body)), factors)
    body.crop(body.node("Flatten", scaled, axis=1), (0, 1), "extent", "extent")
    return body.finish("HyperWeight", NODE_INPUTS, ["extent", "group"])
