"""The operators of CUDAExecutionProvider in real sessions, with emulated kernels.

In the emulated library they are registered for the CPU; everything but the stream is as on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs.hash import bodies as hash_bodies
from onnxcomp.passes.codecs.hash import format as hash_format

Array = np.ndarray[Any, Any]
Run = Callable[[onnx.ModelProto, dict[str, Array]], Array]


@pytest.fixture
def run(emulated: Path) -> Run:
    """The one output of a model, by the emulated library."""

    def run_(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.register_custom_ops_library(str(emulated))
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        result: Array = session.run(None, feeds)[0]
        return result

    return run_


def hash_model(op: str, case: Any, x: Array | None) -> onnx.ModelProto:
    shared = hash_format.shared_tensors(case.geometry, case.sharing)
    values = {key.split(".")[1]: array for key, array in shared.items()}
    codes = np.zeros((1, 1, 1), np.uint8) if case.codes is None else case.codes
    values |= {"memory": case.memory, "scale": case.scale, "codes": codes}
    inputs, names, kind = [], list(hash_format.NODE_INPUTS), TensorProto.FLOAT
    attributes: dict[str, Any] = {"extent": [case.geometry.rows, case.geometry.length]}
    if x is not None:
        element = helper.np_dtype_to_tensor_dtype(x.dtype)
        inputs, names = [helper.make_tensor_value_info("x", element, x.shape)], ["x", *names]
        if op == "HashMatMul":
            kind = element
            attributes["dtype"] = element
    node = helper.make_node(op, names, ["y"], domain="com.onnxcomp", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        inputs,
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(values[name], name) for name in hash_format.NODE_INPUTS],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.onnxcomp", 1)]
    bodies = list(hash_bodies.functions(17))
    return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=8)


def near(got: Array, x: Array, dense: Array, tolerance: float) -> None:
    exact = x.astype(np.float64) @ dense.T.astype(np.float64)
    unit = np.linalg.norm(x.astype(np.float64), axis=-1)[..., None]
    unit = unit * np.linalg.norm(dense.astype(np.float64), axis=-1)
    assert got.shape == exact.shape
    assert (np.abs(got - exact) <= tolerance * unit).all()


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize("shape", [(200,), (1, 200), (2, 3, 200), (0, 200), (3000, 200)])
def test_hyper_products(hyper: Any, run: Run, shape: tuple[int, ...], precision: int) -> None:
    weight = hyper.random_weight(40, 200)
    for dtype, kind, tolerance in (
        (np.float32, TensorProto.FLOAT, 2.0**-21),
        (np.float16, TensorProto.FLOAT16, 2.0**-10),
    ):
        model = hyper.make_model(
            "HyperMatMul", weight, (kind, [None] * len(shape)), attributes={"precision": precision}
        )
        x = np.random.default_rng(0).normal(size=shape).astype(dtype)
        y = run(model, {"x": x})
        assert y.dtype == dtype
        near(y, x, weight.dense(), tolerance)


def test_bfloat16_products(hyper: Any, run: Run) -> None:
    weight = hyper.random_weight(40, 200)
    model = hyper.make_model(
        "HyperMatMul", weight, (TensorProto.FLOAT, [None, None]), cast=TensorProto.BFLOAT16
    )
    x = np.random.default_rng(0).integers(-8, 9, (3, 200)).astype(np.float32)
    near(run(model, {"x": x}), x, weight.dense(), 2.0**-7)


def test_hyper_tables_with_levels_are_recognised_and_those_fed_at_run_time_served(
    hyper: Any, run: Run
) -> None:
    weight = hyper.random_weight(40, 300, states=12, leveled=True)
    x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    for fed in ((), ("table",)):
        model = hyper.make_model("HyperMatMul", weight, (TensorProto.FLOAT, [None, None]), fed=fed)
        y = run(model, {"x": x, **dict.fromkeys(fed, weight.table)})
        near(y, x, weight.dense(), 2.0**-21)


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_rows_by_index(hyper: Any, benchmarks: Any, run: Run, kind: Any) -> None:
    weight, case = hyper.random_weight(20, 70, group=64), benchmarks.hash_case(20, 70)
    element = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    for indices in (np.array([[0, 19], [-20, -1]], kind), np.zeros((0, 2), kind)):
        model = hyper.make_model("HyperGather", weight, (element, [None, None]))
        np.testing.assert_array_equal(run(model, {"x": indices}), weight.dense()[indices])
        shared = hash_model("HashGather", case, indices)
        np.testing.assert_array_equal(run(shared, {"x": indices}), case.dense()[indices])


def test_whole_weights(hyper: Any, benchmarks: Any, run: Run) -> None:
    weight, case = hyper.random_weight(20, 70), benchmarks.hash_case(20, 70)
    np.testing.assert_array_equal(
        run(hyper.make_model("HyperDecode", weight, None), {}), weight.dense()
    )
    np.testing.assert_array_equal(run(hash_model("HashDecode", case, None), {}), case.dense())


@pytest.mark.parametrize("memory", ["float32", "float16", "int8"])
@pytest.mark.parametrize("stride", [0, 5])
def test_hash_products(benchmarks: Any, run: Run, memory: str, stride: int) -> None:
    chunk = {"chunk": 8, "slots": 90} if stride else {}
    case = benchmarks.hash_case(40, 200, memory=memory, stride=stride, **chunk)
    for dtype, tolerance in ((np.float32, 2.0**-21), (np.float16, 2.0**-10)):
        for batch in (1, 30):
            x = np.random.default_rng(0).normal(size=(batch, 200)).astype(dtype)
            near(run(hash_model("HashMatMul", case, x), {"x": x}), x, case.dense(), tolerance)


def test_a_single_code_is_told_from_none(benchmarks: Any, run: Run) -> None:
    case = benchmarks.hash_case(16, 16, stride=1, slots=9)
    assert case.codes is not None
    case.codes[:] = 7
    np.testing.assert_array_equal(run(hash_model("HashDecode", case, None), {}), case.dense())


def test_a_node_that_does_not_fit_is_refused_with_the_values(hyper: Any, run: Run) -> None:
    weight = hyper.random_weight(20, 70)
    model = hyper.make_model("HyperMatMul", weight, (TensorProto.FLOAT, [None, None]))
    with pytest.raises(Exception, match=r"x has shape \(2, 69\), its last dim must be 70"):
        run(model, {"x": np.zeros((2, 69), np.float32)})
    wrong = {"scales": weight.scales[:1]}
    model = hyper.make_model(
        "HyperMatMul", weight, (TensorProto.FLOAT, [None, None]), tensors=wrong
    )
    with pytest.raises(Exception, match="scales have shape"):
        run(model, {"x": np.zeros((2, 70), np.float32)})


_SCRIPT = """
import sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
options.log_severity_level = 4
data = np.load(sys.argv[3])
for _ in range(200):  # the memory of nodes is taken and given back
    session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
