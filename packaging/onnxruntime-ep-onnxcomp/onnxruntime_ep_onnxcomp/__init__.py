"""The operators of onnxcomp as a plugin execution provider of ONNX Runtime.

Names are those of other packages of this kind: `get_library_path` for registering the library,
`get_ep_name` for finding its device.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["get_ep_name", "get_ep_names", "get_library_path"]

_FILES = ("libonnxcomp_ops.so", "libonnxcomp_ops.dylib", "onnxcomp_ops.dll")


def get_library_path() -> str:
    """Path of the library, for `onnxruntime.register_execution_provider_library`.

    Raises:
        RuntimeError: It is not in this package.
    """
    folder = Path(__file__).parent
    for name in _FILES:
        if (folder / name).is_file():
            return str(folder / name)
    raise RuntimeError(f"{folder} holds no library: install onnxruntime-ep-onnxcomp again")


def get_ep_name() -> str:
    """Name of the execution provider."""
    return "OnnxCompExecutionProvider"


def get_ep_names() -> list[str]:
    """Names of all execution providers of the library."""
    return [get_ep_name()]
