"""Constants are kept bit for bit, and rounded where the size of a plan asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp

LENGTH, HIDDEN = 256, 384


def fourier(length: int) -> Any:
    """Windowed cosines and sines, as spectrograms have them: ``(length + 2, length)``."""
    angles = 2 * np.pi * np.outer(np.arange(length // 2 + 1), np.arange(length)) / length
    return np.concatenate([np.cos(angles), np.sin(angles)]) * np.hanning(length + 1)[:-1]


def selection(length: int) -> Any:
    """Every other element, twice."""
    found = np.zeros((length + 2, length))
    found[np.arange(length), np.arange(length) // 2 * 2] = 1.0
    return found


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A transform of frames and three layers."""
    rng = np.random.default_rng(0)
    shapes = [(LENGTH + 2, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 8)]
    arrays = {"basis": request.param(LENGTH).T}
    arrays |= {f"w{n}": rng.standard_normal(s) / 16 for n, s in enumerate(shapes)}
    nodes, x = [helper.make_node("MatMul", ["x", "basis"], ["b"])], "b"
    nodes.append(helper.make_node("Abs", ["b"], ["a"]))
    x = "a"
    for number in range(3):
        nodes.append(helper.make_node("MatMul", [x, f"w{number}"], [f"m{number}"]))
        nodes.append(helper.make_node("Tanh", [f"m{number}"], [f"t{number}"]))
        x = f"t{number}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in arrays.items()],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def planned(model: Path, **options: Any) -> tuple[onnxcomp.Plan, Any, Any]:
    """A plan, and the choices for the basis and the largest weight."""
    plan = onnxcomp.plan(model, **options)
    return plan, plan.choices["basis"], plan.choices["w1"]


@pytest.mark.parametrize("model", [fourier], indirect=True)
def test_a_transform_is_kept_where_weights_have_room(model: Path) -> None:
    for options in ({}, {"bits": 2}, {"ratio": 2}):
        _, basis, _ = planned(model, **options)
        assert basis.codec == "constant" and "Fourier" in basis.reason
        assert basis.reason.endswith("bit for bit")


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("model", [fourier], indirect=True)
def test_a_transform_is_rounded_where_the_size_asks_for_it(
    model: Path, with_data: bool, tmp_path: Path
) -> None:
    feeds = np.random.default_rng(1).standard_normal((32, LENGTH)).astype(np.float32)
    data = {"data": {"x": feeds}} if with_data else {}
    plan, basis, weight = planned(model, ratio=7, **data)
    assert plan.met and basis.params.bits >= 4
    assert basis.reason.endswith("rounded for the sake of the size") and "Fourier" in basis.reason
    assert basis.params.bits >= weight.params.bits >= 3
    out = tmp_path / "out.onnx"
    report = onnxcomp.optimize(model, out, ratio=7, **data).report
    assert report.output.bytes == plan.bytes
    exact, found = (
        onnxcomp.InferenceSession(path).run(None, {"x": feeds})[0] for path in (model, out)
    )
    assert np.square(found - exact).sum() < 0.15 * np.square(exact).sum()


@pytest.mark.parametrize("model", [selection], indirect=True)
def test_what_products_select_with_is_never_rounded(model: Path) -> None:
    _, basis, weight = planned(model, ratio=20)
    assert basis.codec in ("constant", "dense", "sparse") and "bit for bit" in basis.reason
    assert weight.codec == "hyper"
