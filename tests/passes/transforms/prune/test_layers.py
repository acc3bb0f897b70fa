"""Whole residual branches go, those that outputs miss least; all else computes what it did."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.transforms.prune.graph_pass import PruneLayers
from onnxcomp.passes.transforms.prune.layers import branches
from onnxcomp.runtime.evaluate import run_model

from .graphs import Draft

Array = Any

# What the branches of a model are multiplied with.
SIZES = (1.0, 0.01, 1.0, 0.05)


def stacked(sizes: tuple[float, ...] = SIZES, skipped: int | None = None) -> onnx.ModelProto:
    """A stream that branches add to, with some left out."""
    d = Draft(seed=4)
    h = "x"
    for number, size in enumerate(sizes):
        made = d.linear(d.add("Tanh", d.linear(h, 8, 16)), 16, 8)
        branch = d.add("Mul", made, d.constant(np.float32(size)))
        h = h if number == skipped else d.add("Add", h, branch)
    y = d.linear(d.add("Tanh", h), 8, 4)
    return d.model({"x": ["n", 8]}, {y: ["n", 4]})


def vectors(seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((6, 8)).astype(np.float32)} for _ in range(12)]


def outputs(model: Any, folder: Path) -> Array:
    save(model, folder / "model.onnx")
    runs = run_model(folder / "model.onnx", vectors(1))
    return np.concatenate([array for run in runs for array in run.values()])


def test_the_branch_that_matters_least_goes(tmp_path: Path) -> None:
    model = load(stacked())
    canonicalize(model)
    change = PruneLayers().run(model, Context(Settings(prune_layers=1), vectors))
    assert change.count == 1
    expected = load(stacked(skipped=1))
    np.testing.assert_allclose(
        outputs(model, tmp_path), outputs(expected, tmp_path), rtol=1e-5, atol=1e-6
    )
    assert len(list(model.graph)) < len(list(expected.graph))
    left = sum(v.const_value.size for v in model.graph.initializers.values())  # type: ignore[union-attr]
    whole = sum(
        array.size for array in map(onnx.numpy_helper.to_array, stacked().graph.initializer)
    )
    assert left == whole - (8 * 16 + 16 + 16 * 8 + 8 + 1)


def test_more_go_in_the_order_of_what_they_cost(caplog: pytest.LogCaptureFixture) -> None:
    model = load(stacked())
    canonicalize(model)
    names = [branch.name for branch in branches(model, vectors()[0])]
    with caplog.at_level(logging.WARNING):
        change = PruneLayers().run(model, Context(Settings(prune_layers=9), vectors))
    assert change.count == len(names) == 4
    assert [names.index(note.split()[5]) for note in change.notes[:2]] == [1, 3]
    assert "4 branches can go, 9 were asked for" in caplog.text


def test_nested_branches_go_with_the_outer_one() -> None:
    d = Draft(seed=6)
    inner = d.add("Tanh", d.linear("x", 8, 8))
    inner = d.add("Add", inner, d.linear(d.add("Tanh", inner), 8, 8))
    tiny = d.add("Mul", inner, d.constant(np.float32(1e-3)))
    h = d.add("Add", "x", tiny)
    y = d.linear(h, 8, 4)
    model = load(d.model({"x": ["n", 8]}, {y: ["n", 4]}))
    canonicalize(model)
    assert len(list(branches(model, vectors()[0]))) == 2
    change = PruneLayers().run(model, Context(Settings(prune_layers=2), vectors))
    assert change.count <= 2
    assert not any(node.op_type == "Tanh" for node in model.graph)


def test_what_others_read_stays() -> None:
    """A branch that fills a cache, a sum that is an output, and one with another shape."""
    d = Draft(seed=8)
    key = d.linear("x", 8, 8)
    h = d.add("Add", "x", d.linear(d.add("Tanh", key), 8, 8))
    h = d.add("Add", h, d.linear(d.add("ReduceMean", h, d.ints(0), keepdims=1), 8, 8))
    y = d.add("Add", h, d.linear(h, 8, 8))
    outs: dict[str, Any] = {y: ["n", 8], key: ["n", 8]}
    model = load(d.model({"x": ["n", 8]}, outs))
    canonicalize(model)
    assert list(branches(model, vectors()[0])) == []


def test_whole_layers_need_inputs(tmp_path: Path) -> None:
    onnx.save(stacked(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="no inputs"):
        onnxcomp.optimize(
            tmp_path / "model.onnx", tmp_path / "small.onnx", method="prune", prune_layers=1
        )


def test_the_command_takes_layers_out(tmp_path: Path) -> None:
    onnx.save(stacked(), tmp_path / "model.onnx")
    data = {"x": np.concatenate([feed["x"] for feed in vectors()])}
    result = onnxcomp.optimize(
        tmp_path / "model.onnx", tmp_path / "small.onnx", method="prune", prune_layers=2, data=data
    )
    assert result.report.output.bytes < 0.75 * result.report.input.bytes
    onnx.checker.check_model(onnx.load(tmp_path / "small.onnx"))
