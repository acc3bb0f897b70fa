"""The operator library: where it is, and how to load it into a session.

The package holds one for CPUs. Where ``onnxcomp-cuda`` is installed, its library, which has both
kinds of kernels, takes that one's place.

Environment: ``ONNXCOMP_OPS_LIBRARY`` names another library file. ``ONNXCOMP_ISA`` (``plain``,
``avx2``, ``avx2vnni``, ``avx512``, ``amx``, ``neon``, ``neondot``) forces one form of the kernels;
they choose the best one the machine can run by themselves, but ``amx``, which nobody has timed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.version import __version__

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["CUDA_OPERATORS", "cuda_architectures", "cuda_kernels", "library_path", "register"]

# What a library with CUDA kernels has kernels for; names in Weight are folded when a model loads.
CUDA_OPERATORS = frozenset(
    f"{family}{kind}" for family in ("Hyper", "Hash") for kind in ("MatMul", "Gather", "Decode")
)

_VARIABLE = "ONNXCOMP_OPS_LIBRARY"
_CUDA_PACKAGE = "onnxcomp-cuda"
# Session configuration entry that the library leaves in options that have it (registry.cc).
_MARK = "onnxcomp.library_registered"
_FILES = {"win32": "onnxcomp_ops.dll", "darwin": "libonnxcomp_ops.dylib"}
_FILE = _FILES.get(sys.platform, "libonnxcomp_ops.so")


def library_path() -> Path:
    """Path of the operator library.

    The environment variable ``ONNXCOMP_OPS_LIBRARY`` wins over the library of ``onnxcomp-cuda``,
    and that over the copy inside the package.

    Raises:
        RuntimeMissingError: There is no file at that path, or onnxcomp-cuda is of another version.
    """
    override = os.environ.get(_VARIABLE)
    if override:
        path = Path(override)
        hint = f"set {_VARIABLE} to an existing file, or unset it to use the installed library"
    else:
        path = _cuda_library() or Path(str(importlib.resources.files("onnxcomp.ops"))) / _FILE
        hint = f"reinstall onnxcomp, or build the library and point {_VARIABLE} to it"
    if not path.is_file():
        raise RuntimeMissingError(f"operator library {path} does not exist", hint=hint)
    return path


def _cuda_library() -> Path | None:
    """The library of the package onnxcomp-cuda; None where it is not installed."""
    found = importlib.util.find_spec(_CUDA_PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        return None
    try:
        theirs = importlib.metadata.version(_CUDA_PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # a folder of that name
        return None
    if theirs != __version__:
        raise RuntimeMissingError(
            f"{_CUDA_PACKAGE} {theirs} does not fit onnxcomp {__version__}",
            hint=f"pip install {_CUDA_PACKAGE}=={__version__}",
        )
    return Path(found.submodule_search_locations[0]) / _FILE


def cuda_architectures() -> tuple[str, ...]:
    """What GPUs the library has kernels for, as CMake names them: ``("90-real", "120")``.

    Empty for a library that was built without CUDA. Needs neither a GPU nor a driver.

    Raises:
        RuntimeMissingError: The library is missing or does not load.
    """
    import ctypes

    function = getattr(_load_library(), "onnxcomp_cuda_architectures", None)
    if function is None:
        return ()
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return tuple(text.decode().split())


def cuda_kernels() -> str | None:
    """Which kernels the first GPU gets, in words; None without a GPU or without CUDA kernels.

    Raises:
        RuntimeMissingError: The library is missing or does not load.
    """
    import ctypes

    function = getattr(_load_library(), "onnxcomp_cuda_kernels", None)
    text = ctypes.c_char_p()
    if function is None or function(ctypes.byref(text)) != 0 or text.value is None:
        return None
    return text.value.decode()


def _load_library() -> Any:
    import ctypes

    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeMissingError(
            f"operator library {path} does not load: {error}", hint="build it on this machine"
        ) from error


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Make the operators of com.onnxcomp known to sessions created with these options.

    Options that know them already stay as they are: ONNX Runtime refuses a domain given twice.

    Args:
        session_options: Options of one or more sessions to come.

    Raises:
        RuntimeMissingError: The library is missing, or this ONNX Runtime cannot load it.
    """
    path = library_path()
    if _is_registered(session_options):
        return
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:
        raise RuntimeMissingError(
            f"ONNX Runtime cannot load {path}: {error}",
            hint="onnxcomp needs ONNX Runtime 1.18 or newer on the platform it was built for",
        ) from error


def _is_registered(session_options: onnxruntime.SessionOptions) -> bool:
    try:
        return bool(session_options.get_session_config_entry(_MARK) == "1")
    except RuntimeError:  # no such entry
        return False
