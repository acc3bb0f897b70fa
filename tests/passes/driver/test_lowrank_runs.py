"""Low-rank factors in whole runs: plans by singular values, calibration, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.held_out import held_out_error
from onnxcomp.passes.weight import HeldMoments, Stats, Use, WeightSite

Array = npt.NDArray[Any]
WIDTH, LAYERS = 96, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of MatMul and Tanh; the later the layer, the lower its rank."""
    rng = np.random.default_rng(0)
    nodes, tensors = [], []
    for layer in range(LAYERS):
        inner = WIDTH // 2**layer
        left = rng.standard_normal((WIDTH, inner))
        weight = left @ rng.standard_normal((inner, WIDTH)) / np.sqrt(inner)
        weight = (weight + 0.02 * rng.standard_normal((WIDTH, WIDTH))) / np.sqrt(WIDTH)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), f"w{layer}"))
        source = f"h{layer - 1}" if layer else "x"
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [f"a{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"a{layer}"], [f"h{layer}"]))
    dims = ["n", WIDTH]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info(f"h{LAYERS - 1}", TensorProto.FLOAT, dims)],
        tensors,
    )
    path = tmp_path_factory.mktemp("lowrank") / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def inputs(count: int, seed: int) -> Array:
    """Vectors near a subspace."""
    mixing = np.random.default_rng(7).standard_normal((WIDTH, WIDTH)) * np.geomspace(2, 0.02, WIDTH)
    x = np.random.default_rng(seed).standard_normal((count, WIDTH)) @ mixing.T
    return x.astype(np.float32) / np.float32(np.sqrt(WIDTH))


def outputs(path: Path, x: Array) -> Array:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": x})[0])


def distance(model: Path, small: Path) -> float:
    x = inputs(500, seed=9)
    exact = outputs(model, x)
    return float(np.linalg.norm(outputs(small, x) - exact) / np.linalg.norm(exact))


def optimize(model: Any, tmp_path: Path, **options: Any) -> tuple[Path, Any]:
    path = tmp_path / "small.onnx"
    result = onnxcomp.optimize(model, path, method="lowrank", jobs=1, **options)
    return path, result


def test_ranks_follow_the_singular_values(model: Path, tmp_path: Path) -> None:
    path, result = optimize(model, tmp_path, ratio=2)
    ranks = [result.plan[f"w{layer}"].params.rank for layer in range(LAYERS) if
             not result.plan[f"w{layer}"].kept]  # fmt: skip
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] <= 16
    assert result.report.output.bytes <= model.stat().st_size / 2
    assert all(not node.domain for node in onnx.load(path).graph.node)
    assert not onnx.load(path).functions
    for site in result.report.sites:
        if site.method == "lowrank":
            planned = result.plan[site.name].error
            assert site.weight_error == pytest.approx(planned, rel=1e-3, abs=1e-6)


def equal_ranks(model: Path, rank: int = 16) -> Any:
    plan = onnxcomp.plan(model, method="lowrank")
    for layer in range(LAYERS):
        plan[f"w{layer}"] = plan[f"w{layer}"].with_(codec="lowrank", rank=rank)
    return plan


def test_choosing_ranks_together_beats_equal_ranks(model: Path, tmp_path: Path) -> None:
    _, equal = optimize(model, tmp_path, plan=equal_ranks(model, rank=24))
    room = 1500  # different settings are recorded one by one
    _, chosen = optimize(model, tmp_path, target_size=equal.report.output.bytes + room)
    lost = [sum(s.weight_error**2 for s in done.report.sites) for done in (chosen, equal)]
    assert lost[0] < 0.9 * lost[1]


def test_data_brings_the_outputs_nearer_and_the_dense_target_nearer_still(
    model: Path, tmp_path: Path
) -> None:
    data = {"x": inputs(3000, seed=1)}
    distances = {}
    for name, options in {
        "values": {},
        "parallel": {"data": data, "calibration": "parallel"},
        "sequential": {"data": data},
    }.items():
        path, result = optimize(model, tmp_path, plan=equal_ranks(model), **options)
        distances[name] = distance(model, path)
    assert distances["parallel"] < 0.7 * distances["values"]
    assert distances["sequential"] < distances["parallel"]
    assert all(site.output_error is not None and not site.note for site in result.report.sites)


