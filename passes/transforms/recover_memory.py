"""Find the entries of a memory in dense weights that repeat them, and compare every bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.codecs.hash.codec import HashCodec
from onnxcomp.passes.codecs.hash.format import (
    TILE,
    ChunkLayout,
    chunk_signs,
    expand,
    places,
    to_chunks,
)
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.transforms.sharing_note import Layer, Memory
from onnxcomp.passes.transforms.trained_memories import trained_payload
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["recover"]

# A memory is recovered from rounded products with the scales of its layers: its entries are among
# this many neighbours of the quotient.
_NEIGHBOURS = (0, 1, -1, 2, -2)


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


def recover(model: ir.Model, memory: Memory, sites: Sequence[WeightSite]) -> list[Placement] | None:
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
