"""`onnxcomp.InferenceSession` and `onnxcomp.patch_onnxruntime`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.ops import library_path, register
from onnxcomp.runtime.clients import patching
from onnxcomp.runtime.session import explained, import_runtime, needs_library

__all__ = ["InferenceSession", "patch_onnxruntime"]

PathLike = str | os.PathLike[str]

if TYPE_CHECKING:
    import onnxruntime
else:
    onnxruntime = import_runtime()

_patch: patching.SessionPatch | None = None


class InferenceSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """A session of ONNX Runtime that knows the operators of com.onnxcomp.

    Takes what `onnxruntime.InferenceSession` takes, and means the same by it.

    Args:
        path_or_bytes: The model, compressed or not: a path, or the bytes of the file.
        sess_options: Options; the operator library is added to them where the model needs it.
        providers: Execution providers; None for ONNX Runtime's choice.
        provider_options: Options of these providers.
        library: Whether the operator library is used. Without it ONNX Runtime falls back to the
            operators' standard definitions inside the file.
        threads: Threads of one operator, added to the options; None to leave them as they are.
        session_options: Another name of `sess_options`.
        kwargs: What else `onnxruntime.InferenceSession` takes.

    Raises:
        RuntimeMissingError: The model needs the operator library, and it is missing.
        ModelError: ONNX Runtime cannot load the model. The error is one of the class that ONNX
            Runtime raises, too.
    """

    def __init__(
        self,
        path_or_bytes: PathLike | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        *,
        library: bool = True,
        threads: int | None = None,
        session_options: Any = None,
        **kwargs: Any,
    ) -> None:
        if sess_options is not None and session_options is not None:
            raise TypeError("sess_options and session_options are the same: give one of them")
        options = session_options if sess_options is None else sess_options
        named = patching.mentions_operators(path_or_bytes)
        if options is None and (threads is not None or (library and named)):
            options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        if library and named:
            _register(options, path_or_bytes)
        base = onnxruntime.InferenceSession
        with contextlib.nullcontext() if library else patching.unpatched(base):
            try:
                super().__init__(path_or_bytes, options, providers, provider_options, **kwargs)
            except (TypeError, ValueError):
                raise  # of the arguments, not of the model
            except Exception as error:  # the classes differ between versions and share no base
                raise explained(path_or_bytes, error) from error
        if named:
            patching.return_freed_memory()


def _register(options: Any, model: PathLike | bytes) -> None:
    """Add the library; without one, models that name its domain but need no kernel still run."""
    try:
        register(options)
    except RuntimeMissingError:
        if needs_library(model):
            raise


def patch_onnxruntime() -> patching.SessionPatch:
    """Make every session of this process know the operators of com.onnxcomp, whoever opens it.

    For applications that open their sessions themselves. The class of ONNX Runtime is changed in
    place, so it does not matter when it was imported. Models without these operators are opened as
    before. A second call changes nothing.

    Returns:
        The patch: its `undo()` takes it back, and so does leaving a `with` block.

    Raises:
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
    """
    global _patch
    library = str(library_path())
    if _patch is None or not _patch.active:
        from onnxruntime.capi import onnxruntime_inference_collection as sessions

        _patch = patching.SessionPatch(sessions, library)
    return _patch
