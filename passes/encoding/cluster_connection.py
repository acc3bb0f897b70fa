"""The workers of a Dask cluster: found or started, compared with this process, let go.

Dask schedules, moves results, and runs the tasks of lost workers again. Nothing here does that.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.passes.config.scheduler import local_workers
from onnxcomp.passes.encoding.cluster import Cluster
from onnxcomp.passes.encoding.cluster_tasks import Place, differences, look_around, versions
from onnxcomp.passes.ir.atomic import uninterrupted
from onnxcomp.runtime.activity import activity

__all__ = ["connected", "local_cluster"]

log = logging.getLogger(__name__)

# Seconds in which a scheduler answers, and in which it gets its first worker.
_CONNECT, _FIRST_WORKER = 5, 60

# Seconds that the end of workers of this machine takes at most.
_CLOSE = 2

# Settings of workers of this machine. Dask lets them give memory back to the system at once, and
# getting it again for every weight costs half as much as encoding does. Samples of what they are at
# are taken a hundred times a second, and nobody looks at them.
_WORKERS = {
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
    "distributed.worker.profile.enabled": False,
}

# Name of the folder that payloads go through.
_EXCHANGE = "exchange"

# The threads on which Dask served workers of this machine that were started here.
_SERVING: set[int] = set()


@contextlib.contextmanager
def connected(scheduler: str, folder: Path) -> Iterator[Cluster]:
    """The cluster that a run asks for.

    Workers that are started here end with the block, and so do tasks that are not done.

    Args:
        scheduler: ``local``, ``local:N`` or an address.
        folder: Of this run; gone after it.

    Raises:
        RuntimeMissingError: Dask is not installed.
        UsageError: There is no such scheduler, it has no workers, or their versions differ.
    """
    distributed = _distributed()
    activity("looking for workers")
    place = folder / _EXCHANGE
    place.mkdir()
    exchange = Place.marked(place)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(distributed, scheduler, folder))
        # Whoever still writes finds no folder of this name, and leaves nothing behind.
        stack.callback(place.rename, folder / f"{_EXCHANGE}.closed")
        shared = functools.cache(lambda: _examined(client, scheduler, exchange))
        if local_workers(scheduler) is None:  # those of this machine are still about to start
            shared()
        yield Cluster(client, scheduler, exchange, shared)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise RuntimeMissingError(
            f"many machines need Dask: {error}", hint="pip install 'onnxcomp[distributed]'"
        ) from error
    return distributed


@contextlib.contextmanager
def _client(distributed: Any, scheduler: str, folder: Path) -> Iterator[Any]:
    """A client of a cluster that runs, or of one that is started and ended here."""
    count = local_workers(scheduler)
    if count is None:
        try:
            _greet(scheduler)
            client = distributed.Client(scheduler, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError, TypeError, distributed.TimeoutError) as error:
            said = str(error) or "it says nothing"
            raise UsageError(
                f"no scheduler of Dask answers at {scheduler}: {said}",
                hint="start one with `dask scheduler`, or take workers of this machine: local:2",
            ) from error
        with client:
            yield client
        return
    others = set(multiprocessing.active_children())
    cluster = client = None
    try:
        with uninterrupted():  # Dask takes long to end what is half begun
            cluster = local_cluster(distributed, folder)
            client = distributed.Client(cluster, set_as_default=False)
            cluster.sync(_silence)
        cluster.scale(count or os.cpu_count() or 1)  # they start beside what comes next
        yield client
    finally:
        _end(client, cluster, others)


def _greet(scheduler: str) -> None:
    """Connect for a moment: a client would wait for ever where somebody listens and says nothing.

    Raises:
        Exception: There is no answer of Dask.
    """
    from distributed import Security
    from distributed.core import connect

    async def greeting() -> None:
        keys = Security().get_connection_args("client")
        wanted = connect(scheduler, timeout=_CONNECT, **keys)
        (await asyncio.wait_for(wanted, 2 * _CONNECT)).abort()

    # On a thread, where there is no loop yet: notebooks have one.
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        executor.submit(asyncio.run, greeting()).result()


def local_cluster(distributed: Any, folder: Path, count: int = 0) -> Any:
    """Worker processes of this machine, which nobody else can reach.

    Args:
        distributed: The package.
        folder: Takes files of the workers.
        count: Workers to wait for; the cluster may be scaled later.
    """
    import dask

    with dask.config.set(_WORKERS):
        return distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            scheduler_kwargs={"dashboard": False, "dashboard_address": "127.0.0.1:0"},
            worker_dashboard_address=None,
            memory_limit=0,  # encoding is bounded by the largest weight; a limit would only stop it
            local_directory=str(folder),
            silence_logs=logging.CRITICAL,
            preload=["onnxcomp.passes.encoding.local_worker"],
        )


async def _silence() -> None:
    """Say nothing of workers that were started here, not even after their cluster has ended.

    Dask silences its logs until a cluster is closed, and sees cut connections later than that.
    """
    _SERVING.add(threading.get_ident())
    for handler in logging.getLogger("distributed").handlers:
        handler.addFilter(_of_others)


def _of_others(record: logging.LogRecord) -> bool:
    return record.thread not in _SERVING


def _end(client: Any, cluster: Any, others: Collection[Any]) -> None:
    """End the workers of this machine at once: they hold nothing, and asking them takes seconds.

    A signal may have ended some that are started anew then, and Dask waits for what never comes.
    None is left: it would make the folder again that its files lie in.

    Args:
        client: The client, if there is one.
        cluster: The workers, if there are some; those that are still starting are not among
            `cluster.workers`.
        others: Processes that were there before.
    """
    for nanny in [] if cluster is None else list(cluster._created):
        nanny.auto_restart = False
        if nanny.pid is not None and sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)
    for open_one in (client, cluster):
        if open_one is not None:
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                open_one.close(timeout=_CLOSE)
    if cluster is not None:
        cluster.shutdown_on_close = False  # or it would wait again when Python ends
    for process in multiprocessing.active_children():
        if process not in others:
            process.kill()
            process.join(_CLOSE)


def _examined(client: Any, scheduler: str, exchange: Place) -> bool:
    """Whether all workers see the exchange; those with other versions are refused."""
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER)
    except _distributed().TimeoutError as error:
        raise UsageError(
            f"the scheduler at {scheduler} has no workers after {_FIRST_WORKER} seconds",
            hint=f"start some: dask worker {scheduler}",
        ) from error
    found = client.run(look_around, (exchange,), on_error="return")
    own = versions()
    for address, seen in found.items():
        if isinstance(seen, BaseException):
            raise UsageError(
                f"the worker {address} cannot run onnxcomp: {seen!r}",
                hint="install the same onnxcomp on all machines",
            )
        wrong = differences(seen[0], own)
        if wrong:
            raise UsageError(
                f"the worker {address} has other versions: {wrong}",
                hint="install the same onnxcomp, Python and numpy on all machines",
            )
    _tell([*found.values()])
    return all(seen for _, (seen,) in found.values())


def _tell(found: list[Any]) -> None:
    away = sum(not seen for _, (seen,) in found)
    log.info("%d workers, %d of which do not see the folder of the output", len(found), away)
