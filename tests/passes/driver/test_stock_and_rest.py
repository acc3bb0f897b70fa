"""Models without operators of ours, and half precision for what stays dense."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A product, a small depthwise convolution that no codec pays for at 4 bits, and a sum."""
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((300, 128), np.float32),
        "fc": rng.standard_normal((128, 128), np.float32),
        "shift": rng.standard_normal((64, 128), np.float32),
        "huge": rng.standard_normal((64, 128), np.float32) * 1e6,
        "tiny": rng.standard_normal((64, 128), np.float32) * 1e-8,
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "fc"], ["a"]),
        helper.make_node("Add", ["a", "shift"], ["b"]),
        helper.make_node("Add", ["b", "huge"], ["c"]),
        helper.make_node("Add", ["c", "tiny"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 128])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def domains(path: Path) -> set[str]:
    return {node.domain for node in onnx.load(path).graph.node}


def test_which_codecs_are_stock() -> None:
    assert {name for name, codec in CODECS.items() if codec.stock} >= {"int", "fp16", "dense"}
    assert not CODECS["hyper"].stock


@pytest.mark.parametrize("target", [{"bits": 4}, {"bits": 8}, {"ratio": 2.5}])
def test_a_stock_model_has_no_operator_and_no_function_of_ours(
    model: Path, tmp_path: Path, target: dict[str, float]
) -> None:
    result = oc.optimize(model, tmp_path / "s.onnx", stock=True, exclude="huge|tiny", **target)
    written = onnx.load(tmp_path / "s.onnx")
    assert domains(tmp_path / "s.onnx") <= {"", "com.microsoft"} and not written.functions
    assert {site.method for site in result.report.sites} <= {"int", "fp16", "dense"}
    assert result.plan.bytes == result.report.output.bytes == (tmp_path / "s.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")  # no library registered
    assert session.run(None, {"ids": np.zeros(64, np.int64)})[0].shape == (64, 128)


def test_a_method_with_operators_of_its_own_contradicts_stock(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict") as caught:
        oc.optimize(model, tmp_path / "s.onnx", stock=True, method="hyper")
    assert "int" in caught.value.hint
    with pytest.raises(UsageError, match="contradict"):
        oc.optimize(model, tmp_path / "s.onnx", stock=True, set_="fc:method=hyper")


def test_the_rest_becomes_half_precision_where_its_values_allow_it(
    model: Path, tmp_path: Path
) -> None:
    result = oc.optimize(model, tmp_path / "h.onnx", method="dense", rest="fp16")
    sites = {site.name: site for site in result.report.sites}
    assert {name for name, site in sites.items() if site.method == "fp16"} == {
        "table", "fc", "shift",
    }  # fmt: skip
    for name in ("huge", "tiny"):
        assert sites[name].method == "dense" and "cannot hold these values" in sites[name].reason
    assert result.plan.bytes == (tmp_path / "h.onnx").stat().st_size
    assert result.report.ratio > 1.5
    assert result.verify.outputs["y"].rel_l2 < 1e-3


def test_half_precision_folds_to_float32_and_expands(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "h.onnx"
    oc.optimize(model, small, method="dense", rest="fp16")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(small, options)
    left = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert left.count("Cast") == 1  # of the looked-up rows; whole weights are folded
    oc.expand(small, tmp_path / "dense.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "dense.onnx").graph.node]
    assert kinds == ["Gather", "MatMul", "Add", "Add", "Add"]
    verification = oc.verify(small, tmp_path / "dense.onnx")
    assert all(found.rel_l2 < 1e-6 for found in verification.outputs.values())


def test_excluded_weights_are_not_touched(model: Path, tmp_path: Path) -> None:
    result = oc.optimize(
        model,
        tmp_path / "h.onnx",
        method="dense",
        rest="fp16",
        exclude="fc",
        set_="shift:method=dense",
    )
    methods = {site.name: site.method for site in result.report.sites}
    assert (methods["fc"], methods["shift"], methods["table"]) == ("dense", "dense", "fp16")


def test_compressed_weights_come_before_half_precision(model: Path, tmp_path: Path) -> None:
    result = oc.optimize(model, tmp_path / "h.onnx", bits=4, method="int", rest="fp16")
    methods = {site.name: site.method for site in result.report.sites}
    assert methods["fc"] == methods["table"] == "int"
