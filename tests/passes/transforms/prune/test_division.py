"""One size for pruning and codes: which share is pruned, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.driver.prune_budget import Trial, best_share
from onnxcomp.passes.planning.plan import Plan

from .test_pruning import feeds, wide


def trials(error: Any, budget: float = 1.0, most: float = 1.0) -> list[Trial]:
    """Trials of a model with this error of codes by share; bytes fall with the share."""

    def attempt(share: float) -> tuple[Trial, float] | None:
        if share > most:
            return None
        size = 1.0 - share
        return Trial(share, int(1000 * size), size <= budget, share / 10, error(share)), share

    best, found = best_share(attempt)
    assert best == found[0].share
    return found


def test_nothing_is_pruned_where_codes_alone_lose_less() -> None:
    found = trials(lambda share: 0.01)
    assert [trial.share for trial in found] == [0.0, 0.1]


def test_the_best_share_is_looked_for_between_those_tried() -> None:
    found = trials(lambda share: abs(share - 0.3))
    assert found[0].share == pytest.approx(0.3, abs=0.05)
    assert found[0].error == min(trial.error for trial in found)
    assert [trial.share for trial in found[1:]] == sorted(trial.share for trial in found[1:])


def test_more_is_pruned_while_the_size_is_missed() -> None:
    found = trials(lambda share: 0.0, budget=0.6)
    assert found[0].met and 0.4 <= found[0].share < 0.45
    missed = trials(lambda share: 0.0, budget=0.1, most=0.5)
    assert not missed[0].met and missed[0].share == 0.5
    assert len(missed) == 5


def test_unknown_errors_never_win() -> None:
    found = trials(lambda share: None if share else 0.5)
    assert found[0].share == 0.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose neurons are correlated."""
    onnx.save(wide(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Inputs of it."""
    path = tmp_path / "data.npz"
    np.savez(path, x=feeds(1, 4000)[0]["x"])
    return path


def test_pruning_and_codes_divide_a_size(model: Path, data: Path, tmp_path: Path) -> None:
    options: Any = {"ratio": 2, "min_size": 64, "data": data}
    both = onnxcomp.optimize(model, tmp_path / "b.onnx", method=["prune", "hyper"], **options)
    alone = onnxcomp.optimize(model, tmp_path / "a.onnx", method="hyper", **options)
    assert both.report.output.bytes <= alone.report.input.bytes / 2
    assert both.report.division is not None
    shares = [trial["share"] for trial in both.report.division]
    assert 0.0 in shares and shares[0] > 0.0
    assert both.report.prune is not None
    assert both.report.prune["asked"] == pytest.approx(shares[0])
    assert both.verify is not None and alone.verify is not None
    error, other = (r.verify.outputs for r in (both, alone) if r.verify is not None)
    assert next(iter(error.values())).rel_l2 < next(iter(other.values())).rel_l2


def test_the_plan_of_a_division_is_carried_out_again(
    model: Path, data: Path, tmp_path: Path
) -> None:
    plan = onnxcomp.plan(model, method="prune+int", ratio=2, min_size=64, data=data)
    again = Plan.loads(plan.dumps())
    assert again.division == plan.division and again.settings.divide is None
    result = onnxcomp.apply(model, again, tmp_path / "s.onnx", data=data)
    assert result.report.output.bytes == plan.bytes
    assert result.report.division == list(plan.division)


def test_pruning_alone_reaches_a_size(model: Path, data: Path, tmp_path: Path) -> None:
    result = onnxcomp.optimize(model, tmp_path / "s.onnx", method="prune", ratio=1.5, data=data)
    assert result.report.output.bytes <= result.report.input.bytes / 1.5
    assert not any(site.compressed for site in result.report.sites)


def test_a_size_out_of_reach_is_said(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(onnxcomp.TargetMissedError) as caught:
        onnxcomp.optimize(model, tmp_path / "s.onnx", method="prune", ratio=50, data=data)
    assert caught.value.exit_code == 3
    assert (tmp_path / "s.onnx").exists()


def test_a_division_needs_inputs(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inputs decide"):
        onnxcomp.optimize(model, tmp_path / "s.onnx", method="prune+hyper", ratio=4)
    with pytest.raises(UsageError, match="equal inputs"):
        data = {"x": np.zeros((4, 8), np.float32)}
        onnxcomp.plan(model, method="prune+int", ratio=4, prune_caches=True, data=data)
