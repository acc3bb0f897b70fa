"""Encoding on a Dask cluster: the same bytes, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.passes.conftest import build, weight
from tests.passes.encoding.conftest import (
    FEW,
    SEED,
    SHAPES,
    compress,
    on_a_busy_worker,
)

from onnxcomp.passes.calibration import segmented_run
from onnxcomp.passes.calibration.sums import Sums
from onnxcomp.passes.codecs.hyper.codec import HyperCodec
from onnxcomp.passes.encoding import cluster_tasks
from onnxcomp.passes.encoding.cluster_calls import Calls
from onnxcomp.passes.encoding.cluster_fitting import fit_weight

distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_killed_worker_costs_nothing_but_time(model: Path, workers: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "hash", "bits": 4, **FEW}
    alone = compress(model, tmp_path / "alone", **options)
    with on_a_busy_worker(workers, lambda pid: os.kill(pid, signal.SIGKILL)) as killed:
        many = compress(model, tmp_path / "many", scheduler=workers.scheduler_address, **options)
    assert killed and many == alone
