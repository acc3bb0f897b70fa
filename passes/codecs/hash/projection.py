"""Projection of a trained weight on hashed sharing: which memory, and which codes, fit it best.

Everything works on the chunks of `hash_format.to_chunks`, as ``(chunks, chunk)``.
"""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.codecs.hash.format import (
    ChunkLayout,
    Sharing,
    chunk_signs,
    places,
    to_chunks,
    to_matrix,
)
from onnxcomp.passes.weight import Array

__all__ = ["CANDIDATES", "least_squares", "match", "mean"]

# Slots that a code can choose from; the lowest bit of a code is a sign.
CANDIDATES = 128

# Rounds of choosing codes and averaging: the error falls by less than 1 % in later ones.
_ROUNDS = 4

# Products of chunks with candidates that are in memory at a time.
_AT_ONCE = 1 << 15

_STEPS = 60
_ENOUGH = 1e-4


def _flat(weight: Array, geometry: ChunkLayout) -> Array:
    """The weight in chunks ``(chunks, chunk)``, float64."""
    return to_chunks(np.asarray(weight, np.float64), geometry).reshape(-1, geometry.chunk)


def _inside(geometry: ChunkLayout) -> Array:
    """1 for elements of the weight and 0 for padding, as ``(chunks, chunk)``."""
    return _flat(np.ones((geometry.rows, geometry.length)), geometry)


def _scatter(values: Array, slots: Array, signs: Array, count: int) -> Array:
    """Sum signed chunks by slot: float64 ``(count, chunk)``."""
    total = np.zeros((count, values.shape[1]))
    np.add.at(total, slots, values * signs[:, None])
    return total


def mean(
    weight: Array, geometry: ChunkLayout, sharing: Sharing, slots: int, codes: Array | None = None
) -> Array:
    """The memory with the least error of the weight: means over the uses of each entry.

    Args:
        weight: ``(rows, length)``.
        geometry: Its sizes.
        sharing: The map.
        slots: Slots of the memory.
        codes: uint8 (P, B, Q), or None.

    Returns:
        float64 ``(slots, chunk)``; 0 for entries that nothing uses.
    """
    place = places(geometry, sharing, slots, codes).reshape(-1)
    signs = chunk_signs(geometry, sharing, codes).reshape(-1).astype(np.float64)
    total = _scatter(_flat(weight, geometry), place, signs, slots)
    uses = _scatter(_inside(geometry), place, np.ones_like(signs), slots)
    return np.asarray(total / np.maximum(uses, 1.0))


def match(
    weight: Array, geometry: ChunkLayout, sharing: Sharing, slots: int
) -> tuple[Array, Array]:
    """Memory and codes: chunks choose among `CANDIDATES` slots with either sign, memory follows.

    Args:
        weight: ``(rows, length)``.
        geometry: Its sizes.
        sharing: The map; without hashed signs.
        slots: Slots of the memory.

    Returns:
        float64 ``(slots, chunk)`` and uint8 (P, B, Q).
    """
    chunks = _flat(weight, geometry)
    first = places(geometry, sharing, slots).reshape(-1)
    memory = _seed_memory(chunks, slots)
    codes = np.zeros(len(chunks), np.uint8)
    shape = (geometry.panels, geometry.blocks, geometry.parts)
    for _ in range(_ROUNDS):
        codes = _choose(chunks, memory, first, sharing.stride)
        memory = _kept(mean(weight, geometry, sharing, slots, codes.reshape(shape)), memory)
    return memory, codes.reshape(shape)


def _seed_memory(chunks: Array, slots: int) -> Array:
    """Chunks of the weight itself, evenly spaced and of typical size."""
    at = np.linspace(0, len(chunks) - 1, slots).astype(np.int64)
    return chunks[at].copy()


def _kept(memory: Array, before: Array) -> Array:
    """Slots that nobody chose stay what they were, so that they can be chosen next time."""
    unused = ~memory.any(axis=1)
    memory[unused] = before[unused]
    return memory


def _choose(chunks: Array, memory: Array, first: Array, stride: int) -> Array:
    """Codes of the nearest candidates: the largest ``2 |<w, m>| - |m|^2``."""
    slots, count = len(memory), min(CANDIDATES, len(memory))
    steps = np.arange(count, dtype=np.int64) * stride
    values = memory.astype(np.float32)
    norms = np.einsum("sc,sc->s", values, values)
    codes = np.empty(len(chunks), np.uint8)
    for begin in range(0, len(chunks), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        place = (first[part, None] + steps) % slots
        products = np.einsum(
            "nc,nsc->ns", chunks[part].astype(np.float32), values[place], optimize=True
        )
        gain = 2.0 * np.abs(products) - norms[place]
        best = np.argmax(gain, axis=1)
        minus = products[np.arange(len(best)), best] < 0
        codes[part] = (2 * best + minus).astype(np.uint8)
    return codes


def least_squares(
    weight: Array,
    geometry: ChunkLayout,
    sharing: Sharing,
    memory: Array,
    moments: Array,
    codes: Array | None = None,
    lack: Array | None = None,
) -> Array:
    """The memory with the least error of the products: conjugate gradients from a starting point.

    Minimises ``E |W x_ref - W' x|^2``, W' the expanded memory. The normal matrix is never formed:
    one step multiplies the weight's shape by G and sums over the uses of each entry.

    Args:
        weight: ``(rows, length)``.
        geometry: Its sizes.
        sharing: The map.
        memory: Starting point, ``(slots, chunk)``.
        moments: ``G = E[x x^T]``, positive definite, float64 ``(length, length)``.
        codes: uint8 (P, B, Q), or None.
        lack: ``W E[(x_ref - x) x^T]``, with the inputs x_ref for which the weight's products are
            aimed at; None where they are the same.

    Returns:
        float64 ``(slots, chunk)``.
    """
    slots = len(memory)
    wide = np.asarray(weight, np.float64)
    place = places(geometry, sharing, slots, codes).reshape(-1)
    signs = chunk_signs(geometry, sharing, codes).reshape(-1).astype(np.float64)

    def expand(values: Array) -> Array:
        return to_matrix(values[place] * signs[:, None], geometry)

    def collect(matrix: Array) -> Array:
        return _scatter(_flat(matrix, geometry), place, signs, slots)

    diagonal = np.broadcast_to(np.diag(moments), weight.shape)
    scale = _scatter(_flat(diagonal, geometry), place, np.ones_like(signs), slots)
    scale[scale == 0] = 1.0
    found = memory.astype(np.float64)
    asked = (wide - expand(found)) @ moments
    residual = collect(asked if lack is None else asked + lack)
    start = float(np.sqrt(np.sum(residual**2 / scale)))
    search = residual / scale
    power = float(np.sum(residual * search))
    for _ in range(_STEPS):
        if power <= (_ENOUGH * start) ** 2:
            break
        image = collect(expand(search) @ moments)
        step = power / float(np.sum(search * image))
        found = found + step * search
        residual = residual - step * image
        fresh = residual / scale
        power, last = float(np.sum(residual * fresh)), power
        search = fresh + (power / last) * search
    return np.asarray(found)
