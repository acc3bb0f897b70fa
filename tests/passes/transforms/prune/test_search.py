"""Other divisions of a budget between layers, tried on the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prune_report import PruneReport, SearchReport
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.decide import Decision, Division
from onnxcomp.passes.transforms.prune.groups import Group
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.passes.transforms.prune.search import search
from onnxcomp.passes.transforms.prune.select import Step
from onnxcomp.runtime.evaluate import run_model

from .graphs import Draft

STEPS = 4


class Equal:
    """A ledger of classes that save the same each."""

    def __init__(self, count: int) -> None:
        self.gone = np.zeros(count, bool)

    @property
    def removed(self) -> float:
        return float(self.gone.mean())

    def remove(self, classes: Any) -> None:
        self.gone[list(classes)] = True

    def restore(self, classes: Any) -> None:
        self.gone[list(classes)] = False

    def clear(self) -> None:
        self.gone[:] = False


def division(losses: Sequence[Sequence[float]], share: float = 0.5) -> Division:
    """Layers whose steps are expected to cost these losses, in their order."""
    sequences, groups, own = [], [], 0
    for number, expected in enumerate(losses):
        classes = [frozenset({own + n}) for n in range(len(expected))]
        group = Group(f"w{number}", "channels", (tuple(classes),), (f"w{number}",))
        sequences.append([Step(group, c, x, 1.0) for c, x in zip(classes, expected, strict=True)])
        groups.append(group)
        own += len(expected)
    return Division(sequences, SimpleNamespace(groups=groups), Equal(own), share)  # type: ignore[arg-type]


def depths(decision: Decision, layers: int) -> tuple[int, ...]:
    """How many steps of each layer a decision takes."""
    return tuple(sum(c // STEPS == n for c in decision.classes) for n in range(layers))


def found(
    of: Division, real: Mapping[tuple[int, ...], float], most: int
) -> tuple[float, float, SearchReport, int]:
    """Loss by the knapsack, and by a search that measures real losses of depths."""
    layers = len(of.sequences)
    start = of.decision([1.0] * layers)
    runs = 0

    def attempt(decision: Decision) -> tuple[Decision, float]:
        nonlocal runs
        runs += 1
        return decision, real[depths(decision, layers)]

    before = real[depths(start, layers)]
    best, report = search(start, start, before, attempt, most)
    assert not of.ledger.gone.any()
    return before, real[depths(best, layers)], report, runs


def test_layers_that_lose_more_together_than_alone_are_found_out() -> None:
    """Two layers that stand in for each other: each alone may go, both together may not."""
    expected = [[0.1] * STEPS, [0.1] * STEPS, [1.0] * STEPS]
    real = {
        (a, b, c): 10.0 * min(a, b) + 0.1 * (a + b) + 1.0 * c
        for a, b, c in itertools.product(range(STEPS + 1), repeat=3)
    }
    before, after, report, runs = found(division(expected), real, 40)
    possible = {d: loss for d, loss in real.items() if sum(d) == 6}
    assert before > 20.0
    assert after == min(possible.values()) < 10.0
    assert report == SearchReport(before, after, runs) and runs <= 40


@given(st.integers(0, 10**6), st.integers(0, 12))
def test_a_search_never_loses_and_keeps_to_its_bound(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    own = division(np.sort(rng.exponential(1.0, (4, STEPS)), axis=1).tolist())
    real = {d: float(rng.exponential()) for d in itertools.product(range(STEPS + 1), repeat=4)}
    before, after, report, runs = found(own, real, most)
    assert after <= before and runs <= most
    assert report == SearchReport(before, after, runs)


def test_what_is_right_stays() -> None:
    expected = [[0.1, 0.2, 0.4, 0.8], [0.3, 0.6, 1.2, 2.4]]
    real = {
        (a, b): sum(expected[0][:a]) + sum(expected[1][:b])
        for a, b in itertools.product(range(STEPS + 1), repeat=2)
    }
    before, after, _, runs = found(division(expected), real, 40)
    assert after == before and runs > 0


def twins() -> onnx.ModelProto:
    """The larger one of two branches that are nearly the same, and a third that matters less."""
    d = Draft(seed=3)
    # Each neuron reads an input of its own, for which the others cannot make up.
    first = np.diag(d.rng.uniform(1, 2, 32)) + 0.02 * d.rng.standard_normal((32, 32))
    second = d.rng.uniform(0.1, 0.3, (32, 16))
    ends = []
    for scale in (1.0, 1.01):
        a = d.add("Relu", d.add("MatMul", "x", d.constant((scale * first).astype(np.float32))))
        ends.append(d.add("MatMul", a, d.constant((scale * second).astype(np.float32))))
    a = d.add("Relu", d.add("MatMul", "x", d.weight(32, 32)))
    other = d.add("Mul", d.add("MatMul", a, d.weight(32, 16)), d.constant(np.float32(0.2)))
    y = d.add("Add", d.add("Max", *ends), other)
    return d.model({"x": ["n", 32]}, {y: ["n", 16]})


def inputs(seed: int, count: int = 20) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((64, 32)).astype(np.float32)} for _ in range(count)]


def lost(search: int, folder: Path) -> tuple[float, PruneReport]:
    """Relative error on inputs that were not seen."""
    onnx.save(twins(), folder / "dense.onnx")
    model = load(twins())
    canonicalize(model)
    options = PruneOptions(ratio=0.4, round_to=1, tune=False, search=search)
    report = prune(model, options, feeds=inputs(0))
    save(model, folder / "own.onnx")
    exact, own = (
        np.concatenate([y for run in run_model(folder / f, inputs(1, 4)) for y in run.values()])
        for f in ("dense.onnx", "own.onnx")
    )
    return float(np.square(own - exact).sum() / np.square(exact).sum()), report


def test_a_model_whose_layers_stand_in_for_each_other_loses_less(tmp_path: Path) -> None:
    before, plain = lost(0, tmp_path)
    after, report = lost(16, tmp_path)
    assert plain.searched is None and report.searched is not None
    assert report.met and report.reached < plain.reached + 0.02
    assert 0 < report.searched.tried <= 16
    assert report.searched.after < 0.9 * report.searched.before
    assert after < 0.9 * before
    assert PruneReport.from_json(report.to_json()) == report
    assert lost(16, tmp_path)[1] == report


def test_a_run_says_what_the_search_found(tmp_path: Path) -> None:
    onnx.save(twins(), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in inputs(0)]))
    result = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune", prune_ratio=0.4,
        prune_search=2, data=tmp_path / "data.npz",
    )  # fmt: skip
    assert result.report.prune is not None
    searched = result.report.prune["searched"]
    assert searched["tried"] <= 2 and searched["after"] <= searched["before"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"prune_ratio": 0.4}, "no inputs"),
        ({"method": "hyper"}, "how much"),
        ({"ratio": 4}, "for one share"),
        ({"prune_ratio": 0.4, "prune_score": "wanda"}, "score obs, not wanda"),
    ],
)
def test_a_search_that_cannot_be_is_refused(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    onnx.save(twins(), tmp_path / "m.onnx")
    given = {"method": "prune", **options}
    if "prune_score" in options:
        given["data"] = {"x": inputs(0)[0]["x"]}
    with pytest.raises(UsageError, match=what):
        onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", prune_search=4, **given)
