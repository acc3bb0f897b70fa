"""How long two models run while they are compared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Clock"]

# Seconds of the original from which on a ratio of such short runs says something.
_LEAST = 0.0005


class Clock:
    """Processor time of the runs of one model, and after `turn` of another one, on equal inputs."""

    def __init__(self) -> None:
        self._before: list[float] = []
        self._now: list[float] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time one run."""
        start = time.process_time()
        yield
        self._now.append(time.process_time() - start)

    def turn(self) -> None:
        """From here on it is the other model."""
        self._before, self._now = self._now, []

    @property
    def ratio(self) -> float | None:
        """How many times as long the other one ran; None where that cannot be told."""
        if len(self._before) != len(self._now) or not self._now:
            return None
        skipped = 1 if len(self._now) > 1 else 0  # the first run allocates
        before, now = sum(self._before[skipped:]), sum(self._now[skipped:])
        return now / before if before >= _LEAST else None
