"""Choosing one setting for each weight: the least error in a budget of bytes.

The objective is a sum over weights, so the best plan for a given price of a byte is found weight by
weight, and the plans of all prices lie on the lower convex hulls of the weights' (bytes, cost)
points. Walking the hulls steepest step first is that Lagrangian solution; what is left of the
budget is then filled with whatever single step still fits and saves most per byte, and at last with
large steps that are paid for by small ones elsewhere.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from onnxcomp.passes.choices import Candidate
from onnxcomp.passes.menus import NOISE, Menu, distance, equal_plans

__all__ = ["allocate"]

# Exchanges of one large step for several small ones, and large steps looked at for each.
_EXCHANGES = 16


def _front(menu: Menu) -> Menu:
    """The candidates that no other beats in bytes and cost, by increasing bytes."""
    result: list[Candidate] = []
    order = sorted(menu.options, key=lambda c: (c.bytes, menu.cost_of(c), distance(c)))
    for candidate in order:
        if not result or menu.cost_of(candidate) < menu.cost_of(result[-1]):
            result.append(candidate)
    return menu.with_options(result)


def _hull(menu: Menu) -> list[int]:
    """Indices of the options on the lower convex hull of (bytes, cost)."""
    hull: list[int] = []
    for index in range(len(menu.options)):
        while len(hull) > 1 and _slope(menu, hull[-2], hull[-1]) <= _slope(menu, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(menu: Menu, low: int, high: int) -> float:
    """Cost saved per byte by going from one option to a larger one."""
    added = menu.options[high].bytes - menu.options[low].bytes
    return (menu.cost(low) - menu.cost(high)) / added


def _walk(menus: Sequence[Menu], room: int) -> tuple[list[int], int]:
    """Hull steps of all menus, steepest first, as far as they fit into `room` bytes."""
    hulls = [_hull(menu) for menu in menus]
    picks = [hull[0] for hull in hulls]
    steps = [
        (-_slope(menu, hull[0], hull[1]), site, 1)
        for site, (menu, hull) in enumerate(zip(menus, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(steps)
    while steps:
        _, site, position = heapq.heappop(steps)
        menu, hull = menus[site], hulls[site]
        added = menu.options[hull[position]].bytes - menu.options[picks[site]].bytes
        if added > room:
            continue
        room -= added
        picks[site] = hull[position]
        if position + 1 < len(hull):
            slope = _slope(menu, hull[position], hull[position + 1])
            heapq.heappush(steps, (-slope, site, position + 1))
    return picks, room


def _step(menu: Menu, pick: int, room: int) -> tuple[float, int] | None:
    """The step up from one option that saves most per byte in `room` bytes: slope and option."""
    start = menu.options[pick].bytes
    fitting = [
        (_slope(menu, pick, higher), -higher)
        for higher in range(pick + 1, len(menu.options))
        if menu.options[higher].bytes - start <= room
    ]
    if not fitting:
        return None
    slope, higher = max(fitting)
    return slope, -higher


def _fill(menus: Sequence[Menu], picks: Sequence[int], room: int) -> list[int]:
    """Take the single step that saves most per byte while one fits into `room` bytes."""
    picks = list(picks)
    heap: list[tuple[float, int, int]] = []

    def offer(site: int) -> None:
        step = _step(menus[site], picks[site], room)
        if step is not None:
            heapq.heappush(heap, (-step[0], site, step[1]))

    for site in range(len(menus)):
        offer(site)
    while heap:
        _, site, higher = heapq.heappop(heap)
        options = menus[site].options
        added = options[higher].bytes - options[picks[site]].bytes
        # Room only shrinks: a step that no longer fits is replaced by the best that does.
        if added <= room:
            room -= added
            picks[site] = higher
        offer(site)
    return picks


def _exchange(menus: Sequence[Menu], picks: Sequence[int], room: int) -> list[int]:
    """Take steps that do not fit by taking cheaper ones back elsewhere.

    Where all that is left are large steps, such as leaving a weight dense, this is what brings a
    plan near its budget. Costs are expectations: a trade that is even within `NOISE` fills room.
    """
    picks = list(picks)
    slack = NOISE * sum(menu.cost(pick) for menu, pick in zip(menus, picks, strict=True))
    for _ in range(_EXCHANGES):
        trades = [_trade(menus, picks, room, *rise) for rise in _rises(menus, picks, room)]
        saved, changes = max(trades, key=lambda trade: trade[0], default=(-slack, {}))
        slack += min(0.0, saved)
        if slack <= 0.0:
            break
        before = _total(menus, picks)
        changed = [changes.get(site, pick) for site, pick in enumerate(picks)]
        filled = _fill(menus, changed, room + before - _total(menus, changed))
        added = _total(menus, filled) - before
        if saved <= 0.0 and added <= 0:
            break
        picks, room = filled, room - added
    return picks


def _rises(menus: Sequence[Menu], picks: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Sites and options of the smallest steps that need more than `room` bytes."""
    found = [
        (added, site, higher)
        for site, (menu, pick) in enumerate(zip(menus, picks, strict=True))
        for higher in range(pick + 1, len(menu.options))
        if room < (added := menu.options[higher].bytes - menu.options[pick].bytes)
    ]
    return [(site, higher) for _, site, higher in heapq.nsmallest(_EXCHANGES, found)]


