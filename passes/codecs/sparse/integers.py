"""Storage format of the codec sparse+int, in numpy: the definition of ops/sparse/spec.md."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.codecs.sparse.format import ranks
from onnxcomp.passes.weight import Array

__all__ = [
    "ANY",
    "BITS",
    "GROUPS",
    "INT_INPUTS",
    "PAIRED",
    "IntLayout",
    "decode",
    "encode",
    "paired_ranks",
    "shared_keys",
    "shared_tensors",
    "two_of_four",
]

# Names of the inputs of every operator after activations, in the order of spec.md section 6.
INT_INPUTS = ("mask", "codes", "scales", "ranks", "steps", "base", "blocks", "extent")

BITS = (4, 8)
GROUPS = (64, 128, 256)

# Patterns: a bit for each of eight elements, and two of every four elements.
ANY, PAIRED = (0, 8), (2, 4)

# Which two of four elements are kept, in the order of their numbers.
_TWO_OF_FOUR = tuple(itertools.combinations(range(4), 2))

# Groups of four in a byte of the mask.
_PAIRS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class IntLayout:
    """Sizes that follow from the settings and the extent of one weight.

    Attributes:
        rows: Rows of the weight.
        length: Columns of the weight.
        bits: Bits of a code.
        group: Columns with one scale.
        paired: Whether two of every four elements are kept.
        kept: Elements that are kept of a weight that is not paired.
    """

    rows: int
    length: int
    bits: int
    group: int
    paired: bool
    kept: int

    @property
    def groups(self) -> int:
        """Groups of a row, G."""
        return -(-self.length // self.group)

    @property
    def lanes(self) -> int:
        """Elements that a byte of the mask says of."""
        return 4 * _PAIRS if self.paired else 8

    @property
    def mask_shape(self) -> tuple[int, int]:
        """Shape (rows, B) of the mask."""
        return (self.rows, -(-self.groups * self.group // self.lanes))

    @property
    def count(self) -> int:
        """Codes, K."""
        return self.rows * self.mask_shape[1] * 2 * _PAIRS if self.paired else self.kept

    @property
    def codes_shape(self) -> tuple[int]:
        """Shape of the codes, zero among them."""
        return (-(-(1 + self.count) * self.bits // 8),)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Shape (rows, G, 1) of the scales."""
        return (self.rows, self.groups, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of mask, codes and scales."""
        rows, width = self.mask_shape
        return rows * width + self.codes_shape[0] + 2 * rows * self.groups


def _padded(matrix: Array, layout: IntLayout) -> Array:
    """The matrix with zeros up to the last column that its mask says of."""
    wide = layout.mask_shape[1] * layout.lanes
    return np.pad(matrix, ((0, 0), (0, wide - layout.length)))


def _mask(held: Array, layout: IntLayout) -> Array:
    """Bytes of the mask: bool (rows, columns of the mask) -> uint8 (rows, B)."""
    if not layout.paired:
        return np.packbits(held, axis=1, bitorder="little")
    # Which of four bits are set -> the number of the pattern.
    numbers = np.zeros(16, np.int64)
    for number, pattern in enumerate(_TWO_OF_FOUR):
        numbers[sum(1 << place for place in pattern)] = number
    nibbles = held.reshape(layout.rows, -1, 4) @ np.array([1, 2, 4, 8])
    digits = numbers[nibbles].reshape(layout.rows, -1, _PAIRS)
    return np.asarray(digits @ np.array([1, 6, 36]), np.uint8)


def _held(mask: Array, layout: IntLayout) -> Array:
    """Which elements are kept: uint8 (rows, B) -> bool (rows, columns of the mask)."""
    if not layout.paired:
        return np.unpackbits(mask, axis=1, bitorder="little").astype(bool)
    table = paired_ranks() != 0
    return np.asarray(table[mask].reshape(layout.rows, -1))


def _pack(codes: Array, bits: int) -> Array:
    """Bytes of integers in two's complement, the first one in the low half."""
    if bits == 8:
        return codes.astype(np.int8).view(np.uint8)
    digits = (np.pad(codes, (0, len(codes) % 2)) & 15).astype(np.uint8)
    return np.asarray(digits[0::2] | digits[1::2] << 4)


def _unpack(packed: Array, bits: int) -> Array:
    """Inverse of `_pack`, int64; one more than there were where their number is odd."""
    if bits == 8:
        return packed.view(np.int8).astype(np.int64)
    digits = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1).astype(np.int64)
    return np.asarray((digits ^ 8) - 8)


