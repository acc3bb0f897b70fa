"""Calls of functions on the workers of a cluster, and what comes back of them."""

from __future__ import annotations

import contextlib
import queue
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from onnxcomp.errors import CompressionError

__all__ = ["Calls", "Connection"]

# Seconds between looks at which workers there are, and without any until a run gives up.
_LOOK, _ALONE = 1.0, 120.0

# How often a call is tried again that fails on a worker for want of memory, say.
_RETRIES = 2


class Connection(Protocol):
    """A cluster in use."""

    @property
    def client(self) -> Any:
        """The client of `distributed`."""
        ...

    @property
    def address(self) -> str:
        """What the user calls it."""
        ...

    def workers(self) -> int:
        """Calls that workers make at a time now; 0 while there are none."""
        ...

    def lost(self) -> CompressionError:
        """The error of a run whose scheduler went away."""
        ...


class Calls:
    """Calls of one run that are with a cluster.

    Args:
        cluster: The cluster.
    """

    def __init__(self, cluster: Connection) -> None:
        self._cluster = cluster
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._flying: dict[Any, Sequence[str]] = {}
        self._done: dict[Any, Sequence[str]] = {}
        self._name = f"onnxcomp-{secrets.token_hex(4)}"
        self._made = 0
        self._workers, self._looked, self._seen = 0, -_LOOK, time.monotonic()

    def __len__(self) -> int:
        """Calls that have not ended."""
        return len(self._flying)

    @property
    def workers(self) -> int:
        """Calls that workers make at a time; looked up now and then.

        Raises:
            CompressionError: The scheduler is gone.
        """
        if time.monotonic() - self._looked >= _LOOK:
            self._workers, self._looked = self._cluster.workers(), time.monotonic()
            if self._workers:
                self._seen = self._looked
        return self._workers

    @property
    def at_work(self) -> str:
        """How many calls there are, in words."""
        return f"{len(self._flying)} tasks on {self.workers} workers"

    def call(self, function: Callable[[Any], Any], argument: object, names: Sequence[str]) -> Any:
        """Let a worker call a function.

        Args:
            function: It may be called twice, on two workers at the same time.
            argument: What it is given.
            names: Weights that it is about, for messages.

        Returns:
            What `ended` gives when it has ended.
        """
        self._made += 1
        key = (self._name, self._made)
        future = self._cluster.client.submit(function, argument, key=key, retries=_RETRIES)
        self._flying[future] = names
        future.add_done_callback(self._ended.put)
        return future

    def ended(self) -> tuple[Any, Sequence[str]] | None:
        """Wait a moment for a call to end; None where none does.

        Returns:
            The call, for `outcome`, and the weights that it is about.

        Raises:
            CompressionError: There are no workers, and have been none for long.
        """
        with contextlib.suppress(queue.Empty):
            future = self._ended.get(timeout=_LOOK)
            return future, self._flying.pop(future)
        if not self.workers and time.monotonic() - self._seen > _ALONE:
            raise CompressionError(
                f"the scheduler at {self._cluster.address} has had no workers for "
                f"{_ALONE:.0f} seconds",
                hint="start workers; with --cache what was encoded is kept",
            )
        return None

    def wait(self) -> None:
        """Wait a moment for a call to end, which `done` tells of then."""
        ended = self.ended()
        if ended is not None:
            future, names = ended
            self._done[future] = names

    def done(self, future: Any) -> bool:
        """Whether a call has ended while `wait` was called."""
        return future in self._done

    def each(
        self, function: Callable[[Any], Any], arguments: Iterable[object], names: Sequence[str]
    ) -> Iterator[Any]:
        """Let workers call a function with each argument, all at the same time.

        Args:
            function: As for `call`.
            arguments: What it is given.
            names: Weights that it is about, for messages.

        Yields:
            What each call gave, in their order.

        Raises:
            CompressionError: As `outcome` does.
        """
        for future in [self.call(function, argument, names) for argument in arguments]:
            yield self.take(future)

    def take(self, future: Any) -> Any:
        """What a call gives, as soon as it ends.

        Raises:
            CompressionError: As `outcome` does.
        """
        while future not in self._done:
            self.wait()
        return self.outcome(future, self._done.pop(future))

    def outcome(self, future: Any, names: Sequence[str]) -> Any:
        """What a call gave that has ended.

        Raises:
            CompressionError: It failed, or it gave an error of ours, which is raised as it is.
        """
        if future.status == "error":
            error = future.exception()
            lost = type(error).__name__ == "KilledWorker"
            raise CompressionError(
                f"the work on {', '.join(names[:3])} failed on the cluster: "
                + ("several workers were lost with it" if lost else repr(error)),
                hint="look at the memory of the workers" if lost else "look at their logs",
            ) from error
        if future.status != "finished":
            raise self._cluster.lost()
        found = future.result()
        if isinstance(found, CompressionError):
            raise found
        return found

    def cancel(self) -> None:
        """Take back what is with the cluster."""
        if self._flying:
            with contextlib.suppress(OSError):
                self._cluster.client.cancel([*self._flying], force=True)
