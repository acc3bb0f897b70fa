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

__all__ = ["BITS", "pair_values", "weight", "window_matrix"]

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


def pair_values(body: Body) -> str:
    """Both weights of every state of a byte, (2^(L + 4), 2).

    The first ends with the lower bits of the state, whatever the four bits above them are; the
    second is what lies above the lowest four bits.
    """
    first = body.node("Tile", body.cast("table", _FLOAT), body.ints(1 << BITS))
    square = body.node("Reshape", first, body.ints(1 << BITS, -1))
    second = body.node("Flatten", body.node("Transpose", square, perm=[1, 0]), axis=0)
    rows = body.node("Concat", body.node("Flatten", first, axis=0), second, axis=0)
    return body.node("Transpose", rows, perm=[1, 0])


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
