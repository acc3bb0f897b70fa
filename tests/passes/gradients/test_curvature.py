"""Random seeds have the curvature of the loss, and what comes back to products is their share."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.gradients import gradient_sums
from onnxcomp.passes.gradients.curvature import curvature_seeds
from onnxcomp.passes.gradients.gradient_sums import GradientSums
from onnxcomp.passes.gradients.lean_session import lean_session
from onnxcomp.passes.gradients.output_moments import look_up_moments, output_moments
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.transforms.canonicalize import canonicalize

Array = npt.NDArray[Any]
WIDTH, WORDS = 24, 6


def value(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def opened(graph: onnx.GraphProto) -> ir.Model:
    opset = helper.make_opsetid("", 17)
    return ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def softmax(x: Array) -> Array:
    exponents = np.exp(x.astype(np.float64))
    return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("kind", ["logits", "Softmax", "LogSoftmax", "values"])
def test_seeds_have_the_curvature_of_the_loss(kind: str, tmp_path: Any) -> None:
    op_type = kind if kind.endswith("Softmax") else "Identity"
    name = "logits" if kind == "logits" else "y"
    node = helper.make_node(op_type, ["x"], [name])
    shape = ["n", WORDS]
    model = opened(helper.make_graph([node], "g", [value("x", shape)], [value(name, shape)]))
    (seed,) = curvature_seeds(Tape(model), model).values()
    model.graph.outputs.append(seed)
    x = np.random.default_rng(0).standard_normal((1, WORDS)).astype(np.float32)
    session = lean_session(save(model, tmp_path / "m.onnx").files[0])
    rows = np.repeat(x, 40_000, axis=0)
    found = session.run([seed.name], {"x": rows})[0].astype(np.float64)
    # The loss is a mean over rows, or relative to the power of all of them.
    p = softmax(x)[0]
    expected = {
        "logits": np.diag(p) - np.outer(p, p),
        "Softmax": np.diag(1 / p),
        "LogSoftmax": np.diag(p),
        "values": np.eye(WORDS) * 2.0 / np.square(x).sum(),
    }[kind]
    assert found.T @ found == pytest.approx(expected, abs=0.05 * float(expected.max()))
    again = session.run([seed.name], {"x": rows})[0]
    assert not np.array_equal(again, found)


def test_products_have_the_curvature_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    first = (rng.standard_normal((WIDTH, WIDTH)) / 5).astype(np.float32)
    second = (rng.standard_normal((WIDTH, WORDS)) / 5).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Gemm", ["h", "second"], ["y"]),
    ]
    fixed = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")]
    graph = helper.make_graph(
        nodes, "g", [value("x", ["n", WIDTH])], [value("y", ["n", WORDS])], fixed
    )
    model = opened(graph)
    canonicalize(model)
    sites = find_sites(model, min_size=1).sites
    feeds = [{"x": rng.standard_normal((500, WIDTH)).astype(np.float32)} for _ in range(4)]
    found = output_moments(model, sites, feeds)
    share = np.mean([1000.0 / np.square(f["x"] @ first @ second).sum() for f in feeds])
    last, inner = share * np.eye(WORDS), share * second @ second.T
    assert set(found) == {"first", "second"}
    assert found["second"] == pytest.approx(last, abs=0.1 * float(share))
    assert found["first"] == pytest.approx(inner, abs=0.1 * float(inner.max()))
    again = output_moments(model, sites, feeds)
    assert all(np.array_equal(found[name], again[name]) for name in found)
    monkeypatch.setattr(gradient_sums, "HELD", 100_000)  # fewer samples together
    apart = output_moments(model, sites, feeds)
    assert apart["first"] == pytest.approx(inner, abs=0.1 * float(inner.max()))


def test_a_model_without_a_way_back_tells_nothing() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Det", ["h"], ["y"]),
    ]
    weight = numpy_helper.from_array(np.eye(WIDTH, dtype=np.float32), "w")
    graph = helper.make_graph(nodes, "g", [value("x", [WIDTH, WIDTH])], [value("y", [])], [weight])
    model = opened(graph)
    canonicalize(model)
    sites = find_sites(model, min_size=1).sites
    assert output_moments(model, sites, [{"x": np.eye(WIDTH, dtype=np.float32)}]) == {}


def test_look_ups_have_the_curvature_behind_them() -> None:
    """Of one table that is looked up twice, in parts of the inputs that are kept apart."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((40, WIDTH)).astype(np.float32)
    weight = (rng.standard_normal((WIDTH, WORDS)) / 5).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "a"], ["first"]),
        helper.make_node("Gather", ["table", "b"], ["second"]),
        helper.make_node("Add", ["first", "second"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    fixed = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "w")]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", 5]) for n in "ab"]
    model = opened(helper.make_graph(nodes, "g", inputs, [value("y", ["n", 5, WORDS])], fixed))
    canonicalize(model)
    sites = find_sites(model, min_size=1).sites
    feeds = [{n: rng.integers(0, 40, (100, 5)) for n in "ab"} for _ in range(5)]
    used, held = look_up_moments(model, sites, [feeds[:4], feeds[4:]])
    assert set(used) == set(held) == {"table"}
    assert used["table"].vectors == 4 * 2 * 500
    assert held["table"].vectors == 2 * 500
    for found, part in ((used, feeds[:4]), (held, feeds[4:])):
        outputs = [(table[feed["a"]] + table[feed["b"]]) @ weight for feed in part]
        share = 2 * np.mean([1000.0 / np.square(y).sum() for y in outputs])
        wanted = share * weight @ weight.T
        error = np.abs(found["table"].moments - wanted).max()
        assert error < 0.15 * float(wanted.max())


def test_sums_in_files_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.standard_normal((n, WIDTH)).astype(np.float32) for n in (7, 50, 3)]
    exact = sum(v.astype(np.float64).T @ v for v in vectors) / 2
    for held in (1 << 28, 1):
        monkeypatch.setattr(gradient_sums, "HELD", held)
        sums = GradientSums({"a": WIDTH, "none": WORDS}, tmp_path)
        for part in vectors:
            sums.add([("a", part), ("none", np.zeros((2, WORDS), np.float32))])
        found = sums.means(2)
        assert set(found) == {"a"}
        assert found["a"].vectors == 60
        assert found["a"].moments == pytest.approx(exact, rel=1e-5, abs=1e-4)
