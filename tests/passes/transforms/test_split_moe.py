"""Mixtures of experts in a fused operator are taken out, and ONNX Runtime computes the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.transforms.split_fused import SplitFused, kept
from onnxcomp.passes.transforms.split_moe import worthwhile
from onnxcomp.passes.weight import Array
from onnxcomp.runtime.session import open_session

EXPERTS, WIDTH, INNER = 4, 64, 96


def mixture(
    *, bias: bool = True, rank: int = 2, inner: int = INNER, opset: int = 17, **attributes: Any
) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    parts = 2 if attributes.get("activation_type") == "swiglu" else 1
    shapes = {
        "w1": (EXPERTS, parts * inner, WIDTH), "w2": (EXPERTS, WIDTH, inner),
        "b1": (EXPERTS, parts * inner), "b2": (EXPERTS, WIDTH), "gate": (WIDTH, EXPERTS),
    }  # fmt: skip
    names = ["x2", "r", "w1", "b1" if bias else "", "w2", "b2" if bias else ""]
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 8, name)
        for name, shape in shapes.items()
        if name in names or name == "gate"
    ]
    tensors.append(numpy_helper.from_array(np.array([-1, WIDTH]), "flat"))
    dims = ["t", WIDTH] if rank == 2 else ["b", "s", WIDTH]
    names[0] = "x"
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["x2"]),
        helper.make_node("MatMul", ["x2", "gate"], ["r"]),
        helper.make_node("MoE", names, ["y"], "mixture", domain="com.microsoft", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, dims)],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def feed_of(rank: int) -> dict[str, Array]:
    shape = (6, WIDTH) if rank == 2 else (2, 3, WIDTH)
    return {"x": 4 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)}


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        return np.asarray(session.run(None, feed)[0])
    except Exception as error:
        if "MoE" in str(error):
            pytest.skip(f"this ONNX Runtime does not run it on the CPU: {str(error)[:80]}")
        raise


CASES: dict[str, dict[str, Any]] = {
    "plain": {"k": 2},
    "one": {"k": 1, "normalize_routing_weights": 1},
    "all of them": {"k": 4, "rank": 3},
    "normalised": {"k": 2, "normalize_routing_weights": 1, "rank": 3},
    "without offsets": {"k": 2, "bias": False},
    "gelu": {"k": 2, "activation_type": "gelu"},
    "silu": {"k": 2, "activation_type": "silu"},
    "identity": {"k": 2, "activation_type": "identity"},
    "gated": {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "opset": 13},
    "gated and limited": {
        "k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.702,
        "activation_beta": 1.0, "swiglu_limit": 0.75,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_split_graph_computes_the_same(name: str, tmp_path: Path) -> None:
    before = mixture(**CASES[name])
    model = load(before)
    canonicalize(model)
    change = SplitFused().run(model, Context(Settings(min_size=0)))
    save(model, tmp_path / "m.onnx")
    after = onnx.load(tmp_path / "m.onnx")
    kinds = Counter(node.op_type for node in after.graph.node)
    assert change.count == 1 and "MoE" not in kinds and kinds["TopK"] == 1
    feed = feed_of(CASES[name].get("rank", 2))
    wanted = run(before, feed)
    np.testing.assert_allclose(
        run(after, feed), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("name", ["plain", "gated and limited"])
def test_experts_compute_on_codes(name: str, tmp_path: Path) -> None:
    before, feed = mixture(**CASES[name]), feed_of(2)
    wanted = run(before, feed)
    onnx.save(before, tmp_path / "m.onnx")
    result = onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "small.onnx", bits=6, min_size=2048)
    assert result.verify is not None and result.verify.passed
    small = onnx.load(tmp_path / "small.onnx")
    kinds = Counter(node.op_type for node in small.graph.node)
    assert kinds["HyperExperts"] == 2 and "MoE" not in kinds
    found = [
        open_session(tmp_path / "small.onnx", library=library).run(None, feed)[0]
        for library in (True, False)
    ]
    for y in found:
        assert np.linalg.norm(y - wanted) < 0.06 * np.linalg.norm(wanted)
    onnxcomp.expand(tmp_path / "small.onnx", tmp_path / "back.onnx")
    back = run(onnx.load(tmp_path / "back.onnx"), feed)
    assert np.linalg.norm(back - found[1]) < 1e-4 * np.linalg.norm(wanted)


KEPT: dict[str, tuple[dict[str, Any], str]] = {
    "sparse mixer": ({"use_sparse_mixer": 1}, "sparse mixer"),
    "gated in halves": ({"activation_type": "swiglu", "swiglu_fusion": 2}, "not interleaved"),
    "no whole panels": ({"inner": 72}, "72 output channels"),
    "older operator set": ({"opset": 12}, "older than 13"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_taken_out_stays(name: str) -> None:
    given, reason = KEPT[name]
    model = load(mixture(k=2, **given))
    canonicalize(model)
    (node,) = (node for node in model.graph if node.op_type == "MoE")
    assert reason in (kept(model, node) or "")
    assert SplitFused().run(model, Context(Settings(min_size=0))).count == 0


def test_the_older_layout_stays() -> None:
    proto = mixture(k=2)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w1", "w2"):
            array = numpy_helper.to_array(tensor).swapaxes(1, 2)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    model = load(proto)
    canonicalize(model)
    (node,) = (node for node in model.graph if node.op_type == "MoE")
    assert "older layout" in (kept(model, node) or "")


def test_other_methods_leave_the_operator(tmp_path: Path) -> None:
    assert not worthwhile(Settings(method=("int",)))
    assert worthwhile(Settings(method=("auto",)))
