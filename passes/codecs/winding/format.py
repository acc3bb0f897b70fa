"""Storage format of the winding codec in numpy: the executable form of ops/winding/spec.md.

Two weights are a point of the plane, and a point is stored as a number: where a trajectory on the
torus, a winding, is after that many steps. From Hyper-Compression (Fan et al., arXiv 2409.00592)
and the program its authors published, whose trajectory is the closed one called `sheared` here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = [
    "GRIDS",
    "NODE_INPUTS",
    "OCTET",
    "PairLayout",
    "Trajectory",
    "decode",
    "pack",
    "positions",
    "shared_keys",
    "shared_tensors",
    "trajectory",
    "unpack",
]

# Codes packed together: eight codes of B bits are B bytes.
OCTET = 8

# sheared: the rational direction of the published program, m by m points, each turn one row on.
# pi: directions 1 / (pi + 1) and 1 / (pi + 2), irrational, as in the paper.
# lattice: the closed trajectory whose points are farthest apart.
GRIDS = ("sheared", "pi", "lattice")

# Names of the inputs of every operator, in the order of spec.md section 3.
NODE_INPUTS = (
    *("codes", "scales", "centre", "spans", "generator", "sizes"),
    *("window", "count", "extent"),
)

# Steps of an irrational trajectory are rounded to this part of the torus.
_FINE = 2**31

# Blocks decoded at a time: bounds the memory of `decode` beyond its result.
_CHUNK = 1 << 15


@dataclasses.dataclass(frozen=True, slots=True)
class Trajectory:
    """A winding of the torus: after step i it is at ``(i * generator mod order) / order``.

    Attributes:
        points: Steps that are used, U.
        generator: What one step adds to each coordinate.
        order: The whole torus.
    """

    points: int
    generator: tuple[int, int]
    order: int


def _shortest(generator: int, order: int) -> int:
    """Squared length of the shortest vector of the lattice ``(1, generator) mod order``."""
    a, b = (1, generator), (0, order)
    while True:
        if a[0] * a[0] + a[1] * a[1] > b[0] * b[0] + b[1] * b[1]:
            a, b = b, a
        norm = a[0] * a[0] + a[1] * a[1]
        turns = round((a[0] * b[0] + a[1] * b[1]) / norm)
        if turns == 0:
            return norm
        b = (b[0] - turns * a[0], b[1] - turns * a[1])


@functools.cache
def trajectory(grid: str, points: int) -> Trajectory:
    """The winding of a grid with that many points.

    Raises:
        ValueError: There is no such grid.
    """
    if grid == "sheared":
        side = math.isqrt(points - 1) + 1
        return Trajectory(points, (1, side), side * side)
    if grid == "pi":
        steps = (round(_FINE / (math.pi + k)) for k in (1, 2))
        return Trajectory(points, (next(steps), next(steps)), _FINE)
    if grid == "lattice":
        best = max(range(1, points // 2 + 1), key=lambda g: _shortest(g, points), default=1)
        return Trajectory(points, (1, best), points)
    raise ValueError(f"grid {grid!r} is unknown")


@dataclasses.dataclass(frozen=True, slots=True)
class PairLayout:
    """Sizes that follow from the parameters and the extent of one weight.

    Attributes:
        pair_bits: Bits of a pair's code, B.
        classes: Classes of outliers beside the box, M.
        group: Weights with one scale; 0 for one scale for all.
        rows: Rows of the weight.
        length: Columns of the weight.
    """

    pair_bits: int
    classes: int
    group: int
    rows: int
    length: int

    @property
    def size(self) -> int:
        """Weights."""
        return self.rows * self.length

    @property
    def groups(self) -> int:
        """Groups, G."""
        return -(-self.size // self.group) if self.group else 1

    @property
    def blocks(self) -> int:
        """Blocks of eight pairs in a group, n."""
        return -(-(self.group or self.size) // (2 * OCTET))

    @property
    def codes_shape(self) -> tuple[int, int, int]:
        """Shape (G, n, B) of the codes."""
        return (self.groups, self.blocks, self.pair_bits)

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Shape (G, 1, 1) of the scales."""
        return (self.groups, 1, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, centre and spans."""
        return self.groups * (self.blocks * self.pair_bits + 2) + 8 + 4 * (self.classes + 1)


def positions(path: Trajectory) -> Array:
    """Places of all indices in the unit square: float32 ``(points + 1, 2)``.

    Index 0 is the centre, index 1 + i is the point after step i.
    """
    steps = np.arange(path.points, dtype=np.int64)[:, None]
    turns = steps * np.array(path.generator, np.int64) % path.order
    places = turns.astype(np.float32) / np.float32(path.order)
    return np.concatenate([np.full((1, 2), 0.5, np.float32), places])


def pack(codes: Array, pair_bits: int) -> Array:
    """Bytes of codes: int ``(G, n * 8)`` -> uint8 ``(G, n, B)``, bits LSB first."""
    groups = len(codes)
    bits = ((codes[..., None] >> np.arange(pair_bits)) & 1).astype(np.uint8)
    octets = np.packbits(bits.reshape(groups, -1, OCTET * pair_bits), axis=-1, bitorder="little")
    return np.ascontiguousarray(octets)


def unpack(octets: Array) -> Array:
    """Inverse of `pack`: int64 ``(G, n, 8)``."""
    groups, blocks, pair_bits = octets.shape
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    bits = bits.reshape(groups, blocks, OCTET, pair_bits)
    return np.asarray(bits @ (1 << np.arange(pair_bits, dtype=np.int64)))


def _decode_blocks(octets: Array, spans: Array, centre: Array, places: Array) -> Array:
    """Weights of some groups: uint8 (G, n, B), float32 (G, M + 1) -> float32 (G, n, 8, 2)."""
    classes, index = np.divmod(unpack(octets), len(places))
    span = np.take_along_axis(spans, classes.reshape(len(spans), -1), axis=1)
    offset = (places[index] - np.float32(0.5)) * span.reshape(*classes.shape, 1)
    return np.asarray(offset + centre)


def decode(tensors: Mapping[str, Array], path: Trajectory, extent: tuple[int, int]) -> Array:
    """Decode a weight. This is the definition of spec.md section 2.

    Args:
        tensors: codes uint8 ``(G, n, B)``, scales float16 ``(G, 1, 1)``, centre float32 ``(2,)``
            and spans float32 ``(M + 1,)``.
        path: The winding.
        extent: ``(rows, length)`` of the weight.

    Returns:
        float32 ``(rows, length)``.

    Raises:
        ValueError: A code lies in a class that does not exist, or there are too few codes.
    """
    codes, centre = tensors["codes"], tensors["centre"]
    places = positions(path)
    spans = tensors["scales"].reshape(-1, 1).astype(np.float32) * tensors["spans"]
    groups, blocks, _ = codes.shape
    result = np.empty((groups, blocks, OCTET, 2), np.float32)
    if result.size < extent[0] * extent[1]:
        raise ValueError(f"codes {codes.shape} hold less than {extent} weights")
    rows, columns = (1, _CHUNK) if groups == 1 else (max(1, _CHUNK // blocks), blocks)
    try:
        for row in range(0, groups, rows):
            for column in range(0, blocks, columns):
                part = slice(row, row + rows), slice(column, column + columns)
                result[part] = _decode_blocks(codes[part], spans[part[0]], centre, places)
    except IndexError:
        raise ValueError("a code lies in a class that does not exist") from None
    return result.reshape(-1)[: extent[0] * extent[1]].reshape(extent)


def _window(pair_bits: int) -> Array:
    """Weights (B, 8) that turn the bytes of a block into codes, up to a remainder and multiples."""
    result = np.zeros((pair_bits, OCTET), np.float32)
    for index in range(OCTET):
        first, last = index * pair_bits, (index + 1) * pair_bits
        for byte in range(first // 8, -(-last // 8)):
            result[byte, index] = 2.0 ** (8 * byte - first)
    return result


def shared_keys(path: Trajectory, grid: str, geometry: PairLayout) -> dict[str, str]:
    """Key in ``payload.shared`` of every shared node input, by input name in the spec's order."""
    extent = f"{geometry.rows}x{geometry.length}"
    return {
        "generator": f"winding.generator.{grid}.{path.points}",
        "sizes": f"winding.sizes.{grid}.{path.points}.b{geometry.pair_bits}",
        "window": f"winding.window.b{geometry.pair_bits}",
        "count": f"winding.count.{geometry.size}",
        "extent": f"winding.extent.{extent}",
    }


def shared_tensors(path: Trajectory, grid: str, geometry: PairLayout) -> dict[str, Array]:
    """Shared tensors of a weight by the keys of `shared_keys`, in the spec's order."""
    sizes = (1 << geometry.pair_bits, path.points + 1, path.order)
    content = {
        "generator": np.array(path.generator, np.int64),
        "sizes": np.array(sizes, np.int64),
        "window": _window(geometry.pair_bits),
        "count": np.array([geometry.size], np.int64),
        "extent": np.array([geometry.rows, geometry.length], np.int64),
    }
    keys = shared_keys(path, grid, geometry)
    return {keys[name]: content[name] for name in keys}
