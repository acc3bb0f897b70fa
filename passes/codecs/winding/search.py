"""Encoder of the winding codec: classes of outliers, and the nearest point of the trajectory.

As published (Hyper-Compression, Fan et al., arXiv 2409.00592, and its program): a square box
around the mean pair; pairs outside it are scaled into the circle within the box, by one of M
radii; M is the first of 1, 2, ... with a mean absolute error of at most 0.001, or else the best
one. Where the authors search a k-d tree, a pair's cell of the square names the few points that
can be nearest to it: as exact, and the same time for any number of points.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from onnxcomp.passes.codecs.winding.format import Trajectory, positions
from onnxcomp.passes.weight import Array

__all__ = ["GOOD_ERROR", "Cells", "Found", "constant", "encode", "nearest"]

# Mean absolute error with which the published program is content.
GOOD_ERROR = 0.001

# Distances computed at a time while the candidates of cells are found.
_CHUNK = 1 << 22

# Pairs searched at a time.
_PAIRS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Cells:
    """Which points may be nearest to a pair, by the square cell it lies in.

    Attributes:
        side: Cells along one axis.
        candidates: Indices of points, int32 ``(side * side, k)``; the last one repeated.
        places: All points, float32 ``(points + 1, 2)``.
    """

    side: int
    candidates: Array
    places: Array


@functools.lru_cache(maxsize=8)
def _cells(path: Trajectory) -> Cells:
    places = positions(path)
    side = math.isqrt(2 * len(places)) + 1
    middle = (np.arange(side) + 0.5) / side
    centres = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    # What is nearest to any place of a cell is at most a diagonal farther from the cell's centre
    # than what is nearest to that.
    diagonal = math.sqrt(2.0) / side * (1 + 1e-6)
    found: list[Array] = []
    step = max(1, _CHUNK // len(places))
    exact = places.astype(np.float64)
    for start in range(0, len(centres), step):
        gaps = centres[start : start + step, None, :] - exact[None, :, :]
        distances = np.sqrt(np.square(gaps).sum(-1))
        limit = distances.min(axis=1, keepdims=True) + diagonal
        found += [np.flatnonzero(row) for row in distances <= limit]
    width = max(map(len, found))
    padded = [np.pad(row, (0, width - len(row)), mode="edge") for row in found]
    return Cells(side, np.array(padded, np.int32), places)


def nearest(path: Trajectory, targets: Array) -> Array:
    """Index of the point nearest to each target; the smallest index of equally near ones.

    Args:
        path: The winding.
        targets: Places, float32 ``(n, 2)``; those outside the unit square are moved to its edge.

    Returns:
        int64 ``(n,)``.
    """
    cells = _cells(path)
    result = np.empty(len(targets), np.int64)
    for start in range(0, len(targets), _PAIRS):
        part = np.clip(targets[start : start + _PAIRS], 0.0, 1.0)
        place = np.minimum((part * cells.side).astype(np.int64), cells.side - 1)
        offered = cells.candidates[place[:, 0] * cells.side + place[:, 1]]
        gaps = cells.places[offered] - part[:, None, :]
        best = np.argmin(np.square(gaps).sum(-1), axis=1)
        result[start : start + len(part)] = offered[np.arange(len(part)), best]
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """Codes of pairs and what they mean.

    Attributes:
        codes: int64 ``(n,)``.
        spans: Side of the box and of the squares around the circles, float32 ``(M + 1,)``.
        error: Mean absolute error of the weights.
    """

    codes: Array
    spans: Array
    error: float


def _spans(side: float, farthest: float, used: int, classes: int) -> Array:
    """Spans of `used` radii between box and farthest pair; the classes left over repeat it."""
    steps = np.minimum(np.arange(classes + 1) / max(1, used), 1.0)
    radii = side / 2 + steps * max(0.0, farthest - side / 2)
    return np.asarray(2 * radii, np.float32)


def _classified(offsets: Array, outside: Array, spans: Array, used: int) -> Array:
    """Class of every pair: 0 inside the box, else the first radius that reaches it."""
    result = np.zeros(len(offsets), np.int64)
    radii = spans[: used + 1] / np.float32(2)
    distances = np.hypot(offsets[outside, 0], offsets[outside, 1])
    result[outside] = np.clip(np.searchsorted(radii, distances), 1, used)
    return result


def encode(path: Trajectory, offsets: Array, side: float, classes: int) -> Found:
    """Code pairs, given relative to the centre.

    Args:
        path: The winding.
        offsets: Pairs, float32 ``(n, 2)``.
        side: Side of the box.
        classes: Largest number of classes of outliers.
    """
    outside = np.abs(offsets).max(axis=1, initial=0.0) > side / 2
    inner = nearest(path, offsets / np.float32(side) + np.float32(0.5))
    farthest = float(np.hypot(offsets[:, 0], offsets[:, 1]).max(initial=0.0))
    if classes == 0 or not outside.any():
        return _judged(path, offsets, inner, np.zeros_like(inner), _spans(side, side, 0, classes))
    best: Found | None = None
    for used in range(1, classes + 1):
        spans = _spans(side, farthest, used, classes)
        found = _with_classes(path, offsets, inner, outside, spans, used)
        if best is None or found.error < best.error:
            best = found
        if found.error <= GOOD_ERROR:
            break
    assert best is not None
    return best


def _with_classes(
    path: Trajectory, offsets: Array, inner: Array, outside: Array, spans: Array, used: int
) -> Found:
    numbers = _classified(offsets, outside, spans, used)
    index = inner.copy()
    scaled = offsets[outside] / spans[numbers[outside], None] + np.float32(0.5)
    index[outside] = nearest(path, scaled)
    return _judged(path, offsets, index, numbers, spans)


def _judged(path: Trajectory, offsets: Array, index: Array, numbers: Array, spans: Array) -> Found:
    places = positions(path)
    decoded = (places[index] - np.float32(0.5)) * spans[numbers, None]
    error = float(np.abs(decoded - offsets).mean(dtype=np.float64)) if len(offsets) else 0.0
    return Found(index + numbers * len(places), spans, error)


def constant(pairs: int, classes: int) -> Found:
    """Codes of pairs that all are the centre."""
    return Found(np.zeros(pairs, np.int64), np.zeros(classes + 1, np.float32), 0.0)