def test_with_too_little_data_it_says_so_and_works(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = optimize(model, tmp_path, plan=equal_ranks(model), data={"x": inputs(40, seed=1)})
    assert "480 or more are needed" in caplog.text
    assert np.isfinite(outputs(path, inputs(5, seed=2))).all()


def test_without_data_it_says_that_weights_alone_decide(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = optimize(model, tmp_path, plan=equal_ranks(model))
    [record] = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "no calibration data: the factors of 4 weights" in record.message
    assert distance(model, path) < 1.0
    caplog.clear()
    optimize(model, tmp_path, plan=equal_ranks(model), calibration="off")
    optimize(model, tmp_path, plan=equal_ranks(model), data={"x": inputs(1500, seed=1)})
    assert "no calibration data" not in caplog.text


def test_products_lose_little_more_than_the_least_that_a_plan_predicts(
    model: Path, tmp_path: Path
) -> None:
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["n", "t", WIDTH])
        )
    x = inputs(6400, seed=1)  # plans look at a few samples: of many vectors each
    path, result = optimize(
        proto, tmp_path, set_="w0:rank=24", include="w0", ratio=1.05,
        data={"x": x.reshape(-1, 50, WIDTH)}, calibration="parallel",
    )  # fmt: skip
    weight = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}["w0"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    lost = x @ (stored["w0::down"] @ stored["w0::up"] - weight)
    measured = np.linalg.norm(lost) / np.linalg.norm(x @ weight)
    # The least there is; the outputs of the model, for which factors are fitted, lose less then.
    assert 0.98 * measured / 1.3 < result.plan["w0"].output_error < 1.02 * measured


def test_held_out_errors_are_those_of_a_direct_computation() -> None:
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((6, 8)), rng.standard_normal((50, 8))
    seen = x + 0.1 * rng.standard_normal((50, 8))
    decoded = weight + 0.1 * rng.standard_normal((6, 8))
    site = WeightSite("w", (6, 8), "float32", (Use("n", "MatMul", 1, "matmul"),), "", 6, 8, False)
    gram, cross, reference = seen.T @ seen / 50, x.T @ seen / 50, x.T @ x / 50
    held = HeldMoments(gram, cross, reference)
    stats = Stats(site, 50, gram, seen.mean(0), held=held)
    exact = x @ weight.T
    expected = np.linalg.norm(seen @ decoded.T - exact) / np.linalg.norm(exact)
    assert held_out_error(weight, decoded, stats) == pytest.approx(expected)
    plain = Stats(site, 50, gram, seen.mean(0), held=HeldMoments(gram))
    inherited = np.linalg.norm(seen @ (decoded - weight).T) / np.linalg.norm(seen @ weight.T)
    assert held_out_error(weight, decoded, plain) == pytest.approx(inherited)
    assert held_out_error(weight, decoded, Stats(site, 50, gram, seen.mean(0))) is None


def test_a_rank_above_the_matrix_keeps_the_weight_with_a_reason(
    model: Path, tmp_path: Path
) -> None:
    _, result = optimize(model, tmp_path, set_="w[01]:method=lowrank,rank=500")
    reasons = {site.name: site.reason for site in result.report.sites if site.method == "dense"}
    assert "384000 bytes" in reasons["w0"]
    assert "not less than 36864 dense" in reasons["w1"]


def test_a_rank_of_zero_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank=0"):
        optimize(model, tmp_path, set_="w0:method=lowrank,rank=0")


def test_a_plan_with_a_rank_that_does_not_pay_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank=90 for 'w0', a weight of 96 x 96"):
        optimize(model, tmp_path, plan=equal_ranks(model, rank=90))


def test_zero_rows_and_dead_inputs_survive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, 80)).astype(np.float32)
    weight[:, 5] = 0.0
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", WIDTH])],
        [value("y", TensorProto.FLOAT, ["n", 80])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    x = inputs(1500, seed=1)
    x[:, 3] = 0.0
    small, _ = optimize(path, tmp_path, set_="w:method=lowrank,rank=32", data={"x": x})
    found = outputs(small, x[:9])
    assert np.isfinite(found).all()
    assert not found[:, 5].any()