def _trade(
    menus: Sequence[Menu], picks: Sequence[int], room: int, site: int, higher: int
) -> tuple[float, dict[int, int]]:
    """What a step saves when other sites step down to make room for it, and all the steps."""
    menu = menus[site]
    added = menu.options[higher].bytes - menu.options[picks[site]].bytes
    saved, changes = menu.cost(picks[site]) - menu.cost(higher), {site: higher}
    needed = added - room
    # Steps down that free as much as the step up takes would only move it elsewhere.
    falls = sorted(
        (_slope(other, pick - 1, pick), number, freed)
        for number, (other, pick) in enumerate(zip(menus, picks, strict=True))
        if number != site
        and pick > 0
        and 2 * (freed := other.options[pick].bytes - other.options[pick - 1].bytes) <= added
    )
    for _, number, freed in falls:
        if needed <= 0:
            break
        other, pick = menus[number], picks[number]
        needed -= freed
        saved -= other.cost(pick - 1) - other.cost(pick)
        changes[number] = pick - 1
    return (saved, changes) if needed <= 0 else (-math.inf, {})


def _total(menus: Sequence[Menu], picks: Sequence[int]) -> int:
    return sum(menu.options[pick].bytes for menu, pick in zip(menus, picks, strict=True))


def _uniform_picks(menus: Sequence[Menu], fronts: Sequence[Menu]) -> list[list[int]]:
    """For each plan with equal settings, the options of `fronts` nearest below it in bytes."""
    result = []
    for plan in equal_plans(menus):
        at_most = [
            sum(option.bytes <= equal.bytes for option in front.options)
            for front, equal in zip(fronts, plan, strict=True)
        ]
        result.append([max(0, count - 1) for count in at_most])
    return result


def allocate(menus: Sequence[Menu], budget: int) -> list[Candidate]:
    """One candidate for each menu with the least total cost in `budget` bytes.

    Equal settings for all sites are among the plans compared. When not even the smallest
    candidates fit, they are the answer.
    """
    fronts = [_front(menu) for menu in menus]
    picks, room = _walk(fronts, budget - _total(fronts, [0] * len(fronts)))
    plans = [_fill(fronts, picks, room)]
    for equal in _uniform_picks(menus, fronts):
        room = budget - _total(fronts, equal)
        if room >= 0:
            plans.append(_fill(fronts, equal, room))
    best = min(plans, key=lambda p: sum(f.cost(i) for f, i in zip(fronts, p, strict=True)))
    room = budget - _total(fronts, best)
    best = _exchange(fronts, best, room) if room > 0 else best
    return [front.options[pick] for front, pick in zip(fronts, best, strict=True)]
