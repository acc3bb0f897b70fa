"""A small model that has everything: what other tools miss in it is compressed here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.ops import library_path

GRAPH = """
ten_nodes (int64[N] ids, bool go) => (float[N, 1000] logits, float[N, 1, 1, 64] track) {
    x = Gather <axis = 0> (emb, ids)
    h = MatMul (x, fc1)
    r = Relu (h)
    d = MatMul (r, fc2)
    q = Gemm <transB = 1> (d, fc3, bias)
    s = If (go) <
        then_branch = yes () => (float[N, 256] a) { a = MatMul (q, outer) },
        else_branch = no () => (float[N, 256] b) { b = MatMul (q, own) }
    >
    steps = Unsqueeze (s, one)
    track, last, cell = LSTM <hidden_size = 64> (steps, lstm_w, lstm_r)
    turned = Transpose <perm = [1, 0]> (emb)
    logits = MatMul (s, turned)
}
"""
SHAPES = {
    "emb": (1000, 256), "fc1": (256, 1024), "fc2": (1024, 256), "fc3": (256, 256),
    "outer": (256, 256), "lstm_w": (1, 256, 256), "lstm_r": (1, 256, 64),
}  # fmt: skip

RUN = """
import sys
import numpy as np
import onnxruntime as ort

model, library, feeds, out = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
if library:
    options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
results = []
for go in (True, False):
    ids = np.load(feeds)
    results += session.run(["logits", "track"], {"ids": ids, "go": np.array(go)})
np.savez(out, *results)
print(ort.__version__)
"""


def ten_nodes() -> onnx.ModelProto:
    rng = np.random.default_rng(3)

    def weight(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
        values = rng.standard_normal(shape).astype(np.float32) / np.float32(shape[-1] ** 0.5)
        return numpy_helper.from_array(values, name)

    graph = onnx.parser.parse_graph(GRAPH)
    graph.initializer.extend(weight(name, shape) for name, shape in SHAPES.items())
    graph.initializer.append(numpy_helper.from_array(np.zeros(256, np.float32), "bias"))
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    graph.node[5].attribute[1].g.initializer.append(weight("own", (256, 256)))
    imports = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("ten_nodes")
    dense, small = folder / "dense.onnx", folder / "small.onnx"
    onnx.save(ten_nodes(), dense)
    oc.optimize(dense, small, bits=4)
    return dense, small


def results(python: str, model: Path, library: str, folder: Path) -> list[np.ndarray]:
    np.save(folder / "ids.npy", np.arange(0, 1000, 77))
    line = [python, "-c", RUN, str(model), library, str(folder / "ids.npy"), str(folder / "y.npz")]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(folder / "y.npz") as file:
        return [file[name] for name in file.files]


def test_every_weight_is_covered_and_the_tied_table_is_stored_once(
    models: tuple[Path, Path],
) -> None:
    dense, small = models
    found = oc.inspect(small)
    # Nothing lies between the second and the third product: they became one.
    names = {*SHAPES, "own", "fc3/folded"} - {"fc2", "fc3"}
    assert {weight.name for weight in found.compressed} == names
    assert not found.sites
    stored = onnx.load(small).graph.initializer
    assert sum(tensor.name.startswith("emb::") for tensor in stored) == 2
    assert not {"emb", "turned"} & {tensor.name for tensor in stored}
    assert small.stat().st_size < dense.stat().st_size / 7


def test_the_checker_passes(models: tuple[Path, Path]) -> None:
    onnx.checker.check_model(models[1], full_check=True)


def test_releases_of_the_runtime_run_both_forms_alike(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, small = models
    others = os.environ.get("ONNXCOMP_ORT_PYTHONS", "")
    for python in filter(None, [sys.executable, *others.split(os.pathsep)]):
        exact = results(python, dense, "", tmp_path)
        library = results(python, small, str(library_path()), tmp_path)
        portable = results(python, small, "", tmp_path)
        for one, two, three in zip(exact, library, portable, strict=True):
            norm = np.linalg.norm(one)
            # Four products one after the other with 4-bit weights; 8-bit activations beside them.
            assert np.linalg.norm(two - one) < 0.3 * norm
            assert np.linalg.norm(three - two) < 0.03 * norm
