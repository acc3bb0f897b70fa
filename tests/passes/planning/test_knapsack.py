"""The least cost in a budget, by combinations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.knapsack import Options, cheapest
from onnxcomp.passes.planning.lagrangian import allocate
from onnxcomp.passes.planning.search_space import CandidateSet
from onnxcomp.passes.weight import Use, WeightSite

points = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 90)), min_size=1, max_size=5)


def options(offers: Sequence[Sequence[tuple[int, int]]]) -> list[Options]:
    return [
        (np.array([b for b, _ in offer], np.int64), np.array([float(c) for _, c in offer]))
        for offer in offers
    ]


def cost(found: Sequence[Options], picks: Sequence[int]) -> float:
    return sum(float(costs[pick]) for (_, costs), pick in zip(found, picks, strict=True))


def size(found: Sequence[Options], picks: Sequence[int]) -> int:
    return sum(int(sizes[pick]) for (sizes, _), pick in zip(found, picks, strict=True))


@settings(deadline=None, max_examples=200)
@example([[(32, 0)], [(47, 0)], [(19, 2), (20, 0)], [(47, 0)], [(48, 0)]], 193, 1.0462799)
@example([[(19, 24)], [(32, 0)], [(47, 32)], [(48, 0)], [(47, 0)]], 193, 2.0462799)
@given(st.lists(points, min_size=1, max_size=5), st.integers(5, 250), st.floats(0.0, 10.0))
def test_of_few_weights_the_best_combination_is_found_at_any_price(
    offers: list[list[tuple[int, int]]], budget: int, price: float
) -> None:
    sets = options(offers)
    plans = list(itertools.product(*(range(len(o)) for o in offers)))
    fitting = [plan for plan in plans if size(sets, plan) <= budget]
    if not fitting:
        return
    known = max(fitting, key=lambda plan: cost(sets, plan))
    found = cheapest(sets, known, budget, price)
    assert size(sets, found) <= budget
    assert cost(sets, found) == min(cost(sets, plan) for plan in fitting)


def test_of_many_weights_a_plan_is_found_that_no_bound_says_can_be_much_better() -> None:
    rng = np.random.default_rng(0)
    sets: list[Options] = []
    for scale in rng.uniform(100, 9000, 40):
        sizes = np.sort(rng.integers(1, 100, 20)) * int(scale)
        sets.append((sizes, scale * 4.0 ** -(8 * sizes / sizes[-1]) * rng.uniform(0.5, 2, 20)))
    budget = sum(int(np.median(sizes)) for sizes, _ in sets)
    smallest = [int(np.argmin(sizes)) for sizes, _ in sets]
    prices = np.geomspace(1e-9, 1.0, 400)
    bounds = [sum((c + p * b).min() for b, c in sets) - p * budget for p in prices]
    best = max(range(400), key=lambda number: bounds[number])
    found = cheapest(sets, smallest, budget, float(prices[best]))
    assert size(sets, found) <= budget
    assert cost(sets, found) < 1.02 * bounds[best]


def test_a_large_weight_steps_up_where_small_ones_can_pay_for_it() -> None:
    def candidate_set(name: str, points: Sequence[tuple[int, float]]) -> CandidateSet:
        use = Use("n", "MatMul", 1, "matmul")
        site = WeightSite(name, (64, 64), "float32", (use,), "", 64, 64, False)
        return CandidateSet(
            site, tuple(Candidate(site, "hyper", HyperParams(), b, e) for b, e in points)
        )

    sets = [
        candidate_set("large", [(100, 1.0), (190, 0.5)]),
        *(candidate_set(f"small{i}", [(10, 0.2), (40, 0.1)]) for i in range(3)),
    ]
    picks = allocate(sets, 220)
    assert [pick.bytes for pick in picks] == [190, 10, 10, 10]
