"""How fast processors read memory that no cache holds: the roof of products with one row."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

__all__ = ["Reader"]

# Bytes that each thread reads in one pass: together they are more than any cache holds.
_BYTES = 96 << 20


class Reader:
    """Reads an array on each of some threads, all at once.

    Args:
        threads: How many.
    """

    def __init__(self, threads: int) -> None:
        self._parts = [np.ones(_BYTES // 4, np.float32) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)

    def bytes_per_second(self) -> float:
        """Speed of one pass of all threads, by their processor time, so that others may run."""
        start = time.process_time()
        list(self._pool.map(np.max, self._parts))  # faster than memory gives the values
        return len(self._parts) ** 2 * _BYTES / (time.process_time() - start)
