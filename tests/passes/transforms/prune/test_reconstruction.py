"""Layers behind pruned ones are fitted, too; losses of layers are those that outputs show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune import trials
from onnxcomp.passes.transforms.prune.depthwise import FilterSums, best_filters
from onnxcomp.passes.transforms.prune.groups import Group
from onnxcomp.passes.transforms.prune.measured import rescaled
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.passes.transforms.prune.select import Step, merge
from onnxcomp.passes.weight import Array
from onnxcomp.runtime.evaluate import run_model

from .graphs import Draft

IMAGES = {"x": ["n", 4, 8, 8]}


def images(seed: int, count: int = 20) -> list[dict[str, Any]]:
    """Inputs with correlated channels."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((4, 4))
    noise = rng.standard_normal((count, 4, 4, 8, 8))
    return [{"x": np.einsum("cd,ndhw->nchw", mixing, x).astype(np.float32)} for x in noise]


def separable(seed: int) -> onnx.ModelProto:
    """Channels that shrink, then a product and depthwise filters that keep theirs, then a sum."""
    d = Draft(seed=seed)
    a = d.add("Relu", d.add("Conv", "x", d.weight(24, 4, 1, 1), d.weight(24)))
    a = d.add("Relu", d.add("Conv", a, d.weight(8, 24, 1, 1), d.weight(8)))
    a = d.add("Conv", a, d.weight(8, 1, 3, 3, scale=0.3), d.weight(8), group=8, pads=[1, 1, 1, 1])
    y = d.add("Conv", d.add("Relu", a), d.weight(3, 8, 1, 1), d.weight(3))
    return d.model(IMAGES, {y: ["n", 3, 8, 8]})


def test_what_lies_behind_pruned_layers_is_fitted(tmp_path: Path) -> None:
    proto = separable(1)
    model = load(proto)
    canonicalize(model)
    names = [node.input[1] for node in proto.graph.node if node.op_type == "Conv"]
    options = PruneOptions(ratio=0.8, round_to=1, include=(f"^{names[0]}$",))
    report = prune(model, options, feeds=images(0))
    fits = {fit.name: fit for fit in report.fits}
    assert list(fits) == names[1:]
    assert all(fit.after <= fit.before for fit in fits.values())
    assert fits[names[2]].used == "fit" and fits[names[2]].after < fits[names[2]].before
    # Without the fits behind it, the layer that lost columns is all that makes up for them.
    onnx.save(proto, tmp_path / "dense.onnx")
    save(model, tmp_path / "all.onnx")
    fresh = {v.name: v.const_value for v in load(proto).graph.initializers.values()}
    for name in (names[2], names[3], *(proto.graph.node[i].input[2] for i in (4, 6))):
        model.graph.initializers[name].const_value = fresh[name]
    save(model, tmp_path / "one.onnx")
    exact, every, one = (
        np.concatenate([out for run in run_model(tmp_path / f, images(1)) for out in run.values()])
        for f in ("dense.onnx", "all.onnx", "one.onnx")
    )
    assert np.square(every - exact).sum() < 0.97 * np.square(one - exact).sum()


