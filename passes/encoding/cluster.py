"""Weights encoded by the workers of a cluster, ahead of who asks for them.

The cluster has one task for each worker at a time. What comes back lies in files until it is asked
for, in whatever order tasks end: a slow worker holds up its own task only.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import os
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.calibration.blas_threads import blas_threads
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.encoding.cluster_tasks import (
    SMALL,
    Answer,
    Batch,
    FilePart,
    Item,
    Place,
    encode_batch,
    versions,
)
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.tensors import MappedTensor
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["Ahead", "Cluster"]

# Weight bytes that make a task: less is over before the next one is there.
_TASK_BYTES = 4 << 20

# Seconds between looks at which workers there are, and without any until a run gives up.
_LOOK, _ALONE = 1.0, 120.0

# How often a task is tried again that fails on a worker for want of memory, say.
_RETRIES = 2

# How often a file that a worker wrote is looked for, and seconds between looks.
_TRIES, _PAUSE = 20, 0.5


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
        """What `passes.encoding.encoder.Workers` says."""
        self.shared()
        place = None if cache is None else Place.marked(cache.folder)
        ahead = Ahead(self, model, work, plan, cache=place, compare=compare, progress=progress)
        try:
            yield ahead.encoded
        finally:
            ahead.cancel()
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
        self._cluster, self._plan, self._progress = cluster, plan, progress
        self._values = initializers(model)
        self._waiting = collections.deque(_batches(work))
        self._unsent = {site.name for site in work}
        self._files: dict[str, os.stat_result] = {}
        self._frame = Batch(
            (), versions(plan[site.name].codec for site in work), cluster.exchange, cache, compare,
            blas_threads(),
        )  # fmt: skip
        self._exchange = PayloadCache(cluster.exchange.folder, make=False)
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._flying: dict[Any, tuple[WeightSite, ...]] = {}
        self._answers: dict[str, Answer] = {}
        self._name = f"onnxcomp-{secrets.token_hex(4)}"
        self._sent = self._done = 0
        self._total = sum(site.nbytes for site in work)
        self._workers, self._looked, self._seen = 0, -_LOOK, time.monotonic()

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
        answer = self._answers.pop(site.name)
        for _ in range(_TRIES):
            found = answer.encoded(site, self._plan[site.name], self._exchange)
            if found is not None:
                return found
            time.sleep(_PAUSE)  # folders of networks may lag behind
        raise CompressionError(
            f"what a worker wrote of {site.name!r} is not in {self._cluster.exchange.folder}",
            hint="put the output into a folder that workers do not see, or look at its file system",
        )

    def _send(self, wanted: str) -> None:
        """Let the cluster have as many tasks as it can work on, the wanted weight among them."""
        if time.monotonic() - self._looked >= _LOOK:
            self._workers, self._looked = self._cluster.workers(), time.monotonic()
            if self._workers:
                self._seen = self._looked
        most = max(1, self._workers)  # none waits behind another one, which may take long
        if len(self._flying) < most and wanted in self._unsent:
            batch = next(b for b in self._waiting if any(site.name == wanted for site in b))
            self._waiting.remove(batch)
            self._waiting.appendleft(batch)
        while self._waiting and len(self._flying) < most:
            self._submit(self._waiting.popleft())
        if self._progress is not None:
            at = f"{len(self._flying)} tasks on {self._workers} workers"
            self._progress(self._done, self._total, at)

    def _submit(self, sites: tuple[WeightSite, ...]) -> None:
        items = tuple(Item(site, self._plan[site.name], self._stored(site)) for site in sites)
        self._unsent -= {site.name for site in sites}
        self._sent += 1
        future = self._cluster.client.submit(
            encode_batch,
            dataclasses.replace(self._frame, items=items),
            key=(self._name, self._sent),
            retries=_RETRIES,
        )
        self._flying[future] = sites
        future.add_done_callback(self._ended.put)

    def _stored(self, site: WeightSite) -> FilePart | Array:
        """Where workers find a tensor: in the model's file, or in one that is written for them."""
        tensor = self._values[site.name].const_value
        assert tensor is not None
        if isinstance(tensor, MappedTensor):
            if tensor.path not in self._files:
                self._files[tensor.path] = os.stat(tensor.path)
            return FilePart.of(tensor, self._files[tensor.path])
        array = np.ascontiguousarray(tensor.numpy())
        if array.nbytes <= SMALL or not self._cluster.shared():
            return array
        path = self._sent_file(site)
        path.write_bytes(array.reshape(-1).view(np.uint8).data)
        mapped = MappedTensor(str(path), 0, array.nbytes, tensor.dtype, ir.Shape(array.shape))
        return FilePart.of(mapped, path.stat())

    def _sent_file(self, site: WeightSite) -> Path:
        digest = hashlib.sha256(site.name.encode()).hexdigest()
        return Path(self._cluster.exchange.folder, f"{digest}.weight")

    def _receive(self) -> None:
        """Wait a moment for a task to end, and take what it gives."""
        try:
            future = self._ended.get(timeout=_LOOK)
        except queue.Empty:
            if time.monotonic() - self._seen > _ALONE:
                raise CompressionError(
                    f"the scheduler at {self._cluster.address} has had no workers for "
                    f"{_ALONE:.0f} seconds",
                    hint="start workers; with --cache what was encoded is kept",
                ) from None
            return
        sites = self._flying.pop(future)
        self._send("")  # the worker need not wait until the result is here
        for answer in self._results(future, sites):
            self._answers[answer.name] = self._kept(answer)
        for site in sites:
            self._done += site.nbytes
            self._sent_file(site).unlink(missing_ok=True)

    def _results(self, future: Any, sites: tuple[WeightSite, ...]) -> list[Answer]:
        """What a task gave; raises what came of it else."""
        if future.status == "error":
            error = future.exception()
            lost = type(error).__name__ == "KilledWorker"
            names = ", ".join(site.name for site in sites[:3])
            raise CompressionError(
                f"{names} cannot be encoded on the cluster: "
                + ("several workers were lost with it" if lost else repr(error)),
                hint="look at the memory of the workers" if lost else "look at their logs",
            ) from error
        if future.status != "finished":
            raise self._cluster.lost()
        found: list[Answer] | CompressionError = future.result()
        if isinstance(found, CompressionError):
            raise found
        return found

    def _kept(self, answer: Answer) -> Answer:
        """An answer that takes little memory: a large payload goes to a file."""
        size = sum(tensor.nbytes for tensor in (answer.tensors or {}).values())
        if answer.tensors is None or size <= SMALL:
            return answer
        key = secrets.token_hex(16)
        if not self._exchange.put_tensors(key, answer.tensors, answer.attributes):
            return answer
        return dataclasses.replace(answer, tensors=None, attributes={}, key=key)

    def cancel(self) -> None:
        """Take back what is with the cluster."""
        if self._flying:
            with contextlib.suppress(OSError):
                self._cluster.client.cancel([*self._flying], force=True)


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
