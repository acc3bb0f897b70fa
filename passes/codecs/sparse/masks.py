"""Masks of patterns, in fewer bytes than a bit for each element; ops/sparse/spec.md, section 7.

Operators read a bit for each element. Where those that are kept form a pattern, the mask is stored
by it, and standard operators make the bits, once when a session starts: `bodies.bits_of`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs.payload import Payload
from onnxcomp.passes.codecs.sparse.integers import paired_ranks, two_of_four
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["BLOCK_SIDES", "MaskForm", "can_pair", "stored_form"]

# Rows and columns that a block may have.
BLOCK_SIDES = (1, 2, 4, 8, 16, 32)

# Elements that two bytes of a mask of pairs say of: as many bits as three bytes hold.
_PAIRED = 24


def can_pair(length: int) -> bool:
    """Whether rows of this length end with a byte of bits, as a mask of pairs needs it."""
    return length % 8 == 0


@dataclasses.dataclass(frozen=True, slots=True)
class MaskForm:
    """How a mask is stored.

    Attributes:
        rows: Rows of the weight.
        length: Columns of the weight.
        paired: Whether exactly two of every four elements of a row are kept.
        block: Rows and columns of blocks that are kept as a whole or not at all; each side divides
            that of the weight.
    """

    rows: int
    length: int
    paired: bool = False
    block: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the stored mask."""
        if self.paired:
            return (self.rows, 2 * -(-self.length // _PAIRED))
        high, wide = self.block
        return (self.rows // high, -(-(self.length // wide) // 8))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored mask."""
        return math.prod(self.shape)

    def held(self, kept: Array) -> Array:
        """Elements that are stored of those that are to be kept, bool ``(rows, length)``."""
        return two_of_four(kept) if self.paired else kept

    def pack_bits(self, bits: Array) -> Array:
        """The stored mask of one with a bit for each element, the inverse of `bits`.

        Raises:
            ModelError: It has another pattern.
        """
        mask = self._pack(np.unpackbits(bits, axis=1, count=self.length, bitorder="little"))
        if not np.array_equal(self.bits(mask), bits):
            kind = "pairs" if self.paired else f"blocks of {self.block[0]} x {self.block[1]}"
            raise ModelError(f"what is not zero is not in {kind}, as was planned")
        return mask

    def _pack(self, held: Array) -> Array:
        if not self.paired:
            high, wide = self.block
            return np.packbits(held[::high, ::wide], axis=1, bitorder="little")
        width = self.shape[1]
        fours = np.zeros((self.rows, width * 3, 4), np.uint8)
        fours[..., :2] = 1  # behind the end of a row
        fours.reshape(self.rows, -1)[:, : self.length] = held
        digits = _numbers()[fours @ np.array([1, 2, 4, 8])].reshape(self.rows, width, 3)
        return np.asarray(digits @ np.array([1, 6, 36]), np.uint8)

    def bits(self, mask: Array) -> Array:
        """The mask that operators read: a bit for each element, ``(rows, ceil(length / 8))``.

        Raises:
            ValueError: The mask is none of this form.
        """
        if mask.shape != self.shape or mask.dtype != np.uint8:
            raise ValueError(f"mask {mask.dtype} {mask.shape} does not fit {self}")
        if self.paired:
            if (mask >= 216).any():
                raise ValueError("a byte of a mask of pairs is above 215")
            first, second = (table[mask[:, at::2]] for at, table in enumerate(_bytes_of_pairs()))
            spread = (first + second).astype(np.uint8)
        else:
            spread = _spread_bits(self.block[1])[mask]
        wide = spread.reshape(len(mask), -1)[:, : -(-self.length // 8)]
        return np.ascontiguousarray(np.repeat(wide, 1 if self.paired else self.block[0], axis=0))

    def shared(self) -> Mapping[str, Array]:
        """Tensors by key that nodes make the bits with: `bodies.bits_of`."""
        if self.paired:
            first, second = _bytes_of_pairs()
            return {"sparse.first.12": first, "sparse.second.12": second}
        wide = self.block[1]
        return {} if wide == 1 else {f"sparse.spread.{wide}": _spread_bits(wide)}


def stored_form(site: WeightSite, payload: Payload) -> MaskForm:
    """The form of a payload's mask, from its attributes, which may come from a file.

    Raises:
        ValueError: They do not fit the weight.
    """
    block, paired = payload.attributes.get("block", (1, 1)), payload.attributes.get("paired", 0)
    if not isinstance(block, Sequence) or isinstance(block, str) or len(block) != 2:
        raise ValueError(f"block {block} is not a pair")
    high, wide = (int(side) for side in block)
    sides = high in BLOCK_SIDES and wide in BLOCK_SIDES
    if not sides or site.rows % high or site.length % wide:
        raise ValueError(f"blocks of {high} x {wide} do not fit {site.rows} x {site.length}")
    if paired not in (0, 1) or (paired and not can_pair(site.length)):
        raise ValueError(f"a mask of pairs does not fit rows of {site.length}")
    return MaskForm(site.rows, site.length, paired == 1, (high, wide))


@functools.cache
def _numbers() -> Array:
    """int64 (16,): the number of the pattern of two of four, by which bits are set."""
    table = np.zeros(16, np.int64)
    for number, ranks in enumerate(paired_ranks()[:6, :4]):
        table[sum(1 << place for place in range(4) if ranks[place])] = number
    return table


@functools.cache
def _bytes_of_pairs() -> tuple[Array, Array]:
    """int32 (256, 3) each: what one of two bytes gives to three bytes of bits; 0 from 216 on."""
    twelve = ((paired_ranks() != 0) @ (1 << np.arange(12))).astype(np.int64)
    first, second = (np.stack([n & 255, n >> 8 & 255, n >> 16], 1) for n in (twelve, twelve << 12))
    return first.astype(np.int32), second.astype(np.int32)


@functools.cache
def _spread_bits(wide: int) -> Array:
    """uint8 (256, wide): bytes in which each bit of a byte is there `wide` times."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(np.repeat(bits, wide, axis=1), axis=1, bitorder="little")
