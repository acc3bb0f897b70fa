"""Make every session of this process know the operators, whoever opens it.

Only the standard library is imported: `onnxcomp exec` and `onnxcomp record` have this file read by
applications whose environments hold ONNX Runtime, but not onnxcomp.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "SESSIONS",
    "SessionPatch",
    "mentions_operators",
    "register_library",
    "return_freed_memory",
    "unpatched",
]

# The module of ONNX Runtime that holds the class of sessions.
SESSIONS = "onnxruntime.capi.onnxruntime_inference_collection"

_DOMAIN = b"com.onnxcomp"
# As in onnxcomp.ops and ops/registry.cc.
_MARK = "onnxcomp.library_registered"

# Attribute of a patched constructor with what holds in one thread. Wrappers take attributes over,
# so that it is found whoever has wrapped the constructor since; several patches have one.
_LOCAL = "_onnxcomp_local"


def mentions_operators(model: Any) -> bool:
    """Whether a model, a path or bytes, has the name of the operators' domain in it.

    False for what cannot be read: ONNX Runtime says what is wrong with it.
    """
    if isinstance(model, bytes):
        return _DOMAIN in model
    if not isinstance(model, (str, os.PathLike)):  # a number would be an open file
        return False
    try:
        with open(model, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with view:
            return view.find(_DOMAIN) >= 0
    except (OSError, ValueError):
        return False


def register_library(options: Any, library: str) -> None:
    """Make the operators known to sessions with these options, unless they are already."""
    try:
        registered = options.get_session_config_entry(_MARK) == "1"
    except RuntimeError:  # no such entry
        registered = False
    if not registered:
        options.register_custom_ops_library(library)  # which leaves the mark


def return_freed_memory() -> None:
    """Give memory that folding has freed back to the system.

    The C library keeps freed blocks up to 32 MB: 0.85 GB after loading the portable form of 200
    weights of 384x384 (118 MB dense). Only glibc has this call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def unpatched(session_class: Any) -> Iterator[None]:
    """Sessions that this thread opens inside the block are as if there were no patch."""
    here = getattr(session_class.__init__, _LOCAL, None)
    if here is None:
        yield
        return
    before = getattr(here, "unpatched", False)
    here.unpatched = True
    try:
        yield
    finally:
        here.unpatched = before


class SessionPatch:
    """The class of sessions, changed in place: subclasses and earlier imports have it, too.

    Models that do not name the operators' domain are opened as before.

    Args:
        sessions: The module `SESSIONS`.
        library: Path of the operator library.
        warn: Called with a sentence when the library cannot be registered; the session is then
            opened without it. None to let the error reach whoever opens the session.
    """

    def __init__(
        self, sessions: Any, library: str, warn: Callable[[str], None] | None = None
    ) -> None:
        self._class = sessions.InferenceSession
        self._make_options = sessions.C.SessionOptions
        self._library = library
        self._warn = warn
        self._original = self._class.__init__
        self._wrapper = self._wrapped(self._original)
        self.active = True
        self._class.__init__ = self._wrapper

    def undo(self) -> None:
        """Take the change back; sessions that are open stay as they are."""
        self.active = False
        # Somebody may have wrapped the wrapper since: then it stays, and passes everything on.
        if self._class.__init__ is self._wrapper:
            self._class.__init__ = self._original

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _wrapped(self, original: Callable[..., None]) -> Callable[..., None]:
        here = getattr(original, _LOCAL, None) or threading.local()

        # The parameters' names are ONNX Runtime's: callers may use them.
        @functools.wraps(original)
        def __init__(  # noqa: N807
            session: Any, path_or_bytes: Any, sess_options: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            wanted = self.active and not getattr(here, "unpatched", False)
            if not wanted or not mentions_operators(path_or_bytes):
                original(session, path_or_bytes, sess_options, *args, **kwargs)
                return
            options = self._registered(sess_options)
            original(session, path_or_bytes, options, *args, **kwargs)
            return_freed_memory()

        setattr(__init__, _LOCAL, here)
        return __init__

    def _registered(self, options: Any) -> Any:
        options = self._make_options() if options is None else options
        try:
            register_library(options, self._library)
        except Exception as error:  # the classes differ between versions and share no base
            if self._warn is None:
                raise
            self._warn(f"ONNX Runtime cannot load {self._library}: {error}")
        return options
