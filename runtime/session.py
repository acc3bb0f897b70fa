"""Sessions of ONNX Runtime with the operator library registered."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import ModelError, RuntimeMissingError
from onnxcomp.ops import library_path as get_library_path
from onnxcomp.ops import register
from onnxcomp.runtime.structure import DOMAIN, custom_operators

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "FOLDED",
    "InferenceSession",
    "get_library_path",
    "import_runtime",
    "needs_library",
    "open_session",
    "register",
]

PathLike = str | os.PathLike[str]

# Operators that never have a kernel: their bodies are folded to constants.
FOLDED = "Weight"

# Errors reach the caller as exceptions; ONNX Runtime would print them as well.
_FATAL_ONLY = 4


def import_runtime() -> Any:
    """The module onnxruntime.

    Raises:
        RuntimeMissingError: It is not installed or cannot be loaded.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            f"ONNX Runtime cannot be imported: {error}",
            hint="pip install 'onnxcomp[cpu]' or, with an NVIDIA GPU, 'onnxcomp[gpu]'",
        ) from error
    return onnxruntime


def needs_library(model: PathLike) -> bool:
    """Whether the model calls operators that the library has kernels for.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    return any(not name.endswith(FOLDED) for name in custom_operators(model))


def InferenceSession(  # noqa: N802 - named after the class it makes
    path: PathLike,
    *,
    library: bool = True,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An ordinary `onnxruntime.InferenceSession` that knows the operators of com.onnxcomp.

    Args:
        path: The model, compressed or not.
        library: Whether the operator library is registered when the model needs it. Without it
            ONNX Runtime falls back to the operators' standard definitions inside the file.
        threads: Threads of one operator; None for ONNX Runtime's choice.
        providers: Execution providers; None for the CPU.
        session_options: Options to start from. The library and `threads` are added to them.

    Raises:
        RuntimeMissingError: ONNX Runtime or the needed operator library is missing.
        ModelError: The file is missing, or ONNX Runtime cannot load it.
    """
    return open_session(
        path,
        library=library and needs_library(path),
        threads=threads,
        providers=providers,
        session_options=session_options,
    )


def open_session(
    path: PathLike | bytes,
    *,
    library: bool,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """`InferenceSession` for callers who know whether the model needs the library."""
    runtime = import_runtime()
    options = session_options
    if options is None:
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if library:
        register(options)
    try:
        session = runtime.InferenceSession(
            path if isinstance(path, bytes) else os.fspath(path),
            options,
            providers=list(providers or ["CPUExecutionProvider"]),
        )
    except Exception as error:  # the classes differ between versions and share no base
        what = "the model" if isinstance(path, bytes) else path
        raise _explained(what, error) from error
    _return_freed_memory()
    return session


def _explained(path: PathLike, error: Exception) -> ModelError:
    text = str(error)
    hint = "onnxcomp inspect shows what is in the file; export it again if it is damaged"
    if "is not a registered" in text and DOMAIN not in text:
        hint = "the model needs operators of another library: optimize can do with --no-verify"
    elif DOMAIN in text:
        hint = f"the model calls operators of {DOMAIN} that it has no definition of"
    line = " ".join(text.split())
    return ModelError(f"ONNX Runtime cannot load {os.fspath(path)}: {line}", hint=hint)


def _return_freed_memory() -> None:
    """Give memory that folding has freed back to the system.

    The C library keeps freed blocks up to 32 MB: 0.85 GB after loading the portable form of 200
    weights of 384x384 (118 MB dense). Only glibc has this call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
