"""Rounding to integers in blocks: by value, and by GPTQ; and how the integers are packed.

Source of GPTQ: Frantar et al., arXiv 2210.17323, here without reordering of columns, with the scale
of each block taken from its values as earlier blocks have left them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["Grid", "Integers", "gptq", "nibbles", "rounded", "unpacked"]

# Elements that are worked on at a time, in float64: some arrays of them fit the cache.
_CHUNK = 1 << 14


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """The integers a block may take.

    Attributes:
        bits: Bits of an integer.
        block: Weights that share a scale.
        zero_points: Whether the range of a block need not be symmetric about zero.
        scale_type: Type that scales are stored in.
    """

    bits: int
    block: int
    zero_points: bool
    scale_type: np.dtype[Any]

    @property
    def top(self) -> int:
        """The largest integer."""
        return int(2**self.bits - 1)

    def fit(self, values: Array) -> tuple[Array, Array]:
        """Scale and zero point ``(..., 1)`` of blocks ``(..., width)`` in float64.

        Zero is always on the grid. A block of zeros has scale and zero point 0. Without zero points
        the value of largest magnitude gets the integer 0, whatever its sign, as ONNX Runtime does.
        """
        low = np.minimum(values.min(axis=-1, keepdims=True), 0.0)
        high = np.maximum(values.max(axis=-1, keepdims=True), 0.0)
        if self.zero_points:
            scale = self._stored((high - low) / self.top)
            zero = np.rint(np.divide(-low, scale, out=np.zeros_like(low), where=scale != 0))
            return scale, np.clip(zero, 0, self.top)
        half = 2.0 ** (self.bits - 1)
        scale = self._stored(np.where(high > -low, high, low) / -half)
        return scale, np.where(scale == 0, 0.0, half)

    def _stored(self, scale: Array) -> Array:
        return np.asarray(scale.astype(self.scale_type).astype(np.float64))

    def codes(self, values: Array, scale: Array, zero: Array) -> Array:
        """The nearest integers, in float64; all arguments broadcast."""
        shape = np.broadcast_shapes(values.shape, scale.shape)
        steps = np.divide(values, scale, out=np.zeros(shape), where=scale != 0)
        return np.asarray(np.clip(np.rint(steps) + zero, 0, self.top))


@dataclasses.dataclass(frozen=True, slots=True)
class Integers:
    """A weight on a grid: ``(codes - zeros) * scales``.

    Attributes:
        codes: uint8 ``(rows, blocks, block)``; what is beyond the weight's length decodes to zero.
        scales: ``(rows, blocks)`` in the grid's type.
        zeros: uint8 ``(rows, blocks)``.
    """

    codes: Array
    scales: Array
    zeros: Array

    @classmethod
    def empty(cls, rows: int, blocks: int, grid: Grid) -> Integers:
        """Room for a weight of this extent."""
        return cls(
            np.zeros((rows, blocks, grid.block), np.uint8),
            np.zeros((rows, blocks), grid.scale_type),
            np.zeros((rows, blocks), np.uint8),
        )

    def decode(self, length: int) -> Array:
        """The weight ``(rows, length)`` in float32: exact integers, rounded once by the scale."""
        steps = self.codes.astype(np.float32)
        steps -= self.zeros[..., None].astype(np.float32)
        steps *= self.scales[..., None].astype(np.float32)
        return steps.reshape(len(self.codes), -1)[:, :length]


def rounded(weight: Array, grid: Grid) -> Integers:
    """Round each value of ``(rows, length)`` to the nearest integer of its block."""
    rows, length = weight.shape
    blocks = -(-length // grid.block)
    result = Integers.empty(rows, blocks, grid)
    step = max(1, _CHUNK // (blocks * grid.block))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = np.pad(weight[part].astype(np.float64), [(0, 0), (0, -length % grid.block)])
        values = values.reshape(-1, blocks, grid.block)
        scale, zero = grid.fit(values)
        result.codes[part] = grid.codes(values, scale, zero)
        result.scales[part], result.zeros[part] = scale[..., 0], zero[..., 0]
    return result


def gptq(weight: Array, grid: Grid, moments: Array) -> Integers:
    """Round column after column, and let the columns to come make up for each error.

    Args:
        weight: ``(rows, length)``.
        grid: The integers of a block.
        moments: Second moments of the inputs, positive definite, float64 ``(length, length)``.
    """
    rows, length = weight.shape
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    left = weight.astype(np.float64)
    result = Integers.empty(rows, -(-length // grid.block), grid)
    for number, start in enumerate(range(0, length, grid.block)):
        stop = min(start + grid.block, length)
        scale, zero = grid.fit(left[:, start:stop])
        result.codes[:, number] = zero
        errors = np.empty((rows, stop - start))
        for column in range(start, stop):
            value = left[:, column : column + 1]
            code = grid.codes(value, scale, zero)
            result.codes[:, number, column - start] = code[:, 0]
            error = (value - (code - zero) * scale) / upper[column, column]
            left[:, column + 1 : stop] -= error * upper[column, column + 1 : stop]
            errors[:, column - start] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
        result.scales[:, number], result.zeros[:, number] = scale[:, 0], zero[:, 0]
    return result


def nibbles(codes: Array) -> Array:
    """Two integers below 16 in a byte, the first in the low half, along the last axis."""
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return np.asarray(padded[..., 0::2] | (padded[..., 1::2] << 4), np.uint8)


def unpacked(packed: Array, count: int) -> Array:
    """Inverse of `nibbles` for `count` integers."""
    split = np.stack([packed & 15, packed >> 4], axis=-1)
    return split.reshape(*packed.shape[:-1], -1)[..., :count]
