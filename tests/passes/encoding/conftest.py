"""A model for clusters, their workers, and ways to compare what they give."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.passes.calibration.blas_threads import one_blas_thread
from onnxcomp.passes.encoding import cluster_connection

SEED = np.random.default_rng(11)

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


@pytest.fixture(scope="module")
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
    distributed = pytest.importorskip("distributed", reason="dask[distributed] is not installed")
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
