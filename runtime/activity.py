"""What this process is at, told to whoever shows it: any code may say it, at no cost otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["Listener", "activity", "shown_by"]

# Is told what is being done, how much of it is done and of how much (0 where that is not known),
# and on what.
Listener = Callable[[str, int, int, str], None]

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def shown_by(listener: Listener) -> Iterator[None]:
    """Tell a listener what this thread does inside the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def activity(what: str, done: int = 0, total: int = 0, item: str = "") -> None:
    """Say what begins now, such as ``activity("planning", 3, 40, "layer3.weight")``."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(what, done, total, item)
