"""Sums of outer products of vectors: float32 products, float64 sums."""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Array

__all__ = ["add_products", "mirror"]

# Columns that are mirrored at a time.
_BLOCK = 512


def add_products(
    total: Array, a: Array, b: Array, *, lower: bool = False, threads: int = 1
) -> None:
    """Add ``a.T @ b``; the result does not depend on the threads.

    Args:
        total: float64 ``(p, q)``, or ``(groups, p, q)`` for products within groups.
        a: float32 ``(n, p)`` or ``(n, groups, p)``.
        b: float32 ``(n, q)`` or ``(n, groups, q)``.
        lower: Whether values above the diagonal may be left out.
        threads: Threads of the native code, where that is there.
    """
    if total.ndim > 2:
        total += np.matmul(a.transpose(1, 2, 0), b.transpose(1, 0, 2))
    elif native.available():
        native.add_moments(total, a, b, lower=lower, threads=threads)
    else:
        total += a.T @ b


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
