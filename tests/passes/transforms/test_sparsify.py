"""Zeros where they are asked for: as many, where they harm least, and stored without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.transforms.zeroing import ZeroingGoal, by_inputs, by_size
from onnxcomp.passes.weight import Array, HeldMoments, Stats, WeightSite


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def inputs_of(count: int, length: int, seed: int) -> Array:
    """Vectors of a few strong directions and some noise, as activations are."""
    directions = normal(length // 8, length, seed=99)
    noise = np.float32(0.3) * normal(count, length, seed=seed + 1)
    return normal(count, length // 8, seed=seed) @ directions + noise


def stats_of(weight: Array) -> Stats:
    """Statistics of the inputs of a weight, some of them held out."""
    site = WeightSite("w", weight.shape, "float32", (), "", *weight.shape, False)
    seen, kept = (inputs_of(4000, weight.shape[1], seed).astype(np.float64) for seed in (1, 5))
    return Stats(
        site, 4000, seen.T @ seen / 4000, seen.mean(axis=0), HeldMoments(kept.T @ kept / 4000)
    )


@pytest.mark.parametrize("share", [0.1, 0.5, 0.77])
def test_a_share_is_met_to_the_element(share: float) -> None:
    weight = normal(37, 300)
    goal = ZeroingGoal.of_text(repr(share))
    for found in (by_size(weight, goal), by_inputs(weight, goal, stats_of(weight))):
        assert np.count_nonzero(found == 0) == round(share * weight.size)
    plain = by_size(weight, goal)
    gone = np.abs(weight[plain == 0]).max()
    assert gone <= np.abs(plain[plain != 0]).min()
    np.testing.assert_array_equal(plain[plain != 0], weight[plain != 0])


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("length", [300, 256, 131])
def test_patterns_hold_in_every_group(kept: int, of: int, length: int) -> None:
    weight = normal(9, length)
    goal = ZeroingGoal.of_text(f"{kept}:{of}")
    for found in (by_size(weight, goal), by_inputs(weight, goal, stats_of(weight))):
        whole = found[:, : length // of * of].reshape(9, -1, of)
        assert (np.count_nonzero(whole, axis=2) == kept).all()
        assert np.count_nonzero(found[:, length // of * of :], axis=1).max(initial=0) <= kept


@pytest.mark.parametrize("text", ["0.5", "2:4"])
def test_the_others_make_up_for_what_is_gone(text: str) -> None:
    weight, goal = normal(64, 256), ZeroingGoal.of_text(text)
    x = inputs_of(500, 256, seed=9)
    found = by_size(weight, goal), by_inputs(weight, goal, stats_of(weight))
    plain, fitted = (float(np.linalg.norm(x @ (each - weight).T)) for each in found)
    assert fitted < 0.6 * plain


def test_inputs_that_say_nothing_leave_the_smallest_to_go() -> None:
    weight, goal = normal(16, 128), ZeroingGoal.of_text("2:4")
    site = WeightSite("w", weight.shape, "float32", (), "", *weight.shape, False)
    stats = Stats(site, 1000, np.eye(128), np.zeros(128), HeldMoments(np.eye(128)))
    np.testing.assert_array_equal(by_inputs(weight, goal, stats), by_size(weight, goal))


def model() -> onnx.ModelProto:
    """An embedding, a convolution, a product, and a Gemm with its weight transposed."""
    tensors = {
        "emb": normal(50, 64, seed=1),
        "conv": normal(24, 16, 3, seed=2),
        "w": normal(64, 96, seed=3),
        "gemm": normal(40, 96, seed=4),
        "bias": normal(40, seed=5),
        "grid": np.tile(np.arange(96, dtype=np.float32), (48, 1)),
    }
    nodes = [
        helper.make_node("Gather", ["emb", "ids"], ["e"]),
        helper.make_node("Reshape", ["e", "shape"], ["r"]),
        helper.make_node("Conv", ["r", "conv"], ["c"], pads=[1, 1]),
        helper.make_node("MatMul", ["e", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "gemm", "bias"], ["y"], transB=1),
        helper.make_node("Add", ["a", "grid"], ["g"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g",
        [value("ids", 7, [48])],
        [value("y", 1, None), value("c", 1, None), value("g", 1, None)],
        [*(numpy_helper.from_array(array, name) for name, array in tensors.items()),
         numpy_helper.from_array(np.array([3, 16, -1]), "shape")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def zeros_of(path: Path) -> dict[str, float]:
    """Share of zeros of every float tensor of a dense file."""
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {n: float((a == 0).mean()) for n, a in tensors.items() if a.dtype == np.float32}


@pytest.mark.parametrize("data", [False, True])
def test_weights_of_products_get_zeros_and_others_do_not(tmp_path: Path, data: bool) -> None:
    ids = [np.random.default_rng(n).integers(0, 50, 48) for n in range(20)]
    given = {"data": [{"ids": row} for row in ids]} if data else {}
    onnxcomp.optimize(
        model(), tmp_path / "o.onnx", method="sparse", sparsity=0.75, min_size=1024,
        exclude=["gemm"], tune=0, **given,
    )  # fmt: skip
    onnxcomp.expand(tmp_path / "o.onnx", tmp_path / "d.onnx")
    found = zeros_of(tmp_path / "d.onnx")
    assert found["conv"] == found["w"] == 0.75
    assert found["emb"] == found["gemm"] == found["bias"] == 0.0
    assert found["grid"] == pytest.approx(1 / 96)


def product(weight: Array) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", 1, ["n", len(weight)])], [value("y", 1, None)]),
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def branching(weight: Array) -> onnx.ModelProto:
    """Products with two weights, one in either branch of an If."""
    value = helper.make_tensor_value_info
    branches = {
        name: helper.make_graph(
            [helper.make_node("MatMul", ["x", f"w_{name}"], [name])], name, [],
            [value(name, 1, None)], [numpy_helper.from_array(array, f"w_{name}")],
        )
        for name, array in (("then", weight), ("else", -weight))
    }  # fmt: skip
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branches["then"], else_branch=branches["else"]
    )
    inputs = [value("c", 9, []), value("x", 1, ["n", len(weight)])]
    graph = helper.make_graph([node], "g", inputs, [value("y", 1, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_weights_in_branches_get_zeros(tmp_path: Path) -> None:
    result = onnxcomp.optimize(
        branching(normal(96, 64)), tmp_path / "o.onnx", method="sparse", sparsity="2:4",
        shapes={"x": (3, 96)}, min_size=1024,
    )  # fmt: skip
    assert result.verify is not None and result.verify.passed
    onnxcomp.expand(tmp_path / "o.onnx", tmp_path / "d.onnx")
    assert zeros_of(tmp_path / "d.onnx") == {"w_then": 0.5, "w_else": 0.5}


def test_opsets_without_sparse_codecs_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    dense = product(normal(64, 64))
    onnxcomp.plan(dense, sparsity=0.5, min_size=1024)
    assert not any("opset" in message for message in caplog.messages)
    dense.opset_import[0].version = 10
    onnxcomp.plan(dense, sparsity=0.5, min_size=1024)
    assert any("opset 10" in message for message in caplog.messages)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_files_have_the_sparsity_that_was_asked_for(tmp_path: Path, share: float) -> None:
    dense = product(normal(512, 512))
    onnxcomp.optimize(dense, tmp_path / "o.onnx", method="sparse", sparsity=share)
    stored = {t.name.split("::")[-1]: t for t in onnx.load(tmp_path / "o.onnx").graph.initializer}
    values = numpy_helper.to_array(stored["values"])
    assert len(values) - 1 == pytest.approx((1 - share) * 512 * 512, rel=0.02)
    assert values.nbytes < 1.02 * (1 - share) * 4 * 512 * 512


def test_two_of_four_with_4_bits_is_a_quarter_smaller_than_dense_4_bits(tmp_path: Path) -> None:
    dense = product(normal(1024, 512))
    x = inputs_of(2000, 1024, seed=3)
    asked: dict[str, Any] = {"method": "sparse+int", "sparsity": "2:4", "bits": 4}
    plan = onnxcomp.plan(dense, data={"x": x}, **asked)
    (choice,) = plan
    assert choice.params.to_json()["paired"] == 1
    assert choice.bytes is not None
    assert choice.bytes <= 0.75 * 1024 * 512 * (4 + 16 / 128) / 8
    result = onnxcomp.optimize(dense, tmp_path / "o.onnx", plan=plan, data={"x": x}, tune=0)
    assert result.verify is not None and result.verify.passed
    assert [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node] == [
        "SparseIntMatMul"
    ]


@pytest.mark.parametrize("wrong", [0, 1, 0.0, 1.5, "2:3", "4:4", "0:4", "a", "1:2:4", True, "nan"])
def test_sparsities_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        onnxcomp.plan(product(normal(64, 64)), sparsity=wrong)


def test_a_pattern_without_quotes_in_yaml_is_explained() -> None:
    with pytest.raises(UsageError) as caught:
        onnxcomp.plan(product(normal(64, 64)), sparsity=yaml.safe_load("2:4"))
    assert "quotes in YAML" in str(caught.value.hint)
