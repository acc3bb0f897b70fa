"""Storage format of the codec sparse, in numpy: the definition of ops/sparse/spec.md."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.weight import Array, release_pages

__all__ = [
    "MOST_KEPT",
    "NODE_INPUTS",
    "MaskLayout",
    "block_of",
    "count_kept",
    "decode",
    "is_paired",
    "pack",
    "ranks",
    "shared_keys",
    "shared_tensors",
]

# Names of the inputs of every operator, in the order of spec.md section 3.
NODE_INPUTS = ("mask", "values", "ranks", "extent")

# The portable body counts in int32.
MOST_KEPT = 2**31 - 2

# The largest side of a block.
_WIDEST = 32

# Elements of a weight that are looked at together: bounds the memory beside it.
_PIECE = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True)
class MaskLayout:
    """Sizes that follow from the extent of a weight and what is kept of it.

    Attributes:
        rows: Rows of the weight.
        length: Columns of the weight.
        kept: Elements with a bit that is set, K.
        itemsize: Bytes of an element.
    """

    rows: int
    length: int
    kept: int
    itemsize: int

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Shape of the mask."""
        return (self.rows, -(-self.length // 8))

    @property
    def values_shape(self) -> tuple[int]:
        """Shape of the values: zero and the kept ones."""
        return (1 + self.kept,)

    @property
    def nbytes(self) -> int:
        """Bytes of mask and values."""
        return self.mask_shape[0] * self.mask_shape[1] + self.values_shape[0] * self.itemsize


def is_kept(part: Array) -> Array:
    """Which elements are kept: a negative zero is none, as masks of trainers leave many."""
    if part.itemsize == 2:  # numpy has no vector instructions for such floats
        return np.asarray(part.view(np.uint16) << 1 != 0)
    return np.asarray(part != 0)


def _row_pieces(weight: Array) -> range:
    """First rows of pieces of some rows each."""
    return range(0, len(weight), max(1, _PIECE // max(1, weight.shape[1])))


def count_kept(weight: Array) -> int:
    """Elements of a matrix in float32, float16 or bfloat16 that are not zero."""
    pieces, count = _row_pieces(weight), 0
    for row in pieces:
        count += int(np.count_nonzero(is_kept(weight[row : row + pieces.step])))
        release_pages(weight)
    return count


def is_paired(weight: Array) -> bool:
    """Whether at most two of every four elements of a row ``(rows, length)`` are not zero."""
    pieces = _row_pieces(weight)
    for row in pieces:
        kept = is_kept(weight[row : row + pieces.step])
        fours = np.pad(kept, ((0, 0), (0, -kept.shape[1] % 4))).reshape(len(kept), -1, 4)
        if fours.sum(axis=2).max(initial=0) > 2:
            return False
    return True


def block_of(weight: Array) -> tuple[int, int]:
    """Rows and columns of the largest blocks of ``(rows, length)`` that are kept whole or not.

    Sides are powers of two up to 32 that divide those of the weight.
    """
    high, wide = (math.gcd(side, _WIDEST) for side in weight.shape)
    step = max(1, _row_pieces(weight).step // _WIDEST) * _WIDEST
    for row in range(0, len(weight), step):
        kept = is_kept(weight[row : row + step])
        while wide > 1 and not _alike(kept.reshape(len(kept), -1, wide), 2):
            wide //= 2
        while high > 1 and not _alike(kept.reshape(-1, high, kept.shape[1]), 1):
            high //= 2
        if high == wide == 1:
            break
    return high, wide


def _alike(parts: Array, axis: int) -> bool:
    return bool((parts == parts.take([0], axis)).all())


def pack(weight: Array) -> dict[str, Array]:
    """Mask and values of a matrix in its own type ``(rows, length)``."""
    pieces = _row_pieces(weight)
    masks: list[Array] = []
    values: list[Array] = [np.zeros(1, weight.dtype)]
    for row in pieces:
        part = weight[row : row + pieces.step]
        kept = is_kept(part)
        masks.append(np.packbits(kept, axis=1, bitorder="little"))
        values.append(part[kept])
    return {"mask": np.concatenate(masks), "values": np.concatenate(values)}


def decode(tensors: Mapping[str, Array], extent: tuple[int, int]) -> Array:
    """Decode a weight. This is the definition of spec.md section 2.

    Args:
        tensors: mask uint8 ``(rows, ceil(length / 8))`` and values ``(1 + K,)``.
        extent: ``(rows, length)`` of the weight.

    Returns:
        ``(rows, length)`` in the type of the values.

    Raises:
        ValueError: The tensors do not fit together.
    """
    mask, values = tensors["mask"], tensors["values"]
    rows, length = extent
    if mask.shape != (rows, -(-length // 8)):
        raise ValueError(f"mask {mask.shape} is none of a weight {extent}")
    held = np.unpackbits(mask, axis=1, bitorder="little").astype(bool)
    kept = int(np.count_nonzero(held))
    if values.shape != (1 + kept,) or held[:, length:].any():
        raise ValueError(f"values {values.shape} do not fit a mask with {kept} bits")
    result = np.full(extent, values[0], values.dtype)
    result[held[:, :length]] = values[1:]
    return result


@functools.cache
def ranks() -> Array:
    """uint8 ``(256, 8)``: how many bits 0..j of a byte are set where bit j is, else 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    found: Array = np.cumsum(bits, axis=1, dtype=np.uint8) * bits
    return found


def shared_keys(rows: int, length: int) -> dict[str, str]:
    """Key in ``payload.shared`` of every shared node input, by input name in the spec's order."""
    return {"ranks": "sparse.ranks.8", "extent": f"sparse.extent.{rows}x{length}"}


def shared_tensors(rows: int, length: int) -> dict[str, Array]:
    """Shared tensors of a weight by the keys of `shared_keys`."""
    keys = shared_keys(rows, length)
    return {keys["ranks"]: ranks(), keys["extent"]: np.array([rows, length], np.int64)}
