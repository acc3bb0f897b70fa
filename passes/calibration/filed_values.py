"""Values in files of no name, which go with the last array that shows them."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["filed", "let_go"]


class _File(mmap.mmap):
    """A file of no name that is mapped, with its changes."""


def _file_of(array: Array) -> _File | None:
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, _File) else None


def filed(array: Array, folder: Path | None) -> Array:
    """A copy of an array in a file, or the array itself where it is one.

    Args:
        array: Any array but one of objects.
        folder: Where the file lies; None for the system's place.
    """
    if not array.nbytes or not hasattr(mmap, "MADV_DONTNEED") or _file_of(array) is not None:
        return array
    with tempfile.TemporaryFile(dir=folder) as file:
        np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
        file.flush()
        memory = _File(file.fileno(), array.nbytes)
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def let_go(array: Array) -> None:
    """Let go of what is in memory of an array in a file; reading it brings it back."""
    file = _file_of(array)
    if file is not None:
        file.madvise(mmap.MADV_DONTNEED)
