"""Sums of outer products of vectors: float32 products, float64 sums."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Array, Means

__all__ = ["Moments", "add_products", "mirror", "sparse_zeros", "stripes"]

# Input vectors multiplied at a time.
_CHUNK = 4096

# Bytes from which on it matters which part of an array is in memory.
_LARGE = 1 << 24

# Columns that are mirrored at a time.
_BLOCK = 512


def add_products(
    total: Array,
    a: Array,
    b: Array,
    *,
    lower: bool = False,
    rows: slice | None = None,
    threads: int = 1,
) -> None:
    """Add ``a.T @ b``; the result does not depend on the threads.

    Args:
        total: float64 ``(p, q)``, or ``(groups, p, q)`` for products within groups.
        a: float32 ``(n, p)`` or ``(n, groups, p)``.
        b: float32 ``(n, q)`` or ``(n, groups, q)``.
        lower: Whether values above the diagonal may be left out.
        rows: Rows of `total` that are wanted, one of `stripes` or none; None for all.
        threads: Threads of the native code, where that is there.
    """
    if rows is not None and rows.start == rows.stop:
        return
    if total.ndim > 2:
        total += np.matmul(a.transpose(1, 2, 0), b.transpose(1, 0, 2))
    elif native.available():
        native.add_moments(total, a, b, lower=lower, rows=rows, threads=threads)
    else:
        total += a.T @ b


def stripes(rows: int, count: int, *, slope: float = 0.0) -> list[slice]:
    """Rows of a sum, cut for others to sum up: what comes out does not depend on the cuts.

    Args:
        rows: Rows of the sum.
        count: Stripes, at most; one where there is no native code.
        slope: How much more work the last row is than the first one, in parts of that.
    """
    blocks = -(-rows // native.MOMENTS_BLOCK) if native.available() else 1
    work = np.cumsum(1.0 + slope * (np.arange(blocks) + 0.5) / blocks)
    count = min(count, blocks)
    ends = np.searchsorted(work, work[-1] * np.arange(1, count) / count) + 1
    bounds = sorted({0, *(int(end) * native.MOMENTS_BLOCK for end in ends), rows})
    return [slice(*pair) for pair in pairwise(bound for bound in bounds if bound <= rows)]


def sparse_zeros(shape: tuple[int, ...]) -> Array:
    """Zeros in float64 of which only what is touched takes memory, in small pages.

    Of large arrays numpy asks for huge pages: half of a symmetric matrix is then as large as all
    of it.
    """
    size = 8 * math.prod(shape)
    if size < _LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float64).reshape(shape)


def mirror(square: Array) -> None:
    """Make a square matrix symmetric by what is on and below its diagonal.

    Products within groups, ``(groups, p, p)``, are symmetric as they are summed.
    """
    if square.ndim > 2:
        return
    for start in range(0, len(square), _BLOCK):
        stop = start + _BLOCK
        corner = np.tril(square[start:stop, start:stop])
        square[start:stop, start:stop] = corner + np.tril(corner, -1).T
        square[start:stop, stop:] = square[stop:, start:stop].T


class Moments:
    """Sums over input vectors.

    Args:
        shape: Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups.
        cross: Whether there is a reference model.
        reference: Whether the moments of its inputs are wanted, too.
        means: Whether means are all that is wanted; second moments are empty then.
        rows: Rows of second moments that are wanted; None for all.
        threads: Threads of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        cross: bool = False,
        reference: bool = False,
        means: bool = False,
        rows: slice | None = None,
        threads: int = 1,
    ) -> None:
        square = (0, 0) if means else (*shape, shape[-1])
        self.tokens = 0
        self.sum = np.zeros(shape)
        self.square = sparse_zeros(square)
        self.other_sum = np.zeros(shape) if cross else None
        self.cross = np.zeros(square) if cross else None
        self.reference = np.zeros(square) if reference else None
        self._threads, self._rows = threads, rows

    def add(self, x: Array, reference: Array | None) -> None:
        """Add vectors ``(n, *shape)``; `reference` holds the same ones of another model."""
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK].astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                if self.square.size:
                    self._add(self.square, part, part, lower=True)
                self.sum += part.sum(axis=0, dtype=np.float64)
                if self.cross is not None and self.other_sum is not None and reference is not None:
                    other = reference[start : start + _CHUNK].astype(np.float32, copy=False)
                    self._add(self.cross, other, part)
                    self.other_sum += other.sum(axis=0, dtype=np.float64)
                    if self.reference is not None:
                        self._add(self.reference, other, other, lower=True)
        self.tokens += len(x)

    def _add(self, total: Array, a: Array, b: Array, *, lower: bool = False) -> None:
        add_products(total, a, b, lower=lower, rows=self._rows, threads=self._threads)

    def cut(self) -> None:
        """Leave out the rows that are not wanted."""
        if self._rows is None:
            return
        self.square = self.square[self._rows]
        self.cross = None if self.cross is None else self.cross[self._rows]
        self.reference = None if self.reference is None else self.reference[self._rows]

    def join(self, others: Sequence[Moments]) -> None:
        """Take the rows of others that have been cut, all of the same vectors."""
        first = others[0]
        self.tokens, self.sum = first.tokens, first.sum.copy()
        self.other_sum = None if first.other_sum is None else first.other_sum.copy()
        for other in others:
            assert other._rows is not None
            for own, some in (
                (self.square, other.square),
                (self.cross, other.cross),
                (self.reference, other.reference),
            ):
                if own is not None and some is not None:
                    own[other._rows] = some

    def close(self, dtype: npt.DTypeLike = np.float64) -> None:
        """Turn sums into means, those of products of a type, and fill what symmetry leaves open."""
        for total in (self.sum, self.other_sum):
            if total is not None:
                total /= max(1, self.tokens)
        self.square = self._mean(self.square, dtype, lower=True)
        if self.reference is not None:
            self.reference = self._mean(self.reference, dtype, lower=True)
        if self.cross is not None:
            self.cross = self._mean(self.cross, dtype, lower=False)

    def _mean(self, total: Array, dtype: npt.DTypeLike, *, lower: bool) -> Array:
        """What is above the diagonal is not touched before there is but one matrix of the type."""
        found = total if total.dtype == dtype else np.zeros(total.shape, dtype)
        for start in range(0, len(total), _BLOCK):
            stop = start + _BLOCK
            columns = slice(None, stop if lower and total.ndim == 2 else None)
            found[start:stop, columns] = total[start:stop, columns] / max(1, self.tokens)
        if lower:
            mirror(found)
        return found

    @property
    def means(self) -> Means:
        """Means, when all is summed up."""
        return Means(self.sum, self.other_sum)

    @property
    def finite(self) -> bool:
        """Whether no NaN and no infinity went in."""
        # Products of two inputs are not larger than the larger one of their squares.
        own = np.diagonal(self.square, axis1=-2, axis2=-1)
        return bool(np.isfinite(self.sum).all() and np.isfinite(own).all())