(y,) = session.run(None, {"x": data["x"]})
np.testing.assert_allclose(y, data["y"], rtol=0, atol=1e-3 * np.abs(data["y"]).max())
"""


def test_other_releases_of_the_runtime_give_memory_in_the_same_way(
    hyper: Any, emulated: Path, tmp_path: Path
) -> None:
    weight = hyper.random_weight(40, 200)
    model = hyper.make_model("HyperMatMul", weight, (TensorProto.FLOAT, [None, None]))
    onnx.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(5).normal(size=(3, 200)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x @ weight.dense().T)
    others = os.environ.get("ONNXCOMP_ORT_PYTHONS", "")
    for python in [sys.executable, *filter(None, others.split(":"))]:
        command = [python, "-c", _SCRIPT, str(emulated), str(tmp_path / "model.onnx")]
        done = subprocess.run(
            [*command, str(tmp_path / "data.npz")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_library_says_which_gpus_it_is_for(
    emulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcomp.errors import RuntimeMissingError
    from onnxcomp.ops import cuda_architectures, cuda_kernels

    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(emulated))
    assert cuda_architectures() == ("emulated",)
    for capability, kernels in (
        ("75", "7.5: one weight by each look-up, for all rows"),
        ("86", "8.6: few rows and decoding by pairs, more rows by mma"),
        ("90", "9.0: few rows and decoding by pairs, more rows by wgmma"),
    ):
        monkeypatch.setenv("ONNXCOMP_EMULATED_CAPABILITY", capability)
        assert cuda_kernels() == kernels
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "broken.so"))
    with pytest.raises(RuntimeMissingError, match="does not load"):
        cuda_architectures()
