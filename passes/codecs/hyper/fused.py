"""Products that are added with one rounding, as processors do it, in numpy."""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["fused"]


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once.

    The product is exact in float64. The sum is rounded there to the odd one of its two neighbours,
    which keeps it clear of the middle between two float32 (Boldo and Melquiond, IEEE Transactions
    on Computers 57, 2008).
    """
    product, more = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + more)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = total - product
        error = (product - (total - moved)) + (more - moved)
        bits = total.view(np.int64)
        step = np.where((error > 0) == (total > 0), 1, -1)
        inexact = (error > 0) | (error < 0)
        bits += np.where(inexact & (bits & 1 == 0), step, 0)
        return total.astype(np.float32)
