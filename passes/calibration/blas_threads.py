"""One thread for numpy's linear algebra.

The threads of OpenBLAS wait in a loop. Beside those of the encoders and of ONNX Runtime that costs
more than they give: up to fifteen times the CPU time of one thread on a busy machine. With one
thread results do not depend on the number of processors, either.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

__all__ = ["blas_threads", "on_one_blas_thread", "one_blas_thread", "use_blas_threads"]

T = TypeVar("T")

# OpenBLAS in numpy's wheels has prefixes and suffixes that differ between versions.
_NAMES = tuple(
    (f"{prefix}openblas_get_num_threads{suffix}", f"{prefix}openblas_set_num_threads{suffix}")
    for prefix in ("scipy_", "")
    for suffix in ("64_", "")
)


@functools.cache
def _openblas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Reads and sets the number of threads; None where numpy came with another library."""
    for path in sorted(Path(np.__file__).parents[1].glob("numpy.libs/*openblas*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for get, put in _NAMES:
            if hasattr(library, get) and hasattr(library, put):
                return getattr(library, get), getattr(library, put)
    return None


def blas_threads() -> int | None:
    """Threads that numpy's linear algebra runs on; None where that cannot be told."""
    found = _openblas()
    return None if found is None else found[0]()


def use_blas_threads(count: int) -> None:
    """Run numpy's linear algebra on so many threads from now on, where that can be asked for.

    Factorisations round otherwise on another number of threads.
    """
    found = _openblas()
    if found is not None and found[0]() != count:
        found[1](count)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run numpy's products and factorisations on one thread, where that can be asked for."""
    found = _openblas()
    if found is None:
        yield
        return
    get, put = found
    before = get()
    put(1)
    try:
        yield
    finally:
        put(before)


def on_one_blas_thread(items: Iterable[T]) -> Iterator[T]:
    """The same items, made with `one_blas_thread`."""
    with one_blas_thread():
        yield from items
