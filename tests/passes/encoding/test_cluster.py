"""Encoding on a Dask cluster: the same bytes, whatever happens to its workers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.passes.conftest import build, weight

import onnxcomp
from onnxcomp.errors import CompressionError, ModelError, RuntimeMissingError, UsageError
from onnxcomp.passes.calibration import segmented_run
from onnxcomp.passes.calibration.blas_threads import one_blas_thread
from onnxcomp.passes.calibration.sums import Sums
from onnxcomp.passes.codecs.hyper.codec import HyperCodec
from onnxcomp.passes.encoding import cluster as cluster_module
from onnxcomp.passes.encoding import cluster_connection, cluster_tasks
from onnxcomp.passes.encoding.cluster_calls import Calls
from onnxcomp.passes.encoding.cluster_fitting import fit_weight

distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")

SEED = np.random.default_rng(11)

# Seconds that a run on a busy machine may take to get somewhere.
_PATIENCE = 180
# Weights of several sizes; each of the larger ones is a task of its own.
SHAPES = [(128, 128)] * 6 + [(128, 1024), (1024, 1100), (1100, 256), (256, 512)]
# Weights for methods that take long.
FEW = {"include": ["w[0-6]"]}


def model_of(shapes: list[tuple[int, int]]) -> onnx.ModelProto:
    """Products one behind the other, with weights whose singular values fall."""
    nodes, weights = [], []
    for number, (rows, columns) in enumerate(shapes):
        rank = min(rows, columns) // 8
        thin = SEED.standard_normal((rows, rank)) @ SEED.standard_normal((rank, columns))
        weight = thin / rank + 0.1 * SEED.standard_normal((rows, columns))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        names = [f"x{number}", f"w{number}"]
        nodes.append(helper.make_node("MatMul", names, [f"y{number}"], f"n{number}"))
        nodes.append(helper.make_node("Relu", [f"y{number}"], [f"x{number + 1}"], f"r{number}"))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x0", 1, ["n", shapes[0][0]])],
        [helper.make_tensor_value_info(f"x{len(shapes)}", 1, ["n", shapes[-1][1]])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers take as many threads for linear algebra as this process: many are slow here."""
    with one_blas_thread():
        yield


@pytest.fixture(scope="module")
def proto() -> onnx.ModelProto:
    return model_of(SHAPES)


