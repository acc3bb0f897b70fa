"""What a Dask cluster refuses, and what a run leaves that ends early."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import onnxcomp
from onnxcomp.errors import CompressionError, ModelError, RuntimeMissingError, UsageError
from onnxcomp.passes.encoding import cluster as cluster_module
from onnxcomp.passes.encoding import cluster_connection, cluster_tasks
from onnxcomp.passes.encoding.cluster_calls import Calls

distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")

# Seconds that a run on a busy machine may take to get somewhere.
_PATIENCE = 180


def test_other_versions_are_refused(
    model: Path, workers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {**cluster_tasks.versions(), "onnxcomp": "9.9", "Python": "3.99"}
    own = cluster_tasks.versions()
    options = {"bits": 4, "scheduler": workers.scheduler_address}
    # Seen when workers are looked at, and of workers that came later, by the tasks.
    for module in (cluster_connection, cluster_module):
        with monkeypatch.context() as patch:
            patch.setattr(module, "versions", lambda *_: other)
            with pytest.raises(UsageError, match="has other versions") as caught:
                onnxcomp.optimize(model, tmp_path / "out.onnx", verify=False, **options)
        assert f"onnxcomp {own['onnxcomp']} there and 9.9 here" in caught.value.message
        assert f"Python {own['Python']} there and 3.99 here" in caught.value.message
        assert "install the same" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_codecs_of_other_packages_are_compared_by_their_code() -> None:
    found = cluster_tasks.versions(["hyper", "of nobody"])
    assert found["codec of nobody"] == "missing" and "codec hyper" not in found
    there = {**found, "codec of nobody": "1234"}
    assert cluster_tasks.differences(there, found) == "codec of nobody 1234 there and missing here"


def test_workers_take_the_threads_of_the_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Factorisations round otherwise with another number of them."""
    asked: list[int] = []
    monkeypatch.setattr(cluster_tasks, "use_blas_threads", asked.append)
    place = cluster_tasks.Place.marked(tmp_path)
    assert (
        cluster_tasks.encode_batch(cluster_tasks.Batch((), cluster_tasks.versions(), place)) == []
    )
    batch = cluster_tasks.Batch((), cluster_tasks.versions(), place, blas=3)
    assert cluster_tasks.encode_batch(batch) == [] and asked == [3]
    place.unmark()
    assert not place.seen and not list(tmp_path.iterdir())


@dataclasses.dataclass
class Ended:
    """A future that has ended in some way."""

    status: str
    error: Exception | None = None

    def exception(self) -> Exception | None:
        return self.error


@pytest.mark.parametrize(
    ("future", "message"),
    [
        (Ended("error", distributed.scheduler.KilledWorker("k", None, 3)), "several workers were"),
        (Ended("error", OSError("no such disk")), "no such disk"),
        (Ended("lost"), "the scheduler at there:1 is gone"),
        (Ended("cancelled"), "the scheduler at there:1 is gone"),
    ],
    ids=str,
)
def test_what_ends_a_run(future: Ended, message: str, tmp_path: Path) -> None:
    place = cluster_tasks.Place.marked(tmp_path)
    cluster = cluster_module.Cluster(None, "there:1", place, lambda: True)
    with pytest.raises(CompressionError, match=message) as caught:
        Calls(cluster).outcome(future, ["w0"])
    assert caught.value.hint


def test_an_address_where_nobody_answers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_connection, "_CONNECT", 1)
    with socket.socket() as silent:  # takes connections and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (9, silent.getsockname()[1]):
            start = time.monotonic()
            with pytest.raises(UsageError, match=rf"no scheduler .* at 127.0.0.1:{port}") as caught:
                onnxcomp.optimize(model, tmp_path / "out.onnx", scheduler=f"127.0.0.1:{port}")
            assert time.monotonic() - start < 20 and "dask scheduler" in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["nowhere", "local:0", "local:x", "", "tcp://", 3])
def test_texts_that_are_no_address(model: Path, tmp_path: Path, text: Any) -> None:
    with pytest.raises(UsageError, match="scheduler is") as caught:
        onnxcomp.optimize(model, tmp_path / "out.onnx", scheduler=text)
    assert "local:N" in caught.value.hint


def test_without_dask_the_package_to_install_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RuntimeMissingError) as caught:
        onnxcomp.optimize(model, tmp_path / "out.onnx", scheduler="local:2")
    assert caught.value.hint == "pip install 'onnxcomp[distributed]'"


def test_a_file_that_is_another_one_is_refused(model: Path) -> None:
    data = model.with_name("model.onnx.data")
    status = data.stat()
    part = cluster_tasks.FilePart(str(data), 0, 64, 1, (4, 4), status.st_size, status.st_mtime_ns)
    assert part.read().shape == (4, 4)
    for change in ({"size": 1}, {"modified": 1}, {"path": f"{data}.gone"}):
        with pytest.raises(ModelError) as caught:
            dataclasses.replace(part, **change).read()
        assert "folder" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "everybody", "busy"),
    [
        (signal.SIGINT, True, True),
        (signal.SIGINT, True, False),
        (signal.SIGTERM, True, True),
        (signal.SIGTERM, True, False),
        (signal.SIGTERM, False, True),
    ],
)
def test_signals_leave_nothing(
    model: Path, tmp_path: Path, number: signal.Signals, everybody: bool, busy: bool
) -> None:
    """Terminals and supervisors mean the workers of this machine as well, which may be starting."""
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    words = ["optimize", model, "-o", tmp_path / "out.onnx", "--no-verify"]
    words += ["--method", "hash", "--include", "w[89]"]  # some seconds of work
    environment = {
        **os.environ,
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    words += ["--scheduler", "local:2"]
    with subprocess.Popen(
        [sys.executable, "-m", "onnxcomp", *map(str, words)],
        env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        known: list[Any] = []
        deadline = time.monotonic() + _PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            known = psutil.Process(process.pid).children(recursive=True)
            if list(tmp_path.glob(".*/exchange/*.payload")) or (not busy and len(known) >= 2):
                break
            time.sleep(0.01)
        (os.killpg if everybody else os.kill)(process.pid, number)
        try:
            _, err = process.communicate(timeout=_PATIENCE)
        finally:
            process.kill()  # which a process that has ended does not mind
    assert process.returncode == 128 + number, err
    lines = [line for line in err.splitlines() if not line.startswith(("encoding: ", "now: "))]
    # Python itself complains in processes that have not come to their first line yet.
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert lines.count(f"error: {word}") == 1 and (len(lines) == 1 or not busy), lines
    assert not list(tmp_path.iterdir())
    assert len(known) >= 2
    gone, alive = psutil.wait_procs(known, timeout=20)
    assert not alive and gone


def test_nothing_is_said_of_workers_that_were_ended(tmp_path: Path) -> None:
    """Dask sees connections that were cut when its cluster is closed and its logs speak again."""

    async def serving() -> int:
        return threading.get_ident()

    logger, handler = logging.getLogger("distributed"), logging.StreamHandler()
    logger.addHandler(handler)
    try:
        with cluster_connection.connected("local:1", tmp_path) as cluster:
            assert cluster is not None
            record = logging.LogRecord(logger.name, logging.INFO, "", 0, "cut", (), None)
            record.thread = cluster.client.sync(serving)
    finally:
        logger.removeHandler(handler)
    assert not handler.filter(record)
    record.thread = threading.get_ident()  # those of others go on
    assert handler.filter(record)
