"""One process against two workers of Dask on the same model, in turns."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["WAYS", "in_turns"]

# How a model is compiled: threads of this process, which plans, and workers.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "one process, 1 thread": {"jobs": 1},
    "one process, 2 threads": {"jobs": 2},
    "2 Dask workers": {"jobs": 2, "scheduler": "running"},
    "2 Dask workers, started for it": {"jobs": 2, "scheduler": "local:2"},
}

_WORKERS = 2

# Runs one command in a process of its own, and gives what it measured.
Run = Callable[[Mapping[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def _running() -> Iterator[tuple[str, Callable[[], list[float]]]]:
    """Address of a cluster, and what reads the processor seconds of its workers."""
    import distributed
    import psutil

    from onnxcomp.passes.encoding.cluster_connection import local_cluster

    with (
        tempfile.TemporaryDirectory() as folder,
        local_cluster(distributed, Path(folder), _WORKERS) as cluster,
    ):
        workers = [psutil.Process(nanny.pid) for nanny in cluster.workers.values()]

        def spent() -> list[float]:
            return [sum(worker.cpu_times()[:2]) for worker in workers]

        yield cluster.scheduler_address, spent


def in_turns(run: Run, task: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Each way several times, one after the other in each round.

    Args:
        run: Runs a task of `bench_scale.py`.
        task: The task; its options are changed.
        rounds: How often.

    Returns:
        For each way the medians, and the wall clock of every run with the load before it.
    """
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with _running() as (address, spent):
        for _ in range(rounds):
            for way, options in WAYS.items():
                found[way].append(_one(run, task, dict(options), address, spent))
    first = [one["sha256"] for ones in found.values() for one in ones]
    if len(set(first)) != 1:
        raise SystemExit("the outputs differ")
    return [{"way": way, **_medians(ones)} for way, ones in found.items()]


def _one(
    run: Run,
    task: Mapping[str, Any],
    options: dict[str, Any],
    address: str,
    spent: Callable[[], list[float]],
) -> dict[str, Any]:
    threads = options.pop("jobs")
    if options.get("scheduler") == "running":
        options["scheduler"] = address
    load, before, start = os.getloadavg()[0], spent(), time.perf_counter()
    done = run({**task, "threads": threads, "options": {**task["options"], **options}})
    used = [after - was for after, was in zip(spent(), before, strict=True)]
    workers = [round(part, 2) for part in used] if options.get("scheduler") == address else []
    return {
        "load": round(load, 1),
        "process_seconds": round(time.perf_counter() - start, 1),
        "workers": workers,
        **done,
    }


def _medians(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """What is reported of the runs of one way."""
    middle = {
        name: round(statistics.median(one[name] for one in ones), 2)
        for name in ("wall_seconds", "cpu_seconds", "children_cpu_seconds")
    }
    slowest = [max(one["workers"], default=0.0) for one in ones]
    return {
        **middle,
        "encode_seconds": statistics.median(one["seconds"]["encode"] for one in ones),
        "worker_cpu_seconds": [one["workers"] for one in ones],
        # On a machine with nothing else to do a run takes at most this long: what the client does,
        # and behind it what the busiest worker does.
        "path_seconds": round(
            statistics.median(
                one["cpu_seconds"] + most for one, most in zip(ones, slowest, strict=True)
            ),
            2,
        ),
        "wall_of_each": [one["wall_seconds"] for one in ones],
        "load_of_each": [one["load"] for one in ones],
        "bytes": ones[0]["bytes"],
    }
