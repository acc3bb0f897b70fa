"""One encoded weight, and how far it is from the dense one."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.lowering.row_parts import row_bounds, some_rows
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, Shift, WeightSite, release_pages

__all__ = ["EncodedWeight", "decoding_error", "weight_error"]

# Lines and elements of a line that are compared at a time when an error is measured. Both matrices
# are read in pieces that stay in the cache, whichever way they lie in memory.
_LINES, _ELEMENTS = 128, 256

# Elements between two rows of a matrix that is read by columns: a line of the cache.
_GAP = 16

# Bytes in float32 of weights that are decoded as a whole for that: what stays in the cache as well.
_WHOLE = 1 << 22

# Bytes of a weight that are compared before its pages are given back.
_RELEASED = 1 << 24


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedWeight:
    """How one weight was encoded.

    Attributes:
        site: The weight.
        choice: What the plan says about it.
        payload: What is stored; None when the weight stays as it is.
        error: Measured relative Frobenius error of the decoded weight; 0 when it stays.
        reason: Why the weight stays as it is; empty when it does not.
        output_error: Relative error of its products on held-out inputs; None where not measured.
        note: What calibration, or the comparison with another codec, has to say about it.
        shift: What is added to the offset of its products, so that their means stay; None for
            nothing.
    """

    site: WeightSite
    choice: Choice
    payload: Payload | None
    error: float = 0.0
    reason: str = ""
    output_error: float | None = None
    note: str = ""
    shift: Shift | None = None

    @property
    def placement(self) -> Placement | None:
        """What to wire into the graph; None when the weight stays as it is."""
        if self.payload is None:
            return None
        codec, choice = CODECS[self.choice.codec], self.choice
        return Placement(
            self.site, codec, self.payload, choice.mode, choice.params, shift=self.shift
        )

    def dense(self, reason: str) -> EncodedWeight:
        """The weight as it is, for this reason."""
        return EncodedWeight(self.site, self.choice, None, reason=reason)


def weight_error(weight: Array, decoded: Array) -> float:
    """Relative Frobenius error ``|decoded - weight| / |weight|`` in float64.

    Args:
        weight: Float32 ``(rows, length)``.
        decoded: The same shape.

    Returns:
        The error; 0 for two zero matrices, infinity when only `weight` is zero.
    """
    return _relative(*_powers(weight, decoded))


def decoding_error(weight: Array, codec: Codec, site: WeightSite, payload: Payload) -> float:
    """`weight_error` of what a payload decodes to; a large one is decoded in parts of its rows.

    Args:
        weight: ``(rows, length)`` in any floating-point type.
        codec: What encoded it.
        site: Where it lives.
        payload: What is stored.
    """
    cut = codec.row_parts
    if cut is None or 4 * site.size <= _WHOLE or len(site.shape) != 2:
        # The weight and its decoded form are not held in full at the same time.
        release_pages(weight)
        single = weight.astype(np.float32, copy=False)
        return weight_error(single, codec.decode(site, payload))
    unit = cut.unit(site, payload)
    step = max(1, _WHOLE // (4 * site.length * unit)) * unit
    noise = power = 0.0
    for start, stop in row_bounds(site.rows, step):
        part, _ = cut.part(site, payload, start, stop)
        decoded = codec.decode(some_rows(site, stop - start), part)
        found = _powers(weight[start:stop].astype(np.float32, copy=False), _spaced(decoded))
        noise, power = noise + found[0], power + found[1]
    release_pages(weight)
    return _relative(noise, power)


def _spaced(matrix: Array) -> Array:
    """A copy whose rows are apart by no power of two: its columns stay in the cache."""
    rows, length = matrix.shape
    spaced = np.empty((rows, length + _GAP), matrix.dtype)[:, :length]
    spaced[...] = matrix
    return spaced


def _powers(weight: Array, decoded: Array) -> tuple[float, float]:
    """Sums of the squares of errors and of elements."""
    noise = power = 0.0
    if weight.strides[0] < weight.strides[1]:  # in the order of memory
        weight, decoded = weight.T, decoded.T
    lines, length = weight.shape
    left = _RELEASED
    for first in range(0, lines, _LINES):
        rows = slice(first, first + _LINES)
        for start in range(0, length, _ELEMENTS):
            columns = slice(start, start + _ELEMENTS)
            exact = weight[rows, columns].astype(np.float64)
            power += float(np.square(exact).sum())
            exact -= decoded[rows, columns]
            noise += float(np.square(exact, out=exact).sum())
        left -= _LINES * length * weight.itemsize
        if left <= 0:
            release_pages(weight)
            left = _RELEASED
    return noise, power


def _relative(noise: float, power: float) -> float:
    if power == 0.0:
        return 0.0 if noise == 0.0 else float("inf")
    return float(np.sqrt(noise / power))
