"""Ranks by what they keep: energy, a share of the weights, a threshold for singular values."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.lowrank.ranks import rank_for
from onnxcomp.passes.weight import Use, WeightSite

Array = npt.NDArray[Any]
WIDTHS = (96, 128, 64)


def singular(rows: int, length: int, values: Array, seed: int) -> Array:
    """A matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((length, len(values))))
    return ((left * values) @ right.T).astype(np.float32)


SPECTRA = [np.geomspace(4.0, 0.04, 96), np.geomspace(2.0, 0.5, 64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products with known singular values, the second one's nearly even."""
    sizes = itertools.pairwise(WIDTHS)
    weights = [
        singular(length, rows, spectrum, seed)
        for seed, ((length, rows), spectrum) in enumerate(zip(sizes, SPECTRA, strict=True))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "second"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", onnx.TensorProto.FLOAT, ["n", WIDTHS[0]])],
        [value("y", onnx.TensorProto.FLOAT, ["n", WIDTHS[-1]])],
        [numpy_helper.from_array(w, n) for w, n in zip(weights, ("first", "second"), strict=True)],
    )
    path = tmp_path_factory.mktemp("goals") / "model.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def ranks(model: Path, rule: str, **options: Any) -> list[int | None]:
    """Ranks of both weights; None for one that stays as it is."""
    plan = onnxcomp.plan(model, set_=f".*:method=lowrank,{rule}", **options)
    choices = [plan[name] for name in ("first", "second")]
    return [getattr(c.params, "rank", None) for c in choices]


def site(rows: int, length: int) -> WeightSite:
    use = Use("n", "MatMul", 1, "matmul")
    return WeightSite("w", (length, rows), "float32", (use,), "", rows, length, True)


values = st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=60).map(
    lambda found: np.square(sorted(found, reverse=True))
)


@settings(deadline=None, max_examples=60)
@given(values, st.floats(0.01, 1.0), st.sampled_from([1, 8]))
def test_energy_takes_the_least_rank_that_has_it(energies: Array, share: float, step: int) -> None:
    rank = rank_for(site(80, 90), "energy", share, energies, step)
    kept = energies[:rank].sum() / energies.sum()
    assert rank % step == 0
    assert kept >= share - 1e-9
    assert rank == step or energies[: rank - step].sum() / energies.sum() < share + 1e-9


@settings(deadline=None, max_examples=60)
@given(st.integers(32, 900), st.integers(32, 900), st.floats(0.01, 0.99))
def test_a_share_of_the_weights_is_not_exceeded(rows: int, length: int, share: float) -> None:
    rank = rank_for(site(rows, length), "kept", share, np.zeros(0), 8)
    one = rows + length
    assert rank == 8 or rank * one <= share * rows * length * (1 + 1e-12)
    assert (rank + 8) * one > share * rows * length * (1 - 1e-12)


@settings(deadline=None, max_examples=60)
@given(values, st.floats(0.01, 1.0))
def test_thresholds_count_singular_values(energies: Array, threshold: float) -> None:
    found = np.sqrt(energies)
    wanted = {"above": threshold * found[0], "beyond": threshold}
    for goal, least in wanted.items():
        rank = rank_for(site(80, 90), goal, threshold, energies, 1)
        assert np.all(found[:rank][1:] >= least * (1 - 1e-9))
        assert np.all(found[rank:] < least * (1 + 1e-9))


def test_a_weight_of_zeros_has_the_least_rank() -> None:
    for goal in ("energy", "beyond"):
        assert rank_for(site(80, 90), goal, 0.5, np.zeros(80), 8) == 8


def test_rules_ask_for_what_is_kept_of_each_weight(model: Path) -> None:
    assert ranks(model, "kept=0.5") == [24, 16]
    assert ranks(model, "kept=0.9") == [48, 32]
    assert ranks(model, "above=0.5") == [16, 32]  # 15 values up to half of 4, 32 up to half of 2
    assert ranks(model, "beyond=1.5") == [24, 16]
    energy = np.cumsum(SPECTRA[0] ** 2)
    wanted = int(np.count_nonzero(energy < 0.9 * energy[-1])) + 1
    first, second = ranks(model, "energy=0.9")
    assert first == -(-wanted // 8) * 8
    assert second is None  # two factors with nine tenths of its energy would be larger


def test_a_goal_that_does_not_pay_keeps_the_weight_with_the_reason(model: Path) -> None:
    plan = onnxcomp.plan(model, set_=".*:method=lowrank,energy=0.9")
    assert "not less than 32768 dense" in plan["second"].reason


def test_what_was_asked_for_is_in_the_file(model: Path, tmp_path: Path) -> None:
    result = onnxcomp.optimize(
        model, tmp_path / "small.onnx", set_="first:method=lowrank,energy=0.97", exclude="second"
    )
    [found] = [s for s in result.report.sites if s.method == "lowrank"]
    assert found.weight_error**2 <= 0.03
    assert found.reason == "set by the rule first:method=lowrank,energy=0.97"
    written = onnx.load(tmp_path / "small.onnx")
    assert not written.functions
    assert all(not node.domain for node in written.graph.node)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    assert session.run(None, {"x": np.ones((2, WIDTHS[0]), np.float32)})[0].shape == (2, 64)


def test_with_inputs_the_energy_is_that_of_the_products(model: Path) -> None:
    rng = np.random.default_rng(0)
    few = rng.standard_normal((5, WIDTHS[0])).astype(np.float32)
    x = rng.standard_normal((2000, 5)).astype(np.float32) @ few
    with_data = ranks(model, "energy=0.95", data={"x": x})
    assert with_data[0] == 8
    without = ranks(model, "energy=0.95")[0]
    assert without is not None
    assert without > 16


def test_factors_in_few_bits_take_ranks_in_steps_of_32(model: Path) -> None:
    plan = onnxcomp.plan(model, set_="first:method=lowrank+hyper,energy=0.9", exclude="second")
    assert getattr(plan["first"].params, "rank", None) == 32
    full = onnxcomp.plan(model, set_="second:method=lowrank+hyper,energy=1", exclude="first")
    assert full["second"].codec == "dense"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("method=lowrank,energy=1.5", "energy is 1.5 for 'first'"),
        ("method=lowrank,kept=0", "kept is 0"),
        ("method=lowrank,above=many", "above is 'many'"),
        ("method=lowrank,energy=0.9,rank=16", "rank and energy|energy and rank"),
        ("method=hyper,energy=0.9", "energy says which rank to take, and hyper has none"),
    ],
)
def test_what_makes_no_sense_is_refused(model: Path, rule: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        onnxcomp.plan(model, set_=f".*:{rule}")
    assert caught.value.hint
