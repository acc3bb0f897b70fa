"""Bodies that look two weights up at once, for weights that all have the same bits.

What the bodies of `bodies` compute, bit for bit, in half of the time and with two thirds of the
intermediate results, which is most of what ONNX Runtime takes to fold a body. Two neighbours read
one window of ``L + k`` bits, whose value gives both. Rows of bytes stay rows: moving them as whole
dwords costs a tenth of moving single ones. Einsum, which frees what it needs on the way, undoes the
rotation and puts columns where products want them; its sums are of integers, and so exact.

Names follow ops/hyper/spec.md: P panels of 16 rows, G groups of g weights in B = g k / 8 bytes.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxcomp.passes.codecs.body import Body
from onnxcomp.passes.codecs.hyper import byte_bodies
from onnxcomp.passes.codecs.hyper.bodies import rotation_matrix
from onnxcomp.passes.codecs.hyper.format import NODE_INPUTS

__all__ = ["MINIMUM_OPSET", "Pairs", "matmul", "rows", "suits"]

# Einsum.
MINIMUM_OPSET = 12

_FLOAT = int(TensorProto.FLOAT)
_INT32 = int(TensorProto.INT32)

# Float32 holds three bytes. Larger tables than 2^14 pairs do not fit into the cache.
_MOST_BYTES = 3
_MOST_BITS = 14


def suits(opset: int, bits: int, state_bits: int) -> bool:
    """Whether a float holds the windows of two neighbours, and a small table all of their values.

    Args:
        opset: Version of the default domain in the model.
        bits: Bits per weight, k.
        state_bits: Bits of a state, L.
    """
    ends = [2 * bits * (pair + 1) for pair in range(4)]
    spans = (-(-end // 8) - (end - bits - state_bits) // 8 for end in ends)
    small = bits + state_bits <= _MOST_BITS
    return opset >= MINIMUM_OPSET and small and max(spans) <= _MOST_BYTES


class Pairs:
    """Nodes of a body that do not depend on the codes, and those that decode with them.

    Args:
        body: The body.
        bits: Bits per weight, k.
        state_bits: Bits of a state, L.
    """

    def __init__(self, body: Body, bits: int, state_bits: int) -> None:
        self._body = body
        self._by_byte = bits == byte_bodies.BITS
        self._windows = byte_bodies.window_matrix(body) if self._by_byte else self._joined(bits)
        self._values = byte_bodies.pair_values(body, bits)
        turned = body.node("Transpose", rotation_matrix(body), perm=[1, 0])
        self._rotation = body.node("Reshape", turned, body.ints(0, -1, 2))
        # Bits of the last byte above the window; a byte holds whole pairs of four bits.
        count = 1 << (bits + state_bits)
        self._count = "" if self._by_byte else body.cast(body.ints(count), _INT32)

    def _joined(self, bits: int) -> str:
        """Matrix (B, g / 2) whose product with the bytes of a group gives the window of each pair.

        The window of the second weight, moved up by its bits, meets the bytes of the first one.
        """
        body = self._body
        first, second = (
            body.node("Gather", "window", body.ints(*places), axis=1)
            for places in ((0, 2, 4, 6), (1, 3, 5, 7))
        )
        unit = numpy_helper.from_array(np.array([2.0**bits], np.float32))
        moved = body.node("Mul", second, body.node("Constant", value=unit))
        rows = body.node(
            "Gather", body.node("Max", first, moved), body.cast("taps", _INT32), axis=0
        )
        return body.node("Flatten", rows, axis=1)

    def decode(self, octets: str, equation: str) -> str:
        """Weights without their scales from bytes (..., B).

        Args:
            octets: Name of the bytes.
            equation: Of an Einsum over pairs ``hp`` behind the dimensions of the bytes, and the
                rotation ``jhp``.
        """
        body = self._body
        found = body.node("MatMul", body.cast(octets, _FLOAT), self._windows)
        states = body.cast(found, _INT32)
        if self._count:
            states = body.node("Mod", states, self._count)
        pairs = body.node("Gather", self._values, states, axis=0)
        return body.node("Einsum", pairs, self._rotation, equation=equation)


@functools.cache
def rows(opset: int, bits: int, state_bits: int) -> onnx.FunctionProto:
    """HyperRows: bytes (N, B) and scales (N, 1) -> float32 (N, g).

    Args:
        opset: Version of the default domain in the model.
        bits: Bits per weight, k.
        state_bits: Bits of a state, L.
    """
    body = Body(opset)
    values = Pairs(body, bits, state_bits).decode("octets", "nhp,jhp->nj")
    body.node("Mul", values, body.cast("factors", _FLOAT))
    return body.finish("HyperRows", ["octets", "factors", "table", *NODE_INPUTS[5:]], [])


@functools.cache
def matmul(
    opset: int, bits: int, state_bits: int, *, padded: bool, cast: bool
) -> onnx.FunctionProto:
    """HyperMatMul: x (..., length) -> (..., rows).

    Args:
        opset: Version of the default domain in the model.
        bits: Bits per weight, k.
        state_bits: Bits of a state, L.
        padded: Whether rows or columns of a weight are padded. A node less for each product counts.
        cast: Whether products compute in other types than float32.
    """
    body = Body(opset)
    lanes = body.node("Transpose", "codes", perm=[0, 3, 1, 2, 4])
    shape = body.node("Gather", "blocks", body.ints(0, 1, 2), axis=0)
    pairs = Pairs(body, bits, state_bits)
    groups = pairs.decode(body.node("Reshape", lanes, shape), "nghp,jhp->gjn")
    factors = body.node("Transpose", "scales", perm=[1, 3, 0, 2])
    factors = body.cast(body.node("Reshape", factors, body.ints(0, 0, -1)), _FLOAT)
    matrix = body.node("Flatten", body.node("Mul", groups, factors), axis=2)
    return byte_bodies.finished_product(body, matrix, padded=padded, cast=cast)