def windows(seed: int, count: int) -> tuple[Array, Array]:
    """Windows of 3 channels with a one behind each, and filters of theirs."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.standard_normal((3, count, 9)), np.ones((3, count, 1))], axis=2)
    return x.astype(np.float32), np.random.default_rng(7).standard_normal((3, 2, 10))


def sums(x: Array, target: Array) -> FilterSums:
    found = FilterSums((3, 2, 10))
    found.add(x, target)
    return found


@pytest.mark.parametrize("biased", [True, False])
def test_filters_that_read_what_they_did_stay(biased: bool) -> None:
    x, filters = windows(0, 200)
    seen = sums(x, x @ filters.transpose(0, 2, 1))
    found, before, after = best_filters(filters, seen, seen, biased=biased)
    np.testing.assert_allclose(found, filters, atol=1e-5)
    assert before < 1e-9 and after <= before


@pytest.mark.parametrize("biased", [True, False])
def test_filters_follow_what_they_read(biased: bool) -> None:
    """Inputs became twice as large: half the filters make the same outputs."""
    x, filters = windows(0, 4000)
    t = x @ filters.transpose(0, 2, 1)
    large = x * np.float32([2.0] * 9 + [1.0])
    found, before, after = best_filters(filters, sums(large, t), sums(large, t), biased=biased)
    np.testing.assert_allclose(found[..., :9], filters[..., :9] / 2, rtol=0.05, atol=0.02)
    assert after < 0.01 * before
    if not biased:
        np.testing.assert_array_equal(found[..., 9], filters[..., 9])


def test_a_fit_that_harms_held_out_data_is_dropped() -> None:
    x, filters = windows(0, 100)
    t = x @ filters.transpose(0, 2, 1)
    seen = sums(x, t + np.random.default_rng(3).standard_normal(t.shape))
    found, before, after = best_filters(filters, seen, sums(x, t), biased=True)
    np.testing.assert_array_equal(found, filters)
    assert after == before


def test_losses_become_those_that_were_measured() -> None:
    group = Group("w", "channels", ((frozenset({0}), frozenset({1})),), ("w",))
    steps = [Step(group, frozenset({n}), 1.0, 1.0) for n in range(5)]
    found = [step.loss for step in rescaled(steps, {2: 4.0, 4: 10.0})]
    assert found == [2.0, 2.0, 3.0, 3.0, 3.0]
    # A loss that falls counts as one that stays.
    assert [step.loss for step in rescaled(steps, {2: 4.0, 4: 1.0})] == [2.0, 2.0, 0.0, 0.0, 0.0]


class Scales:
    """A ledger of classes that each weigh what is said."""

    def __init__(self, weights: dict[int, float]) -> None:
        self.weights, self.gone = weights, set()  # type: ignore[var-annotated]

    @property
    def removed(self) -> float:
        return sum(self.weights[own] for own in self.gone)

    def remove(self, classes: Any) -> None:
        self.gone |= set(classes)

    def restore(self, classes: Any) -> None:
        self.gone -= set(classes)


def test_steps_that_are_not_needed_are_put_back() -> None:
    weights = {0: 0.1, 1: 0.1, 2: 0.05, 3: 0.2}
    groups = [Group(n, "channels", ((frozenset({0}), frozenset({1})),), (n,)) for n in "ab"]

    def step(group: int, own: int, loss: float) -> Step:
        return Step(groups[group], frozenset({own}), loss, weights[own])

    first = [step(0, 0, 0.1), step(0, 1, 0.2), step(0, 2, 0.15)]
    second = [step(1, 3, 0.9)]
    taken, ledger = {}, {}
    for trim in (False, True):
        ledger[trim] = Scales(weights)
        found = merge([first, second], ledger[trim], 0.3, trim=trim)  # type: ignore[arg-type]
        taken[trim] = [next(iter(s.classes)) for s in found]
    assert taken[False] == [0, 1, 2, 3] and ledger[False].removed == pytest.approx(0.45)
    assert taken[True] == [0, 3] and ledger[True].removed == pytest.approx(0.3)


def branches(quiet: float) -> onnx.ModelProto:
    """Two branches alike, the second of which hardly matters to the sum."""
    d = Draft(seed=5)
    ends = []
    for scale in (1.0, quiet):
        a = d.add("Relu", d.add("MatMul", "x", d.weight(16, 32)))
        b = d.add("MatMul", a, d.weight(32, 16))
        ends.append(d.add("Mul", d.add("Tanh", b), d.constant(np.float32(scale))))
    y = d.add("Add", *ends)
    return d.model({"x": ["n", 16]}, {y: ["n", 16]})


def test_layers_that_outputs_do_not_depend_on_go_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((64, 16)).astype(np.float32)} for _ in range(20)]
    kept = {}
    for measure in (True, False):
        model = load(branches(0.01))
        canonicalize(model)
        options = PruneOptions(ratio=0.4, round_to=1, measure=measure)
        report = prune(model, options, feeds=feeds)
        kept[measure] = sorted(group.after for group in report.groups)
    # Of 64 neurons 26 go: all of them from the quiet branch, or some from each.
    assert kept[True] == [6]
    assert len(kept[False]) == 2


@pytest.mark.parametrize("better", [0, 1])
def test_the_way_to_choose_that_costs_the_outputs_less_is_kept(
    better: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Losses of the outputs and those of what is read next choose differently: both are tried."""
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((64, 16)).astype(np.float32)} for _ in range(20)]
    found: list[list[float]] = []
    measure = trials._losses

    def watched(*given: Any, **how: Any) -> Any:
        losses = measure(*given, **how)
        found.append(list(losses.values()))
        return dict(zip(losses, found[-1] if not better else found[-1][::-1], strict=True))

    monkeypatch.setattr(trials, "_losses", watched)
    model = load(branches(0.01))
    canonicalize(model)
    report = prune(model, PruneOptions(ratio=0.4, round_to=1, tune=False), feeds=feeds)
    # By the outputs all neurons go from the quiet branch, by what is read next some from each.
    assert found[0][0] < found[0][1]
    assert len(report.groups) == (2 if better else 1)
    # What is kept is the model that was measured.
    onnx.save(branches(0.01), tmp_path / "dense.onnx")
    save(model, tmp_path / "own.onnx")
    exact, own = (
        np.concatenate([y for run in run_model(tmp_path / f, feeds) for y in run.values()])
        for f in ("dense.onnx", "own.onnx")
    )
    error = np.square(own - exact).sum() / np.square(exact).sum()
    assert error == pytest.approx(found[0][better], rel=1e-3)


def test_the_loss_of_outputs_is_their_error(tmp_path: Path) -> None:
    d = Draft(seed=2)
    w = d.weight(4, 3)
    y = d.add("MatMul", "x", w)
    model = load(d.model({"x": ["n", 4]}, {y: ["n", 3]}))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    loss = OutputLoss(model, [w], [{"x": x}], 4, tmp_path)
    assert loss.tells
    assert loss({}) == 0.0
    array = model.graph.initializers[w].const_value.numpy()  # type: ignore[union-attr]
    assert loss({w: 1.5 * array}) == pytest.approx(0.25)
    assert loss({w: np.full_like(array, np.nan)}) >= 1e9
    assert not OutputLoss(model, [w], [{"x": np.zeros_like(x)}], 4, tmp_path).tells
