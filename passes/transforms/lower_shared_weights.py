"""Find the weights that a model was trained to share, and store them as they were trained.

There are two ways to them. Where a graph looks its weights up in a memory, as the exporters of
torch write it, the memory is there, and `shared_lookups` tells the map. Where weights were
multiplied out, the graph holds dense weights that repeat the entries of a memory.
`onnxcomp.models.export` does that, and leaves a note of memories and layers in the model's
metadata, under `KEY`; with it the memory is found again, and every weight is compared with its
expansion bit by bit before anything is replaced. A weight that was changed since stays dense, with
all others of its memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs.hash.codec import HashCodec
from onnxcomp.passes.codecs.hash.format import (
    TILE,
    ChunkLayout,
    Sharing,
    chunk_signs,
    expand,
    places,
    seeds,
    to_chunks,
)
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.transforms.trained_memories import SharedLookups, mark_trained, trained_payload
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["KEY", "Layer", "Memory", "SharedWeights", "read_note", "write_note"]

log = logging.getLogger(__name__)

KEY = "onnxcomp.sharing"

# A memory is recovered from rounded products with the scales of its layers: its entries are among
# this many neighbours of the quotient.
_NEIGHBOURS = (0, 1, -1, 2, -2)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One weight that lies in a memory.

    Attributes:
        rows: Rows of the weight as it was trained.
        length: Its columns.
        base: Number of its first tile.
        scale: Factor of its entries, float32.
    """

    rows: int
    length: int
    base: int
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """A memory and the weights that lie in it.

    Attributes:
        slots: Slots of 256 entries.
        seed: Seed of rotations and signs.
        layers: The weights, each once.
        map: "fold" for slots in order, "roast" for slots hashed one by one.
    """

    slots: int
    seed: int
    layers: tuple[Layer, ...]
    map: str = "fold"

    def sharing(self, layer: Layer) -> Sharing:
        """The map of one weight."""
        rotate, sign = seeds(self.seed)
        return Sharing(self.slots if self.map == "fold" else 1, rotate, sign, layer.base)


def write_note(model: ir.Model, memories: Sequence[Memory]) -> None:
    """Record the memories in a model's metadata."""
    entry = {"version": 1, "memories": [dataclasses.asdict(memory) for memory in memories]}
    model.metadata_props[KEY] = json.dumps(entry, separators=(",", ":"))


def read_note(model: ir.Model) -> tuple[Memory, ...]:
    """The memories that a model's metadata names; empty where it names none.

    Raises:
        ModelError: The entry is damaged.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return ()
    try:
        entry = json.loads(text)
        return tuple(_memory(values) for values in entry["memories"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the metadata entry {KEY!r} is damaged: {error}",
            hint="export the model again, or remove the entry",
        ) from error


def _memory(values: Mapping[str, Any]) -> Memory:
    layers = tuple(Layer(**layer) for layer in values["layers"])
    numbers = [values["slots"], values["seed"]]
    numbers += [n for layer in layers for n in (layer.rows, layer.length, layer.base)]
    if not all(isinstance(n, int) and 0 <= n < 2**31 for n in numbers) or values["slots"] < 1:
        raise ValueError(f"sizes {numbers[:8]} are out of range")
    if not all(layer.rows and layer.length and layer.scale > 0 for layer in layers):
        raise ValueError("a layer has no size or no scale")
    spans = sorted((x.base, x.base + ChunkLayout(x.rows, x.length).tiles) for x in layers)
    if any(end > first for (_, end), (first, _) in itertools.pairwise(spans)):
        raise ValueError("layers overlap in their memory")
    kind = values.get("map", "fold")
    if kind not in ("fold", "roast"):
        raise ValueError(f"map {kind!r} is unknown")
    return Memory(values["slots"], values["seed"], layers, kind)


@dataclasses.dataclass(slots=True)
class _Uses:
    """Values of one layer beside the entries they come from.

    Attributes:
        site: Where the weight is.
        layer: What it was trained as.
        slots: Slot of every tile.
        values: Float32 ``(tiles, 256)`` without the signs.
        inside: Which of them are not padding.
    """

    site: WeightSite
    layer: Layer
    slots: Array
    values: Array
    inside: Array


class SharedWeights(GraphPass):
    """Store weights that were trained to share as they were trained."""

    name: ClassVar[str] = "shared_weights"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Where weights may be stored by hashing."""
        return bool({"auto", "hash"} & set(settings.method))

    def run(self, model: ir.Model, context: Context) -> Change:
        """``MatMul(x, W) -> HashMatMul(x, memory, ...)`` for weights whose map is known."""
        memories = read_note(model)
        weights = SharedLookups(model)
        if not memories and not weights.found:
            return Change(0, ())
        settings: Settings = context.settings
        found = find_sites(model, min_size=0, include=settings.include, exclude=settings.exclude)
        sites = list(found.sites)
        placements, notes = weights.placements(sites)
        for memory in memories:
            taken = {placement.site.name for placement in placements}
            free = [site for site in sites if site.name not in taken]
            placed = _recover(model, memory, free)
            if placed is None:
                text = f"a memory of {memory.slots} slots: its weights were changed"
                notes.append(f"{text}: they are treated as dense weights")
            placements += placed or []
        model.metadata_props.pop(KEY, None)
        if placements:
            rewrite(model, placements, portable=settings.portable)
            mark_trained(model)
        weights.remove_unused()
        for note in notes:
            log.warning("%s", note)
        return Change(len(placements), tuple(notes))


