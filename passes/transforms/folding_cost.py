"""What folding two linear maps costs on this machine, so that nobody waits for it in silence."""

from __future__ import annotations

import functools
import logging
import time

import numpy as np

__all__ = ["LIMIT", "affordable", "float64_rate"]

log = logging.getLogger(__name__)

# Seconds of one product beyond which a chain is left as it is, and from which on it is announced.
LIMIT, _NOTICED = 60.0, 2.0

# Side and repetitions of the product that the machine is timed with: 0.13 GFLOP each.
_SIDE, _RUNS = 400, 3


@functools.cache
def float64_rate() -> float:
    """Multiplications of float64 products in a second, the best of a few runs."""
    square = np.ones((_SIDE, _SIDE))
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - start)
    return _SIDE**3 / max(best, 1e-9)


def affordable(name: str, rows: int, inner: int, columns: int) -> bool:
    """Whether the product of ``(rows, inner)`` and ``(inner, columns)`` is worth its time.

    Args:
        name: Of the chain, for the log, which says what takes long and what is left alone.
        rows: Rows of the first matrix.
        inner: The axis that is summed over.
        columns: Columns of the second matrix.
    """
    seconds = rows * inner * columns / float64_rate()
    if seconds > LIMIT:
        log.warning(
            "%s is left as it is: folding it would take about %.0f s, more than %.0f s",
            *(name, seconds, LIMIT),
        )
        return False
    if seconds > _NOTICED:
        log.warning("folding %s: about %.0f s", name, seconds)
    return True
