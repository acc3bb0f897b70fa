"""Find out how dense weights lie in a memory, where modules made by `share` were multiplied out.

A weight is cut into tiles of 16 x 16. Tiles that are equal up to sign and scale are one slot of the
memory. With the map *fold* (ops/hash/spec.md), slots come in the same order again and again. That
order says how weights follow each other. The rotations of the rounds say the seed, which is tried
out up to `SEEDS`. With the map *roast*, the order of the graph is tried, and which tiles are equal
says the seed. Nothing here is exact: whoever uses what comes out compares bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from onnxcomp.passes.codecs.hash.format import TILE, ChunkLayout, keys_of, mix, reduce, to_chunks
from onnxcomp.passes.weight import Array

__all__ = ["SEEDS", "FoundLayer", "FoundMemory", "find_memories"]

# Seeds below this are tried.
SEEDS = 1 << 20

# Layers with fewer weights are not shared, and tell too little.
_LEAST = 4096

# Cells of the grid in which normalised tiles are compared; rounding moves them by 1e-7.
_CELLS = 1 << 14

# Elements of a tile that are compared.
_FEATURES = 4

# Steps of the search for arrangements of weights, and how many arrangements are looked at.
_STEPS, _TRIES = 2000, 24

# Equal tiles that say a seed beyond doubt; rounds in which numbers of slots are estimated, and how
# many of them are tried.
_PAIRS, _ROUNDS, _NUMBERS = 8, 50, 256


@dataclasses.dataclass(frozen=True, slots=True)
class FoundLayer:
    """One weight in a memory.

    Attributes:
        name: The weight.
        geometry: Its sizes.
        base: Number of its first tile.
        ratio: Size of its entries relative to those of the memory's first weight; NaN where it has
            no whole tile in common with weights before it.
    """

    name: str
    geometry: ChunkLayout
    base: int
    ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class FoundMemory:
    """A memory, and the weights in it in the order of their tiles.

    Attributes:
        slots: Slots of 256 entries.
        seed: Seed of rotations and signs.
        layers: The weights.
        certain: How many of them are known to lie in it. The others have no whole tile.
        map: "fold" or "roast".
    """

    slots: int
    seed: int
    layers: tuple[FoundLayer, ...]
    certain: int
    map: str


@dataclasses.dataclass(slots=True)
class _Weight:
    """Tiles of one weight.

    Attributes:
        name: The weight.
        geometry: Its sizes.
        norms: Euclidean norm of each tile, with the sign of its first element.
        features: A few elements of each tile over its norm, ``(tiles, _FEATURES)``.
        ids: Number of the tile, the same for tiles that are equal up to sign and scale; -1 for
            those that reach into padding.
    """

    name: str
    geometry: ChunkLayout
    norms: Array
    features: Array
    ids: Array = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))


def find_memories(weights: Iterator[tuple[str, Array]]) -> list[FoundMemory]:
    """Memories in which weights seem to lie.

    Args:
        weights: Names and matrices ``(rows, length)`` in graph order, read one at a time.
    """
    known = [_tiles(name, matrix) for name, matrix in weights if matrix.size >= _LEAST]
    _identify(known)
    found = []
    loose = [weight for weight in known if (weight.ids < 0).all()]
    for group in _groups(known):
        order = [w for w in known if any(w is other for other in (*group, *loose))]
        tried = itertools.islice(_arrangements(group, order), _TRIES)
        memory = next(filter(None, map(_solved, tried)), None) or _scattered(group, order)
        if memory is not None:
            found.append(memory)
    return found


def _tiles(name: str, matrix: Array) -> _Weight:
    """What is needed of a weight; its values are not kept."""
    geometry = ChunkLayout(*matrix.shape)
    tiles = to_chunks(matrix, geometry).reshape(-1, TILE).astype(np.float64)
    sizes = np.sqrt(np.einsum("te,te->t", tiles, tiles))
    norms = np.where(tiles[:, 0] < 0, -sizes, sizes)
    at = np.linspace(0, TILE - 1, _FEATURES + 1).astype(np.int64)[:_FEATURES]
    features = tiles[:, at] / np.where(norms == 0, 1.0, norms)[:, None]
    inside = to_chunks(np.ones(matrix.shape, bool), geometry).reshape(-1, TILE).all(axis=1)
    return _Weight(name, geometry, np.where(inside, norms, 0.0), features)


def _identify(weights: Sequence[_Weight]) -> None:
    """Number tiles so that equal ones have equal numbers."""
    if not weights:
        return
    features = np.concatenate([weight.features for weight in weights])
    used = np.concatenate([weight.norms for weight in weights]) != 0
    # Neighbours that one grid parts are together in the other one, moved by half a cell.
    grids = [_cells(features[used], shift) for shift in (0.0, 0.5)]
    ids = np.full(len(features), -1, np.int64)
    ids[used] = _joined(*grids)
    ends = np.cumsum([len(weight.norms) for weight in weights])[:-1]
    for weight, part in zip(weights, np.split(ids, ends), strict=True):
        weight.ids = part


def _cells(features: Array, shift: float) -> Array:
    """Number of the cell of each tile."""
    cells = np.floor(features * _CELLS + shift).astype(np.int64)
    _, numbers = np.unique(cells, axis=0, return_inverse=True)
    return np.asarray(numbers.reshape(-1), np.int64)


def _joined(first: Array, second: Array) -> Array:
    """Numbers under which tiles are one that share a cell in either grid."""
    label = first.copy()
    for grid in (second, first) * 3:
        least = np.full(int(grid.max(initial=-1)) + 1, len(label), np.int64)
        np.minimum.at(least, grid, label)
        label = least[grid]
    return label


def _groups(weights: Sequence[_Weight]) -> Iterator[list[_Weight]]:
    """Weights that have tiles in common, whose tiles repeat."""
    label = list(range(len(weights)))
    owner: dict[int, int] = {}
    for number, weight in enumerate(weights):
        for tile in np.unique(weight.ids[weight.ids >= 0]).tolist():
            other = label[owner.setdefault(tile, number)]
            mine = label[number]
            if other != mine:
                label = [other if item == mine else item for item in label]
    for chosen in dict.fromkeys(label):
        group = [w for w, mine in zip(weights, label, strict=True) if mine == chosen]
        tiles = np.concatenate([weight.ids[weight.ids >= 0] for weight in group])
        if 0 < len(np.unique(tiles)) < len(tiles):
            yield group


@dataclasses.dataclass(frozen=True, slots=True)
class _Arrangement:
    """Weights in an order, and how many slots they have.

    Attributes:
        weights: In the order of their tiles.
        slots: Slots of the memory.
        certain: How many weights are known to belong together, with all that lie between them.
    """

    weights: tuple[_Weight, ...]
    slots: int
    certain: int


def _arrangements(group: Sequence[_Weight], order: Sequence[_Weight]) -> Iterator[_Arrangement]:
    """Orders in which every weight goes on where the one before it ended.

    Args:
        group: Weights that belong together.
        order: These, and weights that may lie between them, in graph order.
    """
    after = _successors(group)
    known = np.concatenate([weight.ids for weight in group])
    slots = len(np.unique(known[known >= 0]))
    steps = itertools.count()

    def extend(placed: tuple[_Weight, ...], tiles: int, missing: int) -> Iterator[_Arrangement]:
        """Arrangements that begin with those placed; so many weights with ids are missing."""
        if next(steps) > _STEPS:
            return
        rest = [weight for weight in order if all(weight is not other for other in placed)]
        if not missing:
            yield _Arrangement((*placed, *rest), slots, len(placed))
            return
        expected = after.get(int(placed[-1].ids[-1])) if placed and tiles % slots else None
        if expected is not None:
            going_on = [weight for weight in rest if int(weight.ids[0]) == expected]
            rest = going_on or [weight for weight in rest if int(weight.ids[0]) < 0]
        for weight in rest:
            left = missing - int((weight.ids >= 0).any())
            yield from extend((*placed, weight), tiles + len(weight.ids), left)

    yield from extend((), 0, len(group))


def _successors(group: Sequence[_Weight]) -> dict[int, int]:
    """The tile that follows each one most often."""
    pairs = np.concatenate([np.stack([w.ids[:-1], w.ids[1:]], axis=1) for w in group])
    pairs = pairs[(pairs >= 0).all(axis=1)]
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(counts, kind="stable")
    return {int(first): int(second) for first, second in found[order]}


def _solved(arrangement: _Arrangement) -> FoundMemory | None:
    """The memory, if rotations and signs are those of a seed; else None."""
    slots, weights = arrangement.slots, arrangement.weights[: arrangement.certain]
    ids = np.concatenate([weight.ids for weight in weights])
    slot_of, rotations = _order_of_slots(ids, slots)
    known = np.flatnonzero(ids >= 0)
    places = slot_of[ids[known]]
    if (places < 0).any() or len(rotations) < 2:
        return None
    if not np.array_equal((known % slots + rotations[known // slots]) % slots, places):
        return None
    signed = np.concatenate([weight.norms for weight in weights])
    original = signed[:slots][places] if len(signed) >= slots else signed[places]
    told = (known >= slots) & (original != 0)
    minus = np.sign(signed[known]) != np.sign(original)
    seed = _seed(slots, rotations, known[told], minus[told])
    if seed is None:
        return None
    layers = tuple(_layers(arrangement.weights, slot_of, slots))
    return FoundMemory(slots, seed, layers, arrangement.certain, "fold")


def _order_of_slots(ids: Array, slots: int) -> tuple[Array, Array]:
    """Slot of each number of a tile, and rotation of each round; -1 where they are not known.

    The first round is not rotated. What its tiles do not show, because they reach into padding,
    later rounds show.
    """
    slot_of = np.full(int(ids.max()) + 1, -1, np.int64)
    rotations = np.full(-(-len(ids) // slots), -1, np.int64)
    for number in range(len(rotations)):
        part = ids[number * slots : (number + 1) * slots]
        offsets = np.flatnonzero(part >= 0)
        if number == 0:
            rotations[number] = 0
        else:
            seen = slot_of[part[offsets]]
            shifts = (seen - offsets)[seen >= 0] % slots
            if not len(shifts):
                continue
            rotations[number] = np.bincount(shifts).argmax()
        fresh = offsets[slot_of[part[offsets]] < 0]
        slot_of[part[fresh]] = (fresh + rotations[number]) % slots
    return slot_of, rotations


def _seed(slots: int, rotations: Array, tiles: Array, minus: Array) -> int | None:
    """The smallest seed with these rotations of rounds and signs of tiles."""
    rounds = np.flatnonzero(rotations >= 0)
    rounds = rounds[rounds > 0]
    candidates = np.arange(SEEDS, dtype=np.int64)
    rotate, sign = keys_of(candidates)
    for number in rounds.tolist():
        keys = rotate[candidates] + number
        candidates = candidates[reduce(mix(keys), slots) == rotations[number]]
    for tile, negative in zip(tiles.tolist(), minus.tolist(), strict=True):
        if not len(candidates):
            return None
        keys = sign[candidates] + tile
        candidates = candidates[(mix(keys) >= 2**30) == negative]
    return int(candidates[0]) if len(candidates) else None


def _scattered(group: Sequence[_Weight], order: Sequence[_Weight]) -> FoundMemory | None:
    """The memory, if slots and signs are hashed one by one, in graph order; else None."""
    last = max(number for number, weight in enumerate(order) if (weight.ids >= 0).any())
    ids = np.concatenate([weight.ids for weight in order])
    tiles = np.flatnonzero(ids >= 0)
    _, first, number = np.unique(ids[tiles], return_index=True, return_inverse=True)
    again = np.setdiff1d(np.arange(len(tiles)), first)
    pairs = np.stack([tiles[first[number[again]]], tiles[again]], axis=1)
    pairs = pairs[pairs[:, 0] > 0]
    if len(pairs) < _PAIRS or len(first) < 2:
        return None
    rotate, _ = keys_of(np.arange(SEEDS, dtype=np.int64))
    one, other = (mix(rotate + tile) for tile in pairs[0].tolist())
    for slots in _numbers_of_slots(len(first), len(tiles)):
        seeds = np.flatnonzero(reduce(one, slots) == reduce(other, slots))
        for pair in pairs[1:].tolist():
            if not len(seeds):
                break
            left, right = (reduce(mix(rotate[seeds] + tile), slots) for tile in pair)
            seeds = seeds[left == right]
        if len(seeds):
            slot_of = np.zeros(int(ids.max()) + 1, np.int64)
            slot_of[ids[tiles]] = reduce(mix(rotate[seeds[0]] + tiles), slots) * (tiles > 0)
            layers = tuple(_layers(order, slot_of, slots))
            return FoundMemory(slots, int(seeds[0]), layers, last + 1, "roast")
    return None


def _numbers_of_slots(seen: int, tiles: int) -> Iterator[int]:
    """How many slots there may be where so many were hit, the likely numbers first."""
    most = max(1, seen)
    for _ in range(_ROUNDS):  # slots that are hit: m (1 - exp(-n / m))
        most = round(seen / -math.expm1(-tiles / most))
    missed = math.exp(-tiles / most)
    gain = 1.0 - (1.0 + tiles / most) * missed  # hits for each slot more
    spread = math.ceil(3.0 * math.sqrt(most * missed) / gain) + 1
    near = range(max(seen, most - spread), most + spread + 1)
    return iter(sorted(near, key=lambda slots: abs(slots - most))[:_NUMBERS])


def _layers(weights: Sequence[_Weight], slot_of: Array, slots: int) -> Iterator[FoundLayer]:
    """The weights with their first tiles, and the sizes of their entries."""
    sizes = np.full(slots, math.nan)
    base = 0
    for weight in weights:
        inside = weight.ids >= 0
        place, norms = slot_of[weight.ids[inside]], np.abs(weight.norms[inside])
        ratios = norms / sizes[place]
        common = ratios[np.isfinite(ratios)]
        ratio = float(np.median(common)) if len(common) else math.nan
        if base == 0:
            ratio = 1.0
        if ratio == ratio:
            sizes[place] = np.where(np.isnan(sizes[place]), norms / ratio, sizes[place])
        yield FoundLayer(weight.name, weight.geometry, base, ratio)
        base += len(weight.ids)
