"""Sums of outer products of vectors: float32 products, float64 sums."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Array

__all__ = ["add_products", "mirror", "stripes"]

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
