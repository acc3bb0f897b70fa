"""Where kernels find their tensors: in the memory of a GPU, or, emulated, of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

__all__ = ["GpuMemory", "HostMemory", "Memory"]

Array = np.ndarray[Any, Any]
# Reads an output when its kernel is done.
Read = Callable[[], Array]

_GUARD = 256  # bytes, which also aligns
_INTACT = 0xA5
_POISON = 0xFF  # NaN in every float type


class Memory(Protocol):
    """Keeps tensors as long as it lives, each between guard bytes that nothing may change."""

    def place(self, array: Array) -> int:
        """Copy an array there; its address."""
        ...

    def output(self, shape: tuple[int, ...], dtype: Any) -> tuple[int, Read]:
        """Poisoned memory: its address, and how to read it.

        Reading raises `AssertionError` when bytes before or after it were written.
        """
        ...


def _framed(payload: Array, misalignment: int) -> tuple[Array, int]:
    """Payload bytes between guards, and where they begin: at a multiple of 256 bytes."""
    start = _GUARD + -misalignment % _GUARD
    raw = np.full(payload.nbytes + 3 * _GUARD, _INTACT, np.uint8)
    raw[start : start + payload.nbytes] = payload
    return raw, start


def _inside(raw: Array, start: int, shape: tuple[int, ...], dtype: Any) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not (raw[:start] == _INTACT).all():
        raise AssertionError("something was written before the output")
    if not (raw[start + size :] == _INTACT).all():
        raise AssertionError("something was written after the output")
    return raw[start : start + size].view(dtype).reshape(shape)


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _poison(shape: tuple[int, ...], dtype: Any) -> Array:
    return np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, _POISON, np.uint8)


class HostMemory:
    """Memory of this process, for emulated kernels."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._kept: list[Array] = []

    def _put(self, payload: Array) -> tuple[Array, int]:
        room = np.empty(payload.nbytes + 3 * _GUARD, np.uint8)
        framed, start = _framed(payload, int(room.ctypes.data))
        room[:] = framed
        self._kept.append(room)
        return room, start

    def place(self, array: Array) -> int:
        """Copy an array; its address."""
        room, start = self._put(_bytes(array))
        return int(room.ctypes.data) + start

    def output(self, shape: tuple[int, ...], dtype: Any) -> tuple[int, Read]:
        """Poisoned memory: its address, and how to read it."""
        room, start = self._put(_poison(shape, dtype))
        return int(room.ctypes.data) + start, lambda: _inside(room, start, shape, dtype)


class GpuMemory:
    """Memory of the GPU that torch has chosen, or of another of its devices."""

    def __init__(self, device: str = "cuda") -> None:
        """Keep nothing yet."""
        self._device = device
        self._kept: list[Any] = []

    def _put(self, payload: Array) -> tuple[Any, int]:
        import torch

        room = torch.empty(payload.nbytes + 3 * _GUARD, dtype=torch.uint8, device=self._device)
        framed, start = _framed(payload, room.data_ptr())
        room.copy_(torch.from_numpy(framed))
        self._kept.append(room)
        return room, start

    def place(self, array: Array) -> int:
        """Copy an array; its address."""
        room, start = self._put(_bytes(array))
        return int(room.data_ptr()) + start

    def output(self, shape: tuple[int, ...], dtype: Any) -> tuple[int, Read]:
        """Poisoned memory: its address, and how to read it after all work is done."""
        import torch

        room, start = self._put(_poison(shape, dtype))

        def read() -> Array:
            if self._device == "cuda":
                torch.cuda.synchronize()
            return _inside(room.cpu().numpy(), start, shape, dtype)

        return int(room.data_ptr()) + start, read
