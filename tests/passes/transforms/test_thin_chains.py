"""Thin factors that a model has already: ranks are chosen for their product, never above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxcomp

Array = npt.NDArray[Any]
WIDE, RANK = 120, 21


def decaying(rows: int, columns: int, seed: int, last: float) -> Array:
    """A random matrix whose columns become small."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(1.0, last, columns) / np.sqrt(rows)
    return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Gemm chain with a bias in between, and a convolution with points behind it, both thin."""
    tensors = {
        "down": decaying(WIDE, RANK, 0, 0.02),
        "up": 4.0 * decaying(WIDE, RANK, 1, 0.3).T,
        "middle": decaying(RANK, 1, 2, 1.0)[:, 0],
        "window": decaying(8 * 9, RANK, 3, 0.02).T.reshape(RANK, 8, 3, 3),
        "points": 4.0 * decaying(96, RANK, 4, 0.3).reshape(96, RANK, 1, 1),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "down", "middle"], ["h"], "first"),
        helper.make_node("Gemm", ["h", "up"], ["y"], "second"),
        helper.make_node("Conv", ["image", "window"], ["i"], "third", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["i", "points"], ["z"], "fourth"),
    ]
    value, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, ["n", WIDE]), value("image", kind, ["n", 8, 7, 7])],
        [value("y", kind, ["n", WIDE]), value("z", kind, ["n", 96, 7, 7])],
        [numpy_helper.from_array(np.ascontiguousarray(t), n) for n, t in tensors.items()],
    )
    path = tmp_path / "model.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def optimize(model: Path, **options: Any) -> Any:
    output = model.with_name("small.onnx")
    return onnxcomp.optimize(model, output, min_size=1000, jobs=1, **options)


def widths(path: Path) -> dict[str, int]:
    """The inner widths of factors, by the weight they are for."""
    found = onnx.load(path).graph.initializer
    ends = {"::up": 0, "::left": 1}
    return {
        t.name.removesuffix(end): t.dims[axis]
        for t in found
        for end, axis in ends.items()
        if t.name.endswith(end)
    }


def weights(path: Path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer)


def outputs(path: Path) -> list[Array]:
    rng = np.random.default_rng(9)
    x = rng.standard_normal((5, WIDE)).astype(np.float32)
    image = rng.standard_normal((2, 8, 7, 7)).astype(np.float32)
    feeds = {"x": x, "image": image}
    return [np.asarray(y) for y in onnxruntime.InferenceSession(path).run(None, feeds)]


def test_a_lower_rank_is_chosen_for_the_product(model: Path) -> None:
    result = optimize(model, set_=".*:method=lowrank,rank=12")
    assert widths(result.path) == {"up/folded": 12, "points/folded": 12}
    assert weights(result.path) < 0.65 * weights(model)
    down, up = (
        numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer if t.name in "downup"
    )
    best = np.linalg.svd(down.astype(np.float64) @ up, compute_uv=False)
    lost = np.sqrt(np.sum(best[12:] ** 2) / np.sum(best**2))
    [found] = [s for s in result.report.sites if s.name == "up/folded"]
    assert found.weight_error == pytest.approx(lost, rel=1e-4)
    assert 0 < found.weight_error < 0.1


def test_ranks_of_products_meet_a_target(model: Path) -> None:
    result = optimize(model, method="lowrank", ratio=1.25)
    assert result.report.output.bytes <= model.stat().st_size / 1.25
    assert set(widths(result.path)) == {"up/folded", "points/folded"}


@pytest.mark.parametrize(
    "options",
    [
        {"set_": ".*:method=lowrank,rank=40"},
        {"method": "lowrank", "target_size": "1MB"},
        {"set_": ".*:method=lowrank,energy=1"},
    ],
)
def test_it_is_never_stored_with_more_than_it_had(model: Path, options: dict[str, Any]) -> None:
    result = optimize(model, **options)
    assert set(widths(result.path).values()) == {RANK}
    assert all(not node.domain for node in onnx.load(result.path).graph.node)
    for found, exact in zip(outputs(result.path), outputs(model), strict=True):
        np.testing.assert_allclose(found, exact, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "hyper", "bits": 4},
        {"method": ["lowrank", "hyper"], "bits": 4},
        {"set_": "^down$:method=lowrank,rank=8", "method": "dense"},
        {"set_": ".*:method=lowrank,rank=8", "include": ["^down$", "^up$", "^window$", "^points$"]},
        {"set_": ".*:method=lowrank,rank=8", "exclude": ["folded", "second", "fourth"]},
    ],
)
def test_elsewhere_thin_factors_stay_two(model: Path, options: dict[str, Any]) -> None:
    result = optimize(model, **options)
    assert not [site.name for site in result.report.sites if "folded" in site.name]
    operators = [node.op_type for node in onnx.load(result.path).graph.node]
    assert len(operators) >= 4


def test_weights_that_a_plan_does_not_name_or_gates_give_back_are_what_they_were(
    model: Path,
) -> None:
    plan = onnxcomp.plan(model, set_=".*:method=lowrank,rank=8", min_size=1000)
    del plan.choices["up/folded"]
    result = optimize(model, plan=plan)
    assert widths(result.path) == {"up/folded": RANK, "points/folded": 8}
    strict = optimize(model, set_=".*:method=lowrank,rank=8", max_error=1e-4)
    assert widths(strict.path) == {"up/folded": RANK, "points/folded": RANK}


def test_factors_of_an_earlier_run_are_left_alone(model: Path) -> None:
    first = optimize(model, set_=".*:method=lowrank,rank=12")
    again = onnxcomp.plan(first.path, set_=".*:method=lowrank,rank=8", min_size=1000)
    assert not list(again)
    reasons = {skipped.reason for skipped in again.skipped}
    assert "part of a weight already compressed by onnxcomp" in reasons