def encode(weight: Array, held: Array, scales: Array, layout: IntLayout) -> dict[str, Array]:
    """Round the elements that are kept to the nearest codes.

    Args:
        weight: float32 ``(rows, length)``.
        held: Which elements are kept, bool ``(rows, length)``.
        scales: float16 ``(rows, G, 1)``.
        layout: Sizes; two of every four elements are kept where it says so.
    """
    most = 2 ** (layout.bits - 1) - 1
    spread = np.repeat(scales.reshape(layout.rows, -1).astype(np.float32), layout.group, axis=1)
    spread = spread[:, : layout.length]
    scaled = np.divide(weight, spread, out=np.zeros_like(weight), where=spread != 0)
    rounded = np.clip(np.rint(scaled), -most, most).astype(np.int64)
    wide = _padded(held, layout)
    if layout.paired:  # behind the last column, and in groups with fewer elements, any two
        wide = two_of_four(wide)
    codes = np.concatenate([np.zeros(1, np.int64), _padded(rounded * held, layout)[wide]])
    return {"mask": _mask(wide, layout), "codes": _pack(codes, layout.bits), "scales": scales}


def two_of_four(held: Array) -> Array:
    """Two of every four elements ``(rows, columns)``: those that are held, then the first ones."""
    fours = held.reshape(len(held), -1, 4)
    order = np.argsort(~fours, axis=-1, kind="stable")[..., :2]
    result = np.zeros_like(fours)
    np.put_along_axis(result, order, True, axis=-1)
    return result.reshape(held.shape)


def decode(tensors: Mapping[str, Array], layout: IntLayout) -> Array:
    """Decode a weight. This is the definition of spec.md section 5.

    Args:
        tensors: mask uint8 ``(rows, B)``, codes uint8 and scales float16 ``(rows, G, 1)``.
        layout: Sizes; `IntLayout.kept` is not read.

    Returns:
        float32 ``(rows, length)``.

    Raises:
        ValueError: The tensors do not fit together.
    """
    mask, codes, scales = tensors["mask"], tensors["codes"], tensors["scales"]
    if mask.shape != layout.mask_shape or scales.shape != layout.scales_shape:
        raise ValueError(f"mask {mask.shape} and scales {scales.shape} do not fit {layout}")
    held = _held(mask, layout)
    count = 1 + int(np.count_nonzero(held))
    if codes.shape != (-(-count * layout.bits // 8),):
        raise ValueError(f"codes {codes.shape} do not fit a mask with {count - 1} elements")
    dense = np.zeros(held.shape, np.float32)
    dense[held] = _unpack(codes, layout.bits)[1:count]
    padded = dense[:, : layout.groups * layout.group].reshape(layout.rows, -1, layout.group)
    wide = (padded * scales.astype(np.float32)).reshape(layout.rows, -1)
    return np.ascontiguousarray(wide[:, : layout.length])


@functools.cache
def paired_ranks() -> Array:
    """uint8 ``(256, 12)``: ranks of the elements of three groups of four; 0 from 216 on."""
    table = np.zeros((256, 4 * _PAIRS), np.uint8)
    for byte in range(len(_TWO_OF_FOUR) ** _PAIRS):
        for group in range(_PAIRS):
            pattern = _TWO_OF_FOUR[byte // len(_TWO_OF_FOUR) ** group % len(_TWO_OF_FOUR)]
            for number, place in enumerate(pattern):
                table[byte, 4 * group + place] = 2 * group + number + 1
    return table


def shared_keys(layout: IntLayout) -> dict[str, str]:
    """Key in ``payload.shared`` of every shared node input, by input name in the spec's order."""
    return {
        "ranks": f"sparse.ranks.{layout.lanes}",
        "steps": f"sparse.steps.b{layout.bits}",
        "base": f"sparse.base.b{layout.bits}",
        "blocks": f"sparse.blocks.{layout.groups}x{layout.group}",
        "extent": f"sparse.extent.{layout.rows}x{layout.length}",
    }


def shared_tensors(layout: IntLayout) -> dict[str, Array]:
    """Shared tensors of a weight by the keys of `shared_keys`."""
    content = {
        "ranks": paired_ranks() if layout.paired else ranks(),
        "steps": np.array([1] if layout.bits == 8 else [1, 16], np.int32),
        "base": np.array([2**layout.bits], np.int32),
        "blocks": np.array([0, layout.groups, layout.group], np.int64),
        "extent": np.array([layout.rows, layout.length], np.int64),
    }
    keys = shared_keys(layout)
    return {keys[name]: content[name] for name in keys}