def _recover(
    model: ir.Model, memory: Memory, sites: Sequence[WeightSite]
) -> list[Placement] | None:
    """Placements of all weights of a memory; None where one of them was changed since."""
    uses: list[_Uses] = []
    for layer in memory.layers:
        taken = {use.site.name for use in uses}
        free = [site for site in sites if site.name not in taken]
        use = next(_candidates(model, memory, layer, free, uses), None)
        if use is None:
            return None
        uses.append(use)
    values = _solve(memory, uses)
    if values is None:
        return None
    return [_placement(memory, values, use) for use in uses]


def _candidates(
    model: ir.Model,
    memory: Memory,
    layer: Layer,
    sites: Sequence[WeightSite],
    others: Sequence[_Uses],
) -> Iterator[_Uses]:
    """Weights of a layer's shape that repeat their entries as it does, and as the others do."""
    geometry, sharing = ChunkLayout(layer.rows, layer.length), memory.sharing(layer)
    slots = places(geometry, sharing, memory.slots).reshape(-1)
    signs = chunk_signs(geometry, sharing).reshape(-1, 1)
    inside = to_chunks(np.ones((layer.rows, layer.length), bool), geometry).reshape(-1, TILE)
    for site in sites:
        if (site.rows, site.length, site.dtype) != (layer.rows, layer.length, "float32"):
            continue
        tiles = to_chunks(read_weight(model, site), geometry).reshape(-1, TILE)
        use = _Uses(site, layer, slots, tiles * signs, inside)
        if _consistent(memory, [*others, use]):
            yield use


def _consistent(memory: Memory, uses: Sequence[_Uses]) -> bool:
    """Whether all values of an entry are the same up to rounding, once scales are taken away."""
    low = np.full((memory.slots, TILE), np.inf)
    high = np.full((memory.slots, TILE), -np.inf)
    for use in uses:
        entries = use.values.astype(np.float64) / np.float64(np.float32(use.layer.scale))
        np.minimum.at(low, use.slots, np.where(use.inside, entries, np.inf))
        np.maximum.at(high, use.slots, np.where(use.inside, entries, -np.inf))
    used = high >= low
    spread = np.where(used, high - np.where(used, low, 0.0), 0.0)
    size = np.where(used, np.maximum(np.abs(high), np.abs(np.where(used, low, 0.0))), 0.0)
    return bool((spread <= 4e-7 * size + 1e-38).all())


def _solve(memory: Memory, uses: Sequence[_Uses]) -> Array | None:
    """Entries whose rounded products are all values bit by bit: float32 (slots, 256), or None."""
    guess = np.zeros((memory.slots, TILE), np.float32)
    for use in reversed(uses):
        scale = np.float32(use.layer.scale)
        entries = use.values / scale
        rows, columns = np.nonzero(use.inside)
        guess[use.slots[rows], columns] = entries[rows, columns]
    settled = np.zeros(guess.shape, bool)
    result = guess.copy()
    for step in _NEIGHBOURS:
        moved = guess.view(np.int32) + np.int32(step)
        trial = np.where(guess == 0, guess, moved.view(np.float32))
        right = np.ones(guess.shape, bool)
        for use in uses:
            products = trial[use.slots] * np.float32(use.layer.scale)
            same = (products == use.values) | ~use.inside
            np.logical_and.at(right, use.slots, same)
        result = np.where(right & ~settled, trial, result)
        settled |= right
    return result if settled.all() else None


def _placement(memory: Memory, values: Array, use: _Uses) -> Placement:
    """How one weight is stored, after a last comparison with its expansion."""
    geometry = ChunkLayout(use.layer.rows, use.layer.length)
    sharing = memory.sharing(use.layer)
    scale = np.array([use.layer.scale], np.float32)
    payload = trained_payload(values, scale, geometry, sharing)
    expected = to_chunks(expand(values, scale, geometry, sharing), geometry).reshape(-1, TILE)
    signs = chunk_signs(geometry, sharing).reshape(-1, 1)
    if not np.array_equal(expected * signs, use.values):
        raise AssertionError(f"weight {use.site.name!r} is not what its memory expands to")
    return Placement(use.site, HashCodec(), payload)
