"""Weights encoded by the workers of a cluster, ahead of who asks for them.

The cluster has one task for each worker at a time. What comes back lies in files until it is asked
for, in whatever order tasks end: a slow worker holds up its own task only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.calibration.blas_threads import blas_threads
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.encoding.cluster_calls import Calls
from onnxcomp.passes.encoding.cluster_observing import calibrating
from onnxcomp.passes.encoding.cluster_tasks import Answer, Batch, Place, encode_batch, versions
from onnxcomp.passes.encoding.cluster_weights import Weights
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.workers import Calibrating
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import WeightSite

__all__ = ["Ahead", "Cluster"]

# Weight bytes that make a task: less is over before the next one is there.
_TASK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster in use.

    Attributes:
        client: The client of `distributed`.
        address: What the user calls it.
        exchange: A folder of this run, which payloads go through where workers see it.
        shared: Looks at the workers when it is asked first: whether all of them see the exchange.
            It refuses those that cannot be used.
    """

    client: Any
    address: str
    exchange: Place
    shared: Callable[[], bool]

    def workers(self) -> int:
        """Tasks that workers run at a time now; 0 while there are none.

        Raises:
            CompressionError: The scheduler is gone.
        """
        try:
            return sum(self.client.nthreads().values())
        except OSError as error:
            raise self.lost() from error

    def lost(self) -> CompressionError:
        """The error of a run whose scheduler went away."""
        return CompressionError(
            f"the scheduler at {self.address} is gone",
            hint="start it again; with --cache what was encoded is kept",
        )

    @contextlib.contextmanager
    def encoding(
        self,
        model: ir.Model,
        work: Sequence[WeightSite],
        plan: Plan,
        *,
        cache: PayloadCache | None = None,
        compare: bool = True,
        progress: Progress | None = None,
    ) -> Iterator[Callable[[WeightSite], EncodedWeight]]:
        """What `passes.encoding.workers.Workers` says."""
        self.shared()
        place = None if cache is None else Place.marked(cache.folder)
        ahead = Ahead(self, model, work, plan, cache=place, compare=compare, progress=progress)
        try:
            yield ahead.encoded
        finally:
            ahead.cancel()
            if place is not None:
                place.unmark()

    @contextlib.contextmanager
    def calibrating(
        self,
        model: ir.Model,
        plan: Plan,
        offsets: Mapping[str, Offset | None],
        *,
        cache: PayloadCache | None = None,
        progress: Callable[[int, str], None] | None = None,
    ) -> Iterator[Calibrating | None]:
        """What `passes.encoding.workers.Workers` says."""
        if not self.shared():
            yield None
            return
        place = None if cache is None else Place.marked(cache.folder)
        codecs = (plan[name].codec for name in offsets)
        # On one thread for linear algebra, as calibration is everywhere.
        known = versions(codecs, runtime=True)
        frame = Batch((), known, self.exchange, place, compare=False, blas=1)
        calls = Calls(self)
        weights = Weights(model, plan, self.exchange, shared=True)
        try:
            yield calibrating(calls, weights, frame, offsets, progress)
        finally:
            calls.cancel()
            if place is not None:
                place.unmark()


class Ahead:
    """Weights on their way through a cluster.

    Args:
        cluster: The cluster.
        model: The canonical model; only read.
        work: Weights to encode, in the order in which they are sent.
        plan: Decisions for them.
        cache: Folder of payloads of earlier runs; None without.
        compare: Whether codecs are compared with their baselines.
        progress: Told of what has come back.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: ir.Model,
        work: Sequence[WeightSite],
        plan: Plan,
        *,
        cache: Place | None = None,
        compare: bool = True,
        progress: Progress | None = None,
    ) -> None:
        self._calls, self._progress = Calls(cluster), progress
        self._weights = Weights(model, plan, cluster.exchange, shared=cluster.shared())
        self._waiting = collections.deque(_batches(work))
        self._unsent = {site.name for site in work}
        self._frame = Batch(
            (), versions(plan[site.name].codec for site in work), cluster.exchange, cache, compare,
            blas_threads(),
        )  # fmt: skip
        self._answers: dict[str, Answer] = {}
        self._sizes = {site.name: site.nbytes for site in work}
        self._done, self._total = 0, sum(self._sizes.values())

    def encoded(self, site: WeightSite) -> EncodedWeight:
        """One of the weights; each can be asked for once.

        Raises:
            UsageError: A worker has other versions.
            ModelError: A worker does not see the model's file.
            CompressionError: The weight cannot be encoded on the cluster, or the cluster is gone.
        """
        self._send(site.name)
        while site.name not in self._answers:
            self._receive()
            self._send(site.name)
        return self._weights.encoded(site, self._answers.pop(site.name))

    def _send(self, wanted: str) -> None:
        """Let the cluster have as many tasks as it can work on, the wanted weight among them."""
        most = max(1, self._calls.workers)  # none waits behind another one, which may take long
        if len(self._calls) < most and wanted in self._unsent:
            batch = next(b for b in self._waiting if any(site.name == wanted for site in b))
            self._waiting.remove(batch)
            self._waiting.appendleft(batch)
        while self._waiting and len(self._calls) < most:
            self._submit(self._waiting.popleft())
        if self._progress is not None:
            self._progress(self._done, self._total, self._calls.at_work)

    def _submit(self, sites: tuple[WeightSite, ...]) -> None:
        names = [site.name for site in sites]
        self._unsent -= {*names}
        batch = dataclasses.replace(self._frame, items=tuple(map(self._weights.item, sites)))
        self._calls.call(encode_batch, batch, names)

    def _receive(self) -> None:
        """Wait a moment for a task to end, and take what it gives."""
        ended = self._calls.ended()
        if ended is None:
            return
        self._send("")  # the worker need not wait until the result is here
        answers: list[Answer] = self._calls.outcome(*ended)
        for answer in answers:
            self._answers[answer.name] = self._weights.kept(answer)
        for name in ended[1]:
            self._done += self._sizes[name]
            self._weights.forget(name)

    def cancel(self) -> None:
        """Take back what is with the cluster."""
        self._calls.cancel()


def _batches(work: Sequence[WeightSite]) -> Iterator[tuple[WeightSite, ...]]:
    """The weights in tasks: large ones alone, small ones together."""
    batch: list[WeightSite] = []
    for site in work:
        if batch and sum(s.nbytes for s in batch) + site.nbytes > _TASK_BYTES:
            yield tuple(batch)
            batch = []
        batch.append(site)
    if batch:
        yield tuple(batch)
