"""Hashed parameter sharing in numpy: the executable form of ops/hash/spec.md.

Names: a weight is ``(rows, length)``, cut into P panels of 16 rows and B blocks of 16 columns. A
panel and a block meet in a tile of 256 weights, which is Q chunks of `chunk` weights. Chunks are
copies, up to a sign, of the slots of a memory ``(slots, chunk)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = [
    "CHUNKS",
    "LANES",
    "NODE_INPUTS",
    "TILE",
    "ChunkLayout",
    "Sharing",
    "chunk_signs",
    "expand",
    "keys_of",
    "mix",
    "places",
    "reduce",
    "seeds",
    "shared_tensors",
    "to_chunks",
    "to_matrix",
]

LANES = 16
TILE = LANES * LANES
CHUNKS = (4, 8, 16, 32, 64, 128, 256)

# Names of the weight's inputs of every operator, in the order of spec.md section 4. What comes
# after `map` serves the portable body.
NODE_INPUTS = (
    "memory",
    "scale",
    "codes",
    "map",
    "heads",
    "tails",
    "panels",
    "blocks",
    "parts",
    "extent",
)  # fmt: skip

_WORD = np.int64(2**31)  # keys and hashes are integers below it
_FACTOR, _ADDEND = np.int64(741103597), np.int64(506832693)
_ROUNDS, _HALF = 4, np.int64(2**15)
_SIGN_OFFSET = 0x1E3779B9

# End of a slice that keeps the whole axis; ONNX Runtime removes such a slice.
_NO_END = 2**63 - 1


def mix(keys: Array) -> Array:
    """Hash integers: a bijection of ``0 .. 2^31 - 1`` in which every bit depends on every bit.

    Four rounds of ``x (2 x + 1) mod 2^31``, the quadratic permutation of RC6, each followed by a
    rotation. No intermediate exceeds 2^63, so int64 tensors of any framework compute the same.

    Args:
        keys: int64 of any shape, not negative; taken modulo 2^31.

    Returns:
        int64 of the same shape, ``0 .. 2^31 - 1``.
    """
    x: Array = (np.asarray(keys, np.int64) % _WORD * _FACTOR + _ADDEND) % _WORD
    for _ in range(_ROUNDS):
        x = x * (2 * x + 1) % _WORD
        high = x // _HALF
        x = high + (x - high * _HALF) * (2 * _HALF)
    return x


def reduce(hashes: Array, count: int) -> Array:
    """Numbers ``0 .. count - 1`` from hashes, all equally often: ``hash * count div 2^31``."""
    return np.asarray(hashes, np.int64) * np.int64(count) // _WORD


def seeds(seed: int) -> tuple[int, int]:
    """The two keys that a user's seed stands for: of rotations and of signs."""
    rotate, sign = keys_of(np.array([seed % int(_WORD)], np.int64))
    return int(rotate[0]), int(sign[0])


