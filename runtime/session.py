"""Sessions of ONNX Runtime, with the operator library registered and without."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import ModelError, RuntimeMissingError
from onnxcomp.ops import library_path as get_library_path
from onnxcomp.ops import register
from onnxcomp.runtime.clients.patching import return_freed_memory, unpatched
from onnxcomp.runtime.structure import DOMAIN, custom_operators

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "FOLDED",
    "explained",
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


def needs_library(model: PathLike | bytes) -> bool:
    """Whether the model, a path or bytes, calls operators that the library has kernels for.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    return any(not name.endswith(FOLDED) for name in custom_operators(model))


def open_session(
    path: PathLike | bytes,
    *,
    library: bool | None = None,
    threads: int | None = None,
    providers: Sequence[Any] | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """A session for the compiler itself: quiet, and on the CPU unless told otherwise.

    Args:
        path: The model, compressed or not, or its bytes.
        library: Whether the operator library is registered; None for where the model needs it.
            Without it ONNX Runtime falls back to the operators' standard definitions inside the
            file.
        threads: Threads of one operator; None for ONNX Runtime's choice.
        providers: Execution providers; None for the CPU.
        session_options: Options to start from. The library and `threads` are added to them.

    Raises:
        RuntimeMissingError: ONNX Runtime or the needed operator library is missing.
        ModelError: The file is missing, or ONNX Runtime cannot load it.
    """
    runtime = import_runtime()
    if library is None:
        library = needs_library(path)
    options = session_options
    if options is None:
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if library:
        register(options)
    try:
        with unpatched(runtime.InferenceSession):
            session = runtime.InferenceSession(
                path if isinstance(path, bytes) else os.fspath(path),
                options,
                providers=list(providers or ["CPUExecutionProvider"]),
            )
    except Exception as error:  # the classes differ between versions and share no base
        raise explained(path, error) from error
    return_freed_memory()
    return session


def explained(model: PathLike | bytes, error: Exception) -> ModelError:
    """What ONNX Runtime raised as an error of ours; `except` clauses for either kind catch it."""
    text = str(error)
    hint = "onnxcomp inspect shows what is in the file; export it again if it is damaged"
    if "is not a registered" in text and DOMAIN not in text:
        hint = "the model needs operators of another library: optimize can do with --no-verify"
    elif DOMAIN in text:
        hint = f"the model calls operators of {DOMAIN} that it has no definition of"
    line = " ".join(text.split())
    name = f"{len(model)} bytes" if isinstance(model, bytes) else os.fspath(model)
    kind: Any = ModelError
    if type(error).__module__.startswith("onnxruntime"):
        kind = type(ModelError.__name__, (ModelError, type(error)), {"__module__": __name__})
    result: ModelError = kind(f"ONNX Runtime cannot load {name}: {line}", hint=hint)
    return result
