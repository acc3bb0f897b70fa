"""The smallest output that the gates accept is found in a few tries."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.size_search import SizeSearch
from onnxcomp.passes.ir.files import Source
from onnxcomp.passes.planning.plan import Budget, Plan

WEIGHTS = 1_000_000
RNG = np.random.default_rng(5)


def plan_of(size: int) -> Plan:
    return Plan(Source("m.onnx", 4 * WEIGHTS, None), Settings(), Budget(), {}, bytes=size)


def found(
    error_of: Callable[[int], float], start: int, *, seen: bool = True, grain: int = 1000
) -> tuple[int, int]:
    """Bytes of the smallest output that passed, and the number of tries.

    Args:
        error_of: Error over the allowed one, by bytes.
        start: Bytes of the first plan.
        seen: Whether the search is told the error, or only the verdict.
        grain: Plans have bytes that are multiples of it.
    """
    search = SizeSearch(lambda size: plan_of(max(grain, size // grain * grain)), WEIGHTS)
    plan: Plan | None = plan_of(start)
    passed, tries = [], 0
    while plan is not None:
        tries += 1
        assert plan.bytes is not None
        excess = error_of(plan.bytes)
        passed += [plan.bytes] if excess <= 1.0 else []
        plan = search.next(plan, passed=excess <= 1.0, excess=excess if seen else None)
    return min(passed), tries


@pytest.mark.parametrize("start", [150_000, 300_000, 500_000, 900_000])
@pytest.mark.parametrize("seen", [True, False])
def test_the_smallest_output_is_found_within_five_percent(start: int, seen: bool) -> None:
    least = 412_345
    for bits in (0.7, 1.0, 1.6):  # how much of the usual gain a bit brings
        size, tries = found(
            lambda b, bits=bits: 2.0 ** ((least - b) * 8 * bits / WEIGHTS), start, seen=seen
        )
        assert least <= size <= 1.05 * least
        assert tries <= 10


def test_an_error_that_falls_in_steps_is_found_as_well() -> None:
    size, tries = found(lambda b: 0.5 if b >= 333_000 else 4.0, 800_000)
    assert 333_000 <= size <= 1.05 * 333_000
    assert tries <= 10


def test_the_search_ends_where_plans_do_not_become_smaller() -> None:
    size, tries = found(lambda b: 0.01, 400_000, grain=250_000)
    assert size == 250_000
    assert tries <= 4


def model(path: Path) -> Path:
    """Three products of different widths."""
    widths = [256, 384, 192, 256]
    names = [f"w{i}" for i in range(3)]
    arrays = [
        (RNG.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32)
        for a, b in itertools.pairwise(widths)
    ]
    nodes, last = [], "x"
    for index, name in enumerate(names):
        nodes += [
            helper.make_node("MatMul", [last, name], [f"h{index}"]),
            helper.make_node("Relu" if index < 2 else "Identity", [f"h{index}"], [f"r{index}"]),
        ]
        last = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 256])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["N", 256])],
        [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def error(dense: Path, small: Path, x: np.ndarray) -> float:
    first, second = (
        onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for path in (dense, small)
    )
    return float(np.linalg.norm(second - first) / np.linalg.norm(first))


def test_a_limit_is_held_by_nearly_the_smallest_file(tmp_path: Path) -> None:
    """No target below 95 % of what is delivered holds the limit."""
    dense = model(tmp_path / "m.onnx")
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    options = {"method": "hyper", "data": tmp_path / "x.npz", "calibration": "off"}
    limit = 0.12
    result = oc.optimize(dense, tmp_path / "small.onnx", max_error=limit, **options)
    assert result.verify is not None and result.verify.passed
    delivered = result.report.output.bytes
    for share in (0.95, 0.85, 0.7):
        target = int(share * delivered)
        other = oc.optimize(
            dense, tmp_path / "other.onnx", target_size=target, force=True, **options
        )
        assert other.verify is not None
        assert max(o.rel_l2 for o in other.verify.outputs.values()) > limit
    assert error(dense, tmp_path / "small.onnx", x) < 1.5 * limit


def test_a_score_is_held_by_nearly_the_smallest_file(tmp_path: Path) -> None:
    dense = model(tmp_path / "m.onnx")
    x = RNG.standard_normal((64, 256)).astype(np.float32)
    exact = onnxruntime.InferenceSession(str(dense)).run(None, {"x": x})[0]
    scores: list[float] = []

    def closeness(open_session: Callable[[], onnxruntime.InferenceSession]) -> float:
        (y,) = open_session().run(None, {"x": x})
        scores.append(1.0 - float(np.linalg.norm(y - exact) / np.linalg.norm(exact)))
        return scores[-1]

    options = {"method": "hyper", "evaluate": closeness, "max_drop": 0.2}
    result = oc.optimize(dense, tmp_path / "small.onnx", **options)
    evaluation = result.report.evaluation
    assert evaluation is not None and evaluation["passed"]
    assert len(scores) <= 13
    for share in (0.95, 0.8):
        target = int(share * result.report.output.bytes)
        other = oc.optimize(
            dense, tmp_path / "other.onnx", target_size=target, force=True, **options
        )
        assert other.report.evaluation is not None
        assert not other.report.evaluation["passed"]


def test_a_better_plan_that_is_smaller_is_tried_while_none_passed() -> None:
    """More bits for all weights need one kind of operator, mixed bits two."""
    better = plan_of(95_000)
    search = SizeSearch(lambda size: better if size < 130_000 else plan_of(104_000), WEIGHTS)
    assert search.next(plan_of(100_000), passed=False, excess=1.1) is better
    larger = search.next(better, passed=False, excess=1.05)
    assert larger is not None and larger.bytes == 104_000
    assert search.next(larger, passed=True, excess=0.9) is None