def keys_of(seeds: Array) -> tuple[Array, Array]:
    """The keys of many seeds, int64 each; seeds are below 2^31."""
    return mix(seeds), mix(seeds + np.int64(_SIGN_OFFSET))


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Sizes of one weight in chunks.

    Attributes:
        rows: Rows of the weight.
        length: Columns of the weight.
        chunk: Weights of a chunk: a power of two from 4 to 256.
    """

    rows: int
    length: int
    chunk: int = TILE

    @property
    def panels(self) -> int:
        """P, panels of 16 rows."""
        return -(-self.rows // LANES)

    @property
    def blocks(self) -> int:
        """B, blocks of 16 columns."""
        return -(-self.length // LANES)

    @property
    def tiles(self) -> int:
        """Tiles of 16 x 16 weights, padding included."""
        return self.panels * self.blocks

    @property
    def parts(self) -> int:
        """Q, chunks of a tile."""
        return TILE // self.chunk

    @property
    def chunks(self) -> int:
        """Chunks of the weight, padding included."""
        return self.tiles * self.parts


@dataclasses.dataclass(frozen=True, slots=True)
class Sharing:
    """Which slot of the memory a chunk is a copy of.

    Attributes:
        run: Chunks of a partition: consecutive chunks that take consecutive slots. As many as
            there are slots for the map `fold`, 1 for `roast`.
        rotate: Key of the rotations, ``0 .. 2^31 - 1``.
        sign: Key of the signs; None for no signs.
        base: Number of the weight's first tile among the tiles of all weights of its memory.
        stride: Slots from one candidate of a chunk to the next, for the map `matched`.
    """

    run: int
    rotate: int
    sign: int | None
    base: int = 0
    stride: int = 0

    def array(self) -> Array:
        """The node input `map`: int64 (6,)."""
        signed = self.sign is not None
        values = (self.base, self.run, self.stride, self.rotate, self.sign or 0, int(signed))
        return np.array(values, np.int64)

    @classmethod
    def of(cls, array: Array) -> Sharing:
        """Read the node input `map`.

        Raises:
            ValueError: It is not six integers in their ranges.
        """
        if array.shape != (6,) or array.dtype != np.int64:
            raise ValueError(f"map is {array.dtype} {array.shape}, not int64 (6,)")
        base, run, stride, rotate, sign, signed = (int(value) for value in array)
        keys = 0 <= rotate < _WORD and 0 <= sign < _WORD
        if not (0 <= base < _WORD and 0 < run < _WORD and 0 <= stride < _WORD and keys):
            raise ValueError(f"map {array.tolist()} is out of range")
        if signed not in (0, 1):
            raise ValueError(f"map says {signed} for signs, must be 0 or 1")
        return cls(run, rotate, sign if signed else None, base, stride)


def _first(geometry: ChunkLayout, sharing: Sharing) -> Array:
    """Numbers of the chunks: int64 (tiles, Q)."""
    tiles = sharing.base + np.arange(geometry.tiles, dtype=np.int64)
    return tiles[:, None] * geometry.parts + np.arange(geometry.parts, dtype=np.int64)


def places(
    geometry: ChunkLayout, sharing: Sharing, slots: int, codes: Array | None = None
) -> Array:
    """Slot of every chunk: int64 (tiles, Q).

    Args:
        geometry: Sizes of the weight.
        sharing: The map.
        slots: Slots of the memory.
        codes: uint8 (P, B, Q), which candidate a chunk takes; None for the first.
    """
    chunks = _first(geometry, sharing)
    partition, offset = chunks // sharing.run, chunks % sharing.run
    rotation = reduce(mix(partition + sharing.rotate), slots) * (partition != 0)
    candidate = 0 if codes is None else codes.reshape(chunks.shape).astype(np.int64) // 2
    return np.asarray((offset + rotation + candidate * sharing.stride) % slots, np.int64)


def chunk_signs(geometry: ChunkLayout, sharing: Sharing, codes: Array | None = None) -> Array:
    """Sign of every chunk: float32 (tiles, Q), 1 or -1."""
    chunks = _first(geometry, sharing)
    negative = np.zeros(chunks.shape, np.int64)
    if sharing.sign is not None:
        tiles = chunks[:, :1] // geometry.parts
        hashed = mix(tiles + sharing.sign) // (_WORD // 2)
        negative = hashed * (chunks // sharing.run != 0)
    if codes is not None:
        negative = negative + codes.reshape(chunks.shape) % 2
    return np.asarray(1 - 2 * (negative % 2), np.float32)


def to_chunks(weight: Array, geometry: ChunkLayout) -> Array:
    """Lay a matrix ``(rows, length)`` out in chunks: (tiles, Q, chunk), padded with zeros.

    Inside a tile, 16 rows of one column are consecutive.
    """
    padded = np.zeros((geometry.panels * LANES, geometry.blocks * LANES), weight.dtype)
    padded[: geometry.rows, : geometry.length] = weight
    tiles = padded.reshape(geometry.panels, LANES, geometry.blocks, LANES).transpose(0, 2, 3, 1)
    return tiles.reshape(geometry.tiles, geometry.parts, geometry.chunk)


def to_matrix(chunks: Array, geometry: ChunkLayout) -> Array:
    """Undo `to_chunks`: ``(rows, length)``."""
    tiles = chunks.reshape(geometry.panels, geometry.blocks, LANES, LANES).transpose(0, 3, 1, 2)
    padded = tiles.reshape(geometry.panels * LANES, geometry.blocks * LANES)
    return np.ascontiguousarray(padded[: geometry.rows, : geometry.length])


def expand(
    memory: Array, scale: Array, geometry: ChunkLayout, sharing: Sharing, codes: Array | None = None
) -> Array:
    """The weight: float32 ``(rows, length)``. This is the definition of spec.md section 2.

    Args:
        memory: float32, float16 or int8 ``(slots, chunk)``.
        scale: float32 (1,).
        geometry: Sizes of the weight.
        sharing: The map.
        codes: uint8 (P, B, Q), or None.
    """
    slot = places(geometry, sharing, len(memory), codes)
    signs = chunk_signs(geometry, sharing, codes)
    values = memory[slot].astype(np.float32) * signs[..., None]
    return to_matrix(values, geometry) * np.float32(scale.reshape(()))


def _partitions(geometry: ChunkLayout, sharing: Sharing) -> tuple[Array, Array]:
    """Numbers of the weight's partitions as sums of two short lists: int64 (A, 1) and (1, B)."""
    first = sharing.base * geometry.parts // sharing.run
    last = ((sharing.base + geometry.tiles) * geometry.parts - 1) // sharing.run
    count = last - first + 1
    width = math.isqrt(count - 1) + 1
    heads = first + np.arange(-(-count // width), dtype=np.int64) * width
    return heads[:, None], np.arange(width, dtype=np.int64)[None, :]


def _ends(geometry: ChunkLayout) -> tuple[int, int]:
    """Where the padded matrix is cut. An axis without padding has no end, so nothing copies it."""
    rows = _NO_END if geometry.rows % LANES == 0 else geometry.rows
    return rows, _NO_END if geometry.length % LANES == 0 else geometry.length


def shared_tensors(geometry: ChunkLayout, sharing: Sharing) -> Mapping[str, Array]:
    """Node inputs other than memory, scale and codes, by keys that determine their content."""
    heads, tails = _partitions(geometry, sharing)
    ends = _ends(geometry)
    panels = np.arange(geometry.panels, dtype=np.int64)[:, None] * geometry.blocks
    cut = "x".join("all" if end == _NO_END else str(end) for end in ends)
    content = {
        f"hash.map.{'.'.join(map(str, sharing.array()))}": sharing.array(),
        f"hash.heads.{heads[0, 0]}.{heads.size}.{tails.size}": heads,
        f"hash.tails.{tails.size}": tails,
        f"hash.panels.{geometry.panels}.{geometry.blocks}": panels,
        f"hash.blocks.{geometry.blocks}": np.arange(geometry.blocks, dtype=np.int64)[None, :],
        f"hash.parts.{geometry.parts}": np.arange(geometry.parts, dtype=np.int64),
        f"hash.extent.{cut}": np.array(ends, np.int64),
    }
    return content