@pytest.fixture(scope="module")
def model(proto: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    copy = onnx.ModelProto.FromString(proto.SerializeToString())  # saving changes it
    onnx.save(copy, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker processes."""
    with cluster_connection.local_cluster(
        distributed, tmp_path_factory.mktemp("workers"), 2
    ) as found:
        yield found


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.parent.iterdir())
    }


def compress(model: Any, folder: Path, **options: Any) -> dict[str, str]:
    """Hashes of all that is in a new folder then."""
    folder.mkdir()
    result = onnxcomp.optimize(model, folder / "out.onnx", verify=False, **options)
    assert result.report.coverage > 0.1  # of the weights that may be
    return digests(folder / "out.onnx")


@contextlib.contextmanager
def on_a_busy_worker(workers: Any, act: Callable[[int], None]) -> Iterator[list[int]]:
    """While the block runs, do something to the first worker that is at a task of ours."""
    pids = {nanny.worker_address: nanny.pid for nanny in workers.workers.values()}
    assert len(workers.scheduler.workers) == len(pids) == 2
    found: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not found and not ended.wait(0.002):
            for address, state in list(workers.scheduler.workers.items()):
                if any("onnxcomp" in str(task.key) for task in list(state.processing)):
                    found.append(pids[address])
                    act(pids[address])
                    return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "external_data": "always", "min_size": 1},
        {"method": "int", "bits": 8},
        {"method": "lowrank", "set_": [".*:rank=24"], **FEW},
        {"method": "lowrank+hyper", "set_": [".*:rank=32"], **FEW},
        {"method": "hash", "bits": 4, **FEW},
    ],
    ids=lambda options: options.get("method", "hyper"),
)
def test_bytes_are_those_of_one_process(
    model: Path, workers: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    alone = compress(model, tmp_path / "alone", **options)
    many = compress(model, tmp_path / "many", scheduler=workers.scheduler_address, **options)
    assert many == alone


@pytest.fixture(scope="module")
def calibrated(decoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a calibrated run: products of one value, streams, a table with products."""
    model, data = decoder_folder / "model.onnx", tmp_path_factory.mktemp("data") / "data.npz"
    cache = np.zeros((20, 2, 0, 16), np.float32)
    names = [value.name for value in onnx.load(model, load_external_data=False).graph.input]
    feeds = {name: cache for name in names if name.startswith("past_key_values.")}
    feeds |= {"input_ids": SEED.integers(0, 320, (20, 12))}
    feeds |= {"attention_mask": np.ones((20, 12), np.int64)}
    feeds |= {"position_ids": np.tile(np.arange(12), (20, 1))} if "position_ids" in names else {}
    np.savez(data, **feeds)
    return {"model": model, "data": data, "bits": 3, "tune": 0, "min_size": 1 << 10}


@pytest.fixture(scope="module")
def alone(calibrated: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the same run writes in one process."""
    return compress(folder=tmp_path_factory.mktemp("alone") / "alone", **calibrated)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weights that workers encode for their inputs; nobody else does, nor runs the model."""
    names: list[str] = []
    original = Calls.call

    def call(self: Calls, function: Any, argument: Any, about: Any) -> Any:
        names.extend(about if function is fit_weight else ())
        return original(self, function, argument, about)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the client does it")

    monkeypatch.setattr(Calls, "call", call)
    monkeypatch.setattr(HyperCodec, "encode_calibrated", refused)
    monkeypatch.setattr(Sums, "add", refused)
    monkeypatch.setattr(segmented_run, "segment_runner", refused)
    return names


def test_calibrated_bytes_are_those_of_one_process(
    calibrated: dict[str, Any],
    alone: dict[str, str],
    workers: Any,
    tmp_path: Path,
    called: list[str],
) -> None:
    seen: list[tuple[int, int, str]] = []
    many = compress(
        folder=tmp_path / "many",
        scheduler=workers.scheduler_address,
        progress=lambda *at: seen.append(at),
        **calibrated,
    )
    assert many == alone
    assert len(called) == len(set(called)) == 15
    done = [at[0] for at in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1]
    assert any("tasks on 2 workers" in at[2] for at in seen)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lowrank", "set_": [".*:rank=24"]},
        {"calibration": "parallel", "bits": 3},
        {"bits": 4, "include": ["w[589]"]},
    ],
    ids=["lowrank", "parallel", "wide"],
)
def test_other_ways_of_calibrating(
    model: Path, workers: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    np.savez(tmp_path / "data.npz", x0=SEED.standard_normal((64, 128)).astype(np.float32))
    options = {"data": tmp_path / "data.npz", "tune": 0, **FEW, **options}
    alone = compress(model, tmp_path / "alone", **options)
    many = compress(model, tmp_path / "many", scheduler=workers.scheduler_address, **options)
    assert many == alone


# Convolutions whose offsets are shifted, one of them in groups.
PICTURES = """
pictures (float[n, 16, 8, 8] x) => (float[n, 32] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    ar = Relu (a)
    c = Conv <pads = [1, 1, 1, 1], group = 4> (ar, w2, b2)
    cr = Relu (c)
    d = Conv (cr, w3, b3)
    e = Add (d, ar)
    g = ReduceMean <axes = [2, 3], keepdims = 0> (e)
    y = MatMul (g, w4)
}
"""


def test_shifts_of_offsets_come_back(workers: Any, tmp_path: Path) -> None:
    shapes = {"w1": (32, 16, 3, 3), "w2": (32, 8, 3, 3), "w3": (32, 32, 1, 1), "w4": (32, 32)}
    weights = {name: weight(*shape) / 8 for name, shape in shapes.items()}
    weights |= {name: weight(32) for name in ("b1", "b2", "b3")}
    model, data = tmp_path / "model.onnx", tmp_path / "data.npz"
    onnx.save(build(PICTURES, weights), model)
    np.savez(data, x=SEED.uniform(0, 1, (20, 16, 8, 8)).astype(np.float32))
    options = {"data": data, "bits": 2, "tune": 0, "min_size": 1 << 10}
    alone = compress(model, tmp_path / "alone", **options)
    many = compress(model, tmp_path / "many", scheduler=workers.scheduler_address, **options)
    assert many == alone
    stored = onnx.load(tmp_path / "many" / "out.onnx").graph.initializer
    biases = {tensor.name: numpy_helper.to_array(tensor) for tensor in stored}
    assert any(not np.array_equal(biases[name], weights[name]) for name in ("b1", "b2", "b3"))


def test_workers_that_do_not_see_the_folder_calibrate_nothing(
    calibrated: dict[str, Any],
    alone: dict[str, str],
    workers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = cluster_tasks.Place
    monkeypatch.setattr(place, "marked", lambda folder: place(str(folder), "nowhere"))
    many = compress(folder=tmp_path / "m", scheduler=workers.scheduler_address, **calibrated)
    assert many == alone


def test_a_worker_that_is_killed_while_it_calibrates(
    calibrated: dict[str, Any],
    alone: dict[str, str],
    workers: Any,
    tmp_path: Path,
    called: list[str],
) -> None:
    with on_a_busy_worker(workers, lambda pid: os.kill(pid, signal.SIGKILL)) as killed:
        many = compress(folder=tmp_path / "m", scheduler=workers.scheduler_address, **calibrated)
    assert killed and called and many == alone


def test_known_weights_are_not_sent_again(
    calibrated: dict[str, Any],
    alone: dict[str, str],
    workers: Any,
    tmp_path: Path,
    called: list[str],
) -> None:
    """A run that was interrupted continues on a cluster, and one of a cluster without it."""
    cache = tmp_path / "cache"
    options = {**calibrated, "cache": cache, "scheduler": workers.scheduler_address}

    def stop(done: int, total: int, _: str) -> None:
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(folder=tmp_path / "stopped", progress=stop, **options)
    assert not list((tmp_path / "stopped").iterdir())
    known = len(list(cache.glob("*.calibrated")))
    assert known and len(list(cache.glob("*.activations"))) == 1
    called.clear()
    assert compress(folder=tmp_path / "continued", **options) == alone
    assert len(called) == 15 - known
    called.clear()
    assert compress(folder=tmp_path / "again", **{**options, "scheduler": None}) == alone
    assert not called and not list(cache.glob("*.part"))


@pytest.mark.parametrize("shared", [True, False])
def test_weights_that_are_in_no_file_are_sent(
    proto: onnx.ModelProto,
    workers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
) -> None:
    alone = compress(proto, tmp_path / "alone", bits=4)
    if not shared:  # workers look for a mark that is not there: all goes through the network
        place = cluster_tasks.Place
        monkeypatch.setattr(place, "marked", lambda folder: place(str(folder), "nowhere"))
    many = compress(proto, tmp_path / "many", bits=4, scheduler=workers.scheduler_address)
    assert many == alone


def test_workers_use_and_fill_the_cache(model: Path, workers: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = {"bits": 4, "cache": cache, "scheduler": workers.scheduler_address}
    first = compress(model, tmp_path / "first", **options)
    stored = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(stored) == len(SHAPES) and all(name.endswith(".payload") for name in stored)
    assert compress(model, tmp_path / "second", **options) == first
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == stored


def test_only_its_own_task_waits_for_a_slow_worker(
    model: Path, workers: Any, tmp_path: Path
) -> None:
    alone = compress(model, tmp_path / "alone", bits=4)
    seen: list[tuple[int, int]] = []
    largest = 4 * max(rows * columns for rows, columns in SHAPES)

    def watch(done: int, total: int, _: str) -> None:
        """All but one task end while a worker stands still."""
        seen.append((done, total))
        if stopped and total - done <= largest and not resumed:
            resumed.append(done)
            os.kill(stopped[0], signal.SIGCONT)

    resumed: list[int] = []
    late: list[int] = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        timer.start()

    def resume() -> None:  # the test fails, and does not hang
        late.append(stopped[0])
        os.kill(stopped[0], signal.SIGCONT)

    timer = threading.Timer(60, resume)
    with on_a_busy_worker(workers, stop) as stopped:
        many = compress(
            model, tmp_path / "many", bits=4, scheduler=workers.scheduler_address, progress=watch
        )
    timer.cancel()
    assert resumed and not late and many == alone
    assert seen == sorted(seen) and seen[0][0] == 0 and seen[-1][0] == seen[-1][1]


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


def test_a_killed_worker_costs_nothing_but_time(model: Path, workers: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "hash", "bits": 4, **FEW}
    alone = compress(model, tmp_path / "alone", **options)
    with on_a_busy_worker(workers, lambda pid: os.kill(pid, signal.SIGKILL)) as killed:
        many = compress(model, tmp_path / "many", scheduler=workers.scheduler_address, **options)
    assert killed and many == alone


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
