"""The operators of onnxcomp with kernels for NVIDIA GPUs; onnxcomp finds this library by itself."""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_library_path"]

_FILES = ("libonnxcomp_ops.so", "onnxcomp_ops.dll")


def get_library_path() -> str:
    """Path of the library, for sessions of your own.

    Raises:
        RuntimeError: It is not in this package.
    """
    folder = Path(__file__).parent
    for name in _FILES:
        if (folder / name).is_file():
            return str(folder / name)
    raise RuntimeError(f"{folder} holds no library: install onnxcomp-cuda again")
