"""Arrays in a file that is known to be whole: a JSON head, the arrays' bytes, and a checksum.

Arrays are written and read one after the other, so that memory holds nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["read_arrays", "storable", "write_arrays"]

_MAGIC = b"onnxcomp arrays\n"
_LENGTH = struct.Struct("<Q")

# Bytes hashed and written at a time, and bytes of the largest head.
_PIECE, _LARGEST_HEAD = 1 << 20, 1 << 28


def storable(array: object) -> bool:
    """Whether it is an array whose elements are plain bytes of a type that has a name."""
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        return False
    try:
        return bool(np.dtype(array.dtype.name) == array.dtype)
    except TypeError:
        return False


def write_arrays(path: Path, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write a file.

    Args:
        path: The file.
        head: Anything that JSON can hold.
        arrays: By name; all of them are `storable`.

    Raises:
        OSError: It cannot be written.
    """
    listed = [[name, array.dtype.name, list(array.shape)] for name, array in arrays.items()]
    text = json.dumps([head, listed]).encode()
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (_MAGIC, _LENGTH.pack(len(text)), text):
            digest.update(part)
            file.write(part)
        for array in arrays.values():
            flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, flat.size, _PIECE):
                piece = flat[start : start + _PIECE].data
                digest.update(piece)
                file.write(piece)
        file.write(digest.digest())


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Array]] | None:
    """Head and arrays of a file; None where there is none, or it is not whole."""
    try:
        with path.open("rb") as file:
            return _read(file)
    except (OSError, ValueError, TypeError, KeyError, MemoryError):  # what damage leads to
        return None


def _read(file: BinaryIO) -> tuple[dict[str, Any], dict[str, Array]] | None:
    digest = hashlib.sha256()
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(len(_MAGIC) + _LENGTH.size)
    digest.update(start)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(start[len(_MAGIC) :])
    if length > min(size, _LARGEST_HEAD):
        return None
    text = file.read(length)
    digest.update(text)
    head, listed = json.loads(text)
    kinds = [(name, np.dtype(kind), tuple(shape)) for name, kind, shape in listed]
    total = sum(kind.itemsize * math.prod(shape) for _, kind, shape in kinds)
    if total + len(start) + length + digest.digest_size != size:
        return None
    arrays = {}
    for name, kind, shape in kinds:
        array = np.empty(kind.itemsize * math.prod(shape), np.uint8)
        for begin in range(0, array.size, _PIECE):
            piece = array[begin : begin + _PIECE].data
            if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                return None
            digest.update(piece)
        arrays[name] = array.view(kind).reshape(shape)
    return (head, arrays) if file.read() == digest.digest() else None
