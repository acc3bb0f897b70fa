"""Choosing one setting for each weight: the least error in a budget of bytes.

The objective is a sum over weights, so the best plan for a given price of a byte is found weight by
weight, and the plans of all prices lie on the lower convex hulls of the weights' (bytes, cost)
points. Walking the hulls steepest step first is that Lagrangian solution; what is left of the
budget is then filled with whatever single step still fits and saves most per byte. Where weights
are few and steps large, a search over all combinations that could be better comes last.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.knapsack import cheapest
from onnxcomp.passes.planning.search_space import CandidateSet, distance, equal_plans

__all__ = ["allocate", "hull_of", "undominated"]

# Relative distance of a plan to what no plan can be better than, from which on a better one is
# looked for.
_GAP = 0.0005


def undominated(candidates: CandidateSet) -> CandidateSet:
    """The candidates that no other beats in bytes and cost, by increasing bytes."""
    result: list[Candidate] = []
    order = sorted(candidates.options, key=lambda c: (c.bytes, candidates.cost_of(c), distance(c)))
    for candidate in order:
        if not result or candidates.cost_of(candidate) < candidates.cost_of(result[-1]):
            result.append(candidate)
    return candidates.with_options(result)


def hull_of(candidates: CandidateSet) -> list[int]:
    """Indices of the options on the lower convex hull of (bytes, cost)."""
    hull: list[int] = []
    for index in range(len(candidates.options)):
        while len(hull) > 1 and _slope(candidates, hull[-2], hull[-1]) <= _slope(
            candidates, hull[-1], index
        ):
            hull.pop()
        hull.append(index)
    return hull


def _slope(candidates: CandidateSet, low: int, high: int) -> float:
    """Cost saved per byte by going from one option to a larger one."""
    added = candidates.options[high].bytes - candidates.options[low].bytes
    return (candidates.cost(low) - candidates.cost(high)) / added


def _walk(sets: Sequence[CandidateSet], room: int) -> tuple[list[int], int, float]:
    """Hull steps of all sets, steepest first, as far as they fit into `room` bytes.

    Returns:
        The options, the bytes that are left, and what the first step that did not fit saves per
        byte: the price of a byte at the end of the budget.
    """
    hulls = [hull_of(candidates) for candidates in sets]
    picks = [hull[0] for hull in hulls]
    steps = [
        (-_slope(candidates, hull[0], hull[1]), site, 1)
        for site, (candidates, hull) in enumerate(zip(sets, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(steps)
    price = 0.0
    while steps:
        falling, site, position = heapq.heappop(steps)
        candidates, hull = sets[site], hulls[site]
        added = candidates.options[hull[position]].bytes - candidates.options[picks[site]].bytes
        if added > room:
            price = max(price, -falling)
            continue
        room -= added
        picks[site] = hull[position]
        if position + 1 < len(hull):
            slope = _slope(candidates, hull[position], hull[position + 1])
            heapq.heappush(steps, (-slope, site, position + 1))
    return picks, room, price


def _step(candidates: CandidateSet, pick: int, room: int) -> tuple[float, int] | None:
    """The step up from one option that saves most per byte in `room` bytes: slope and option."""
    start = candidates.options[pick].bytes
    fitting = [
        (_slope(candidates, pick, higher), -higher)
        for higher in range(pick + 1, len(candidates.options))
        if candidates.options[higher].bytes - start <= room
    ]
    if not fitting:
        return None
    slope, higher = max(fitting)
    return slope, -higher


def _fill(sets: Sequence[CandidateSet], picks: Sequence[int], room: int) -> list[int]:
    """Take the single step that saves most per byte while one fits into `room` bytes."""
    picks = list(picks)
    heap: list[tuple[float, int, int]] = []

    def offer(site: int) -> None:
        step = _step(sets[site], picks[site], room)
        if step is not None:
            heapq.heappush(heap, (-step[0], site, step[1]))

    for site in range(len(sets)):
        offer(site)
    while heap:
        _, site, higher = heapq.heappop(heap)
        options = sets[site].options
        added = options[higher].bytes - options[picks[site]].bytes
        # Room only shrinks: a step that no longer fits is replaced by the best that does.
        if added <= room:
            room -= added
            picks[site] = higher
        offer(site)
    return picks


def _total(sets: Sequence[CandidateSet], picks: Sequence[int]) -> int:
    return sum(candidates.options[pick].bytes for candidates, pick in zip(sets, picks, strict=True))


def _cost(sets: Sequence[CandidateSet], picks: Sequence[int]) -> float:
    return sum(candidates.cost(pick) for candidates, pick in zip(sets, picks, strict=True))


def _uniform_picks(sets: Sequence[CandidateSet], fronts: Sequence[CandidateSet]) -> list[list[int]]:
    """For each plan with equal settings, the options of `fronts` nearest below it in bytes."""
    result = []
    for plan in equal_plans(sets):
        at_most = [
            sum(option.bytes <= equal.bytes for option in front.options)
            for front, equal in zip(fronts, plan, strict=True)
        ]
        result.append([max(0, count - 1) for count in at_most])
    return result


def allocate(sets: Sequence[CandidateSet], budget: int) -> list[Candidate]:
    """One candidate of each set with the least total cost in `budget` bytes.

    Equal settings for all sites are among the plans compared. When not even the smallest
    candidates fit, they are the answer.
    """
    fronts = [undominated(candidates) for candidates in sets]
    picks, room, price = _walk(fronts, budget - _total(fronts, [0] * len(fronts)))
    plans = [_fill(fronts, picks, room)]
    for equal in _uniform_picks(sets, fronts):
        room = budget - _total(fronts, equal)
        if room >= 0:
            plans.append(_fill(fronts, equal, room))
    best = min(plans, key=lambda picks: _cost(fronts, picks))
    if price > 0.0 and _total(fronts, best) <= budget:
        best = _searched(fronts, best, budget, price)
    return [front.options[pick] for front, pick in zip(fronts, best, strict=True)]


def _searched(
    fronts: Sequence[CandidateSet], picks: list[int], budget: int, price: float
) -> list[int]:
    """A better plan where a few exchanges find one, or the same."""
    known = _cost(fronts, picks)
    options = [
        (
            np.array([option.bytes for option in front.options], np.int64),
            np.array([front.cost_of(option) for option in front.options]),
        )
        for front in fronts
    ]
    bound = sum(float((cost + price * size).min()) for size, cost in options) - price * budget
    return picks if known - bound <= _GAP * known else cheapest(options, picks, budget, price)
