"""The C functions of ops/gpu/onnxcomp_cuda.h by ctypes, for whatever memory pointers lead to.

With the library these are tensors on a GPU; with the emulation of the tests, numpy arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MEMORY_TYPES", "TYPES", "Calls", "HashWeight", "HyperLevels", "HyperWeight"]

Array = np.ndarray[Any, Any]
TYPES: Mapping[str, int] = {"float32": 1, "float16": 10, "bfloat16": 16}
MEMORY_TYPES: Mapping[str, int] = {"float32": 1, "float16": 10, "int8": 3}


class HyperLevels(ctypes.Structure):
    """OnnxcompHyperLevels."""

    _fields_ = (
        ("multiplier", ctypes.c_uint16),
        ("offset", ctypes.c_uint16),
        ("values", ctypes.c_int8 * 256),
    )


class HyperWeight(ctypes.Structure):
    """OnnxcompHyperWeight."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("states", ctypes.c_int32),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("levels", ctypes.POINTER(HyperLevels)),
    )


class HashWeight(ctypes.Structure):
    """OnnxcompHashWeight."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("chunk", ctypes.c_int32),
        ("memory_type", ctypes.c_int32),
        ("memory", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("map", ctypes.c_int64 * 6),
    )


Weight = HyperWeight | HashWeight


class Calls:
    """The functions of one library.

    Attributes:
        architectures: Compute capabilities the library has machine code for.
    """

    def __init__(self, path: Path) -> None:
        """Load the library.

        Raises:
            OSError: It does not load.
            AttributeError: It holds no CUDA kernels.
        """
        self._library = ctypes.CDLL(str(path))
        self._library.onnxcomp_cuda_error.restype = ctypes.c_char_p
        self._library.onnxcomp_cuda_architectures.restype = ctypes.c_char_p
        self.architectures: str = self._library.onnxcomp_cuda_architectures().decode()

    def kernels(self) -> str:
        """Which kernels the device gets, in words."""
        text = ctypes.c_char_p()
        if self._library.onnxcomp_cuda_kernels(ctypes.byref(text)) != 0 or text.value is None:
            raise RuntimeError(self._library.onnxcomp_cuda_error().decode())
        return text.value.decode()

    def levels(self, table: Array) -> HyperLevels | None:
        """The levels of a table of more than 256 states; None where it has none."""
        levels, found = HyperLevels(), ctypes.c_int32()
        states = len(table).bit_length() - 1
        self._library.onnxcomp_cuda_hyper_levels(
            _pointer(table.ctypes.data), states, ctypes.byref(levels), ctypes.byref(found)
        )
        return levels if found.value else None

    def scratch(self, weight: Weight, batch: int, dtype: str) -> int:
        """Bytes of scratch memory of a product."""
        size = ctypes.c_size_t()
        self._call(weight, "scratch", ctypes.c_int64(batch), TYPES[dtype], ctypes.byref(size))
        return size.value

    def matmul(
        self,
        weight: Weight,
        x: int,
        y: int,
        batch: int,
        dtype: str,
        scratch: tuple[int, int],
        stream: int = 0,
    ) -> None:
        """Y (batch, rows) = x (batch, length) W^T; `scratch` is an address and bytes."""
        address, size = scratch
        self._call(
            weight, "matmul", _pointer(x), _pointer(y), ctypes.c_int64(batch), TYPES[dtype],
            _pointer(address), ctypes.c_size_t(size), _pointer(stream),
        )  # fmt: skip

    def gather(
        self, weight: Weight, indices: int, index_bytes: int, count: int, y: int, stream: int = 0
    ) -> None:
        """Y (count, length), float32."""
        self._call(
            weight, "gather", _pointer(indices), index_bytes, ctypes.c_int64(count), _pointer(y),
            _pointer(stream),
        )  # fmt: skip

    def decode(self, weight: Weight, w: int, dtype: str, stream: int = 0) -> None:
        """W (rows, length)."""
        self._call(weight, "decode", _pointer(w), TYPES[dtype], _pointer(stream))

    def _call(self, weight: Weight, what: str, *arguments: Any) -> None:
        family = "hyper" if isinstance(weight, HyperWeight) else "hash"
        function = getattr(self._library, f"onnxcomp_cuda_{family}_{what}")
        if function(ctypes.byref(weight), *arguments) != 0:
            raise RuntimeError(self._library.onnxcomp_cuda_error().decode())


def _pointer(address: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(address)
