"""The workers of a Dask cluster: found or started, compared with this process, let go.

Dask schedules, moves results, and runs the tasks of lost workers again. Nothing here does that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.passes.config.scheduler import local_workers
from onnxcomp.passes.encoding.cluster import Cluster
from onnxcomp.passes.encoding.cluster_tasks import Place, differences, look_around, versions
from onnxcomp.runtime.activity import activity

__all__ = ["connected"]

log = logging.getLogger(__name__)

# Seconds in which a scheduler answers, and in which it gets its first worker.
_CONNECT, _FIRST_WORKER = 5, 60

# Name of the folder that payloads go through.
_EXCHANGE = "exchange"


@contextlib.contextmanager
def connected(scheduler: str | None, folder: Path) -> Iterator[Cluster | None]:
    """The cluster that a run asks for; None where it asks for none.

    Workers that are started here end with the block, and so do tasks that are not done.

    Args:
        scheduler: ``local``, ``local:N`` or an address.
        folder: Of this run; gone after it.

    Raises:
        RuntimeMissingError: Dask is not installed.
        UsageError: There is no such scheduler, it has no workers, or their versions differ.
    """
    if scheduler is None:
        yield None
        return
    distributed = _distributed()
    activity("looking for workers")
    place = folder / _EXCHANGE
    place.mkdir()
    exchange = Place.marked(place)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(distributed, scheduler, folder))
        # Whoever still writes finds no folder of this name, and leaves nothing behind.
        stack.callback(place.rename, folder / f"{_EXCHANGE}.closed")
        stack.enter_context(client.as_current())
        yield Cluster(client, scheduler, exchange, _examined(client, scheduler, exchange))


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
            _check_address(distributed, scheduler)
            client = distributed.Client(scheduler, timeout=_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no scheduler of Dask answers at {scheduler}: {error}",
                hint="start one with `dask scheduler`, or take workers of this machine: local:2",
            ) from error
        with client:
            yield client
        return
    cluster = _local(distributed, 0, folder)
    with cluster, distributed.Client(cluster, set_as_default=False) as client:
        try:
            cluster.scale(count or os.cpu_count() or 1)  # in here, so that Ctrl-C ends them
            yield client
        except BaseException:
            _kill(cluster)
            raise


def _check_address(distributed: Any, address: str) -> None:
    """Refuse what a client breaks at: it prints a traceback when the process ends.

    Raises:
        ValueError: The protocol is unknown.
        UsageError: It needs certificates, and there are none.
    """
    from distributed.comm.addressing import parse_address
    from distributed.comm.registry import get_backend

    protocol, _ = parse_address(address)
    get_backend(protocol)
    encrypted = protocol in ("tls", "wss")
    if encrypted and not distributed.Security().get_connection_args("client")["ssl_context"]:
        raise UsageError(
            f"no certificates for {address}: the configuration of Dask names none",
            hint="set distributed.comm.tls there, or use tcp:// in a network that you trust",
        )


def _local(distributed: Any, count: int, folder: Path) -> Any:
    """Worker processes of this machine, which nobody else can reach."""
    return distributed.LocalCluster(
        n_workers=count,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address=None,
        worker_dashboard_address=None,
        memory_limit=0,  # encoding is bounded by the largest weight; a limit would only stop it
        local_directory=str(folder),
        silence_logs=logging.CRITICAL,
        preload=["onnxcomp.passes.encoding.cluster_tasks"],
    )


def _kill(cluster: Any) -> None:
    """End the workers of this machine at once: waiting for what they are at takes seconds.

    Those that are still starting are not among `cluster.workers`.
    """
    for nanny in list(cluster._created):
        nanny.auto_restart = False
        if nanny.pid is not None and sys.platform != "win32":
            with contextlib.suppress(ProcessLookupError):
                os.kill(nanny.pid, signal.SIGKILL)


def _examined(client: Any, scheduler: str, exchange: Place) -> bool:
    """Whether all workers see the exchange; those with other versions are refused."""
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER)
    except TimeoutError as error:
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
