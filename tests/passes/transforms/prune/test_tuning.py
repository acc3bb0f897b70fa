"""Tuning all that is left together: towards the dense model, and never away from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune import tuning
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.passes.transforms.prune.tuning import Effort, tune
from onnxcomp.runtime.evaluate import run_model

from .graphs import Draft

Array = Any


def deep(**more: Any) -> onnx.ModelProto:
    """Two blocks that write to one stream, and a head."""
    d = Draft(seed=3)
    h = "x"
    for _ in range(2):
        a = d.add("Tanh", d.linear(h, 12, 24))
        h = d.add("Add", h, d.linear(a, 24, 12))
    y = d.linear(d.add("Tanh", h), 12, 6)
    return d.model({"x": ["n", 12]}, {y: ["n", 6]}, **more)


def vectors(seed: int, count: int = 30) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((8, 12)).astype(np.float32)} for _ in range(count)]


def errors(model: Any, folder: Path) -> float:
    """Relative squared error on inputs that pruning has not seen."""
    onnx.save(deep(), folder / "dense.onnx")
    save(model, folder / "own.onnx")
    exact, own = (
        np.concatenate([y for run in run_model(folder / f, vectors(9)) for y in run.values()])
        for f in ("dense.onnx", "own.onnx")
    )
    return float(np.square(own - exact).sum() / np.square(exact).sum())


def pruned(**options: Any) -> tuple[Any, Any]:
    model = load(deep())
    canonicalize(model)
    report = prune(model, PruneOptions(ratio=0.4, round_to=1, **options), feeds=vectors(0))
    return model, report


def weights(model: Any) -> dict[str, Array]:
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}


def test_tuning_comes_closer_than_fits(tmp_path: Path) -> None:
    model, report = pruned()
    fitted, plain = pruned(tune=False)
    assert report.tuned is not None and report.tuned.passes > 0
    assert report.tuned.after < report.tuned.before
    assert plain.tuned is None
    assert errors(model, tmp_path) < 0.97 * errors(fitted, tmp_path)
    assert [g.after for g in report.groups] == [g.after for g in plain.groups]


def test_the_same_inputs_give_the_same_bytes() -> None:
    first, second = (weights(pruned()[0]) for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def dense() -> Any:
    model = load(deep())
    canonicalize(model)
    return model


def test_a_model_that_lost_nothing_stays() -> None:
    model = dense()
    before = weights(model)
    found = tune(model, dense(), vectors(0), {}, Effort(4, 8))
    assert found is not None and found.passes == 0
    assert found.before == found.after == pytest.approx(0.0, abs=1e-9)
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_steps_that_harm_what_was_set_aside_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_RATE", 3.0)
    model, report = pruned()
    assert report.tuned is not None and report.tuned.passes == 0
    monkeypatch.undo()
    before = weights(pruned(tune=False)[0])
    for name, array in weights(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_vectors_are_tuned_alone_where_all_weights_together_move_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tuning, "_TRIES", ((1500.0, False), (0.5, True)))
    model, report = pruned()
    assert report.tuned is not None and report.tuned.passes > 0
    assert report.tuned.after < report.tuned.before
    before = weights(pruned(tune=False)[0])
    for name, array in weights(model).items():
        assert np.array_equal(array, before[name]) == (array.ndim > 1), name


def test_excluded_weights_stay() -> None:
    model, names = dense(), sorted(weights(dense()))
    other = dense()
    for value in other.graph.initializers.values():
        value.const_value = ir.Tensor(1.1 * value.const_value.numpy(), name=value.name)
    matrix = next(n for n in names if weights(model)[n].ndim == 2)
    before = weights(model)[matrix].copy()
    found = tune(model, other, vectors(0), {}, Effort(6, 8), exclude=[f"^{matrix}$"])
    assert found is not None and found.passes > 0
    np.testing.assert_array_equal(weights(model)[matrix], before)


def test_models_without_gradients_are_left_to_fits() -> None:
    """Opset 12 is too old for gradients."""
    d = Draft(opset=12, seed=1)
    y = d.add("MatMul", d.add("Relu", d.add("MatMul", "x", d.weight(12, 24))), d.weight(24, 6))
    model = load(d.model({"x": ["n", 12]}, {y: ["n", 6]}))
    canonicalize(model)
    report = prune(model, PruneOptions(ratio=0.3, round_to=1), feeds=vectors(0))
    assert report.tuned is None and report.fits


def test_what_costs_too_much_is_not_tuned() -> None:
    feeds = vectors(0)
    assert Effort.within_reach(feeds, 10**3, 10**3) == Effort(8, 25)
    assert Effort.within_reach(feeds, 10**12, 10**3) is None
    assert Effort.within_reach(feeds, 10**3, 10**10) is None


@pytest.mark.parametrize("kind", ["float32", "int64"])
def test_samples_are_mixed_with_others(kind: str) -> None:
    feeds = [{"x": feed["x"].astype(kind)} for feed in vectors(0, 3)]
    found = list(tuning._mixed(feeds, np.random.default_rng(0)))
    lows, highs = (f(np.stack([feed["x"] for feed in feeds])) for f in (np.min, np.max))
    changed = 0
    for feed, own in zip(feeds, found, strict=True):
        assert own["x"].dtype == feed["x"].dtype and own["x"].shape == feed["x"].shape
        assert own["x"].min() >= lows - 1e-5 and own["x"].max() <= highs + 1e-5
        changed += int((own["x"] != feed["x"]).any(axis=1).sum())
    assert changed == 0 if kind == "int64" else 4 <= changed <= 20
