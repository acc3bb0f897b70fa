"""The worst slice of an output: its error along the axes that hold different things.

A detector gives boxes of hundreds of pixels beside scores below 1: an error of the whole output
that looks small may be all of the scores. So the error is taken along every axis of few elements,
slice by slice on axes of up to eight. Longer ones (anchors, classes) are cut where the scale
changes: slices whose norms follow one another within a factor of ten are judged together, since
that of the rarest class of eighty is chance. For the same reason a single slice is measured by no
less than a tenth of the scale of those that it belongs to.

What is below a millionth of the largest slice is taken for rounding and not judged. The scores of a
detector that finds nothing are not: where they can be told from the boxes beside them, they are
judged together, however small.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.verification.detections import score_columns

__all__ = ["SliceErrors", "WorstSlice"]

Array = npt.NDArray[Any]

# Longest axis that is looked at, and longest one whose slices are judged one by one.
_LONGEST, _SINGLE = 1024, 8

# Factor between neighbouring norms that begins another scale, the share of its scale that a slice
# is measured by at least, and the share of the largest norm below which a slice is empty.
_GAP, _LEAST, _EMPTY = 10.0, 0.1, 1e-6

# Elements that are converted to float64 at a time.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class WorstSlice:
    """The part of an output with the largest error.

    Attributes:
        axis: The axis it is cut along.
        indices: Where on that axis.
        rel_l2: Relative L2 difference of that part.
    """

    axis: int
    indices: tuple[int, ...]
    rel_l2: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"axis": self.axis, "indices": list(self.indices), "rel_l2": self.rel_l2}

    @property
    def text(self) -> str:
        """In words: ``axis 1: 4-83``."""
        first, last = self.indices[0], self.indices[-1]
        if len(self.indices) == 1:
            return f"axis {self.axis}: {first}"
        if len(self.indices) == last - first + 1:
            return f"axis {self.axis}: {first}-{last}"
        return f"axis {self.axis}: {len(self.indices)} of {first}-{last}"


class _Axis:
    """Sums of squares of one axis, slice by slice.

    Attributes:
        reference: Of the reference.
        difference: Of the difference.
        scores: Which slices are scores beside boxes.
    """

    def __init__(self, size: int) -> None:
        self.reference = np.zeros(size)
        self.difference = np.zeros(size)
        self.scores = np.ones(size, bool)


class SliceErrors:
    """Adds up the differences of pairs of arrays along their short axes.

    Args:
        axes: Axes that may be cut; None for all but the first, which mostly counts samples.
    """

    def __init__(self, axes: tuple[int, ...] | None = None) -> None:
        self._axes = axes
        self._sums: dict[int, _Axis | None] = {}  # None: an axis that cannot be judged

    def add(self, reference: Array, value: Array) -> None:
        """Take in one pair of arrays of one shape."""
        axes = range(1, reference.ndim) if self._axes is None else self._axes
        told = score_columns(reference)
        for axis in axes:
            if axis < reference.ndim and 1 < reference.shape[axis] <= _LONGEST:
                scores = told[1] if told is not None and told[0] == axis else None
                self._add(axis, reference, value, scores)
            else:
                self._sums[axis] = None

    def _add(self, axis: int, reference: Array, value: Array, scores: slice | None) -> None:
        size = reference.shape[axis]
        sums = self._sums.setdefault(axis, _Axis(size))
        if sums is None or len(sums.reference) != size or _is_distribution(reference, axis):
            self._sums[axis] = None
            return
        here = np.zeros(size, bool)
        here[scores or slice(0)] = True
        sums.scores &= here
        step = max(1, _CHUNK * size // max(1, reference.size))
        for start in range(0, size, step):
            part = slice(start, start + step)
            a, b = (_rows(array, axis, part) for array in (reference, value))
            known = np.isfinite(a) & np.isfinite(b)
            a, b = np.where(known, a, 0.0), np.where(known, b, 0.0)
            sums.reference[part] += np.square(a).sum(axis=1)
            sums.difference[part] += np.square(b - a).sum(axis=1)

    def worst(self) -> WorstSlice | None:
        """The worst slice over all pairs so far; None where no axis was judged."""
        found = [
            _worst(axis, sums)
            for axis, sums in self._sums.items()
            if sums is not None and sums.reference.any()
        ]
        return max((one for one in found if one is not None), key=_size, default=None)


def _size(found: WorstSlice) -> float:
    return found.rel_l2


def _rows(array: Array, axis: int, part: slice) -> Array:
    """Slices of an axis as rows, in float64."""
    chosen = np.moveaxis(array, axis, 0)[part]
    return chosen.reshape(len(chosen), -1).astype(np.float64)


def _is_distribution(array: Array, axis: int) -> bool:
    """Whether values along an axis are shares of one: they have a scale in common."""
    wide = np.asarray(array, np.float32)
    with np.errstate(all="ignore"):
        return bool((wide >= 0).all() and np.allclose(wide.sum(axis=axis), 1.0, atol=1e-2))


def _scales(norms: Array, scores: Array) -> list[Array]:
    """Indices of slices of one scale; the empty ones belong to the smallest, but for scores."""
    full = norms > _EMPTY * norms.max()
    quiet = scores & ~full
    if (scores & full).any() or not norms[quiet].any():
        quiet = np.zeros(len(norms), bool)
    order = np.flatnonzero(full)[np.argsort(norms[full], kind="stable")]
    ratios = norms[order][1:] / norms[order][:-1]
    first, *others = np.split(order, np.flatnonzero(ratios > _GAP) + 1)
    groups = [np.concatenate([np.flatnonzero(~full & ~quiet), first]), *others]
    groups += [np.flatnonzero(quiet)] if quiet.any() else []
    return [np.sort(group) for group in groups]


def _worst(axis: int, sums: _Axis) -> WorstSlice | None:
    reference, difference = sums.reference, sums.difference
    groups = _scales(np.sqrt(reference), sums.scores)
    found: list[WorstSlice] = []
    for group in groups:
        if len(reference) > _SINGLE:
            share = difference[group].sum() / reference[group].sum()
            found.append(WorstSlice(axis, tuple(map(int, group)), math.sqrt(share)))
            continue
        least = _LEAST**2 * reference[group].mean()
        shares = difference[group] / np.maximum(reference[group], least)
        index = int(np.argmax(shares))
        found.append(WorstSlice(axis, (int(group[index]),), math.sqrt(shares[index])))
    if len(reference) > _SINGLE and len(groups) == 1:
        return None  # the whole output
    return max(found, key=_size)
