"""The least cost in a budget of bytes, nearly exactly: what is left where single steps end.

A plan is a state (bytes, cost); weights are added one after the other, and of all states those stay
that no other beats in both (Nemhauser and Ullmann, Management Science 15, 1969). Before that, a
Lagrangian bound rules out most options: one whose cost at the price of a byte is further from the
best of its weight than a known plan is from the bound can be in no better plan (reduced costs,
Pisinger, European Journal of Operational Research 83, 1995).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Options", "cheapest"]

# States that are kept from weight to weight.
_STATES = 1024

# Relative error of a sum of costs, with room for many weights.
_ROUNDING = 1e-12

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Bytes and costs of what there is to choose from for one weight.
Options = tuple[Ints, Floats]


def cheapest(
    options: Sequence[Options], picks: Sequence[int], budget: int, price: float
) -> list[int]:
    """The plan of least cost in `budget` bytes, as far as a limited number of states can tell.

    Args:
        options: Bytes and costs of the options of each weight.
        picks: A plan that fits, one option for each weight.
        budget: Most bytes of a plan.
        price: What a byte costs about where the budget ends.

    Returns:
        A plan that fits and costs no more than `picks`; on equal cost, `picks`.
    """
    known = sum(float(cost[pick]) for (_, cost), pick in zip(options, picks, strict=True))
    priced = [cost + price * size for size, cost in options]
    gap = known - sum(float(values.min()) for values in priced) + price * budget
    # Sums of costs are rounded: without this a bound could rule out the plan that it came from.
    gap += _ROUNDING * (abs(known) + price * budget)
    able = [
        np.flatnonzero((values <= values.min() + gap) | (np.arange(len(values)) == pick))
        for values, pick in zip(priced, picks, strict=True)
    ]
    free = [number for number, left in enumerate(able) if len(left) > 1]
    free.sort(key=lambda number: -int(options[number][0][able[number]].max()))
    room = budget - sum(
        int(options[number][0][left[0]]) for number, left in enumerate(able) if len(left) == 1
    )
    found = _states([(options[n][0][able[n]], options[n][1][able[n]]) for n in free], room)
    result = [int(left[0]) for left in able]
    for number, pick in zip(free, found, strict=True):
        result[number] = int(able[number][pick])
    total = sum(float(cost[pick]) for (_, cost), pick in zip(options, result, strict=True))
    return result if total < known else list(picks)


def _states(options: Sequence[Options], room: int) -> list[int]:
    """The option of each weight in the cheapest state that is left; the smallest where none is."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    came: list[tuple[Ints, Ints]] = []
    rest = sum(int(size.min()) for size, _ in options)
    for size, cost in options:
        rest -= int(size.min())
        wide = (sizes[:, None] + size[None, :]).ravel()
        dear = (costs[:, None] + cost[None, :]).ravel()
        kept = _undominated(wide, dear, room - rest)
        if len(kept) == 0:
            return [int(np.argmin(size)) for size, _ in options]
        came.append((kept // len(size), kept % len(size)))
        sizes, costs = wide[kept], dear[kept]
    picks = []
    state = len(sizes) - 1  # of states that none beats, the largest costs least
    for before, option in reversed(came):
        picks.append(int(option[state]))
        state = int(before[state])
    return picks[::-1]


def _undominated(sizes: Ints, costs: Floats, room: int) -> Ints:
    """States in `room` bytes that no other beats, by increasing bytes; some where they are many."""
    order = np.lexsort((costs, sizes))
    order = order[sizes[order] <= room]
    if len(order) == 0:
        return order
    best = np.minimum.accumulate(costs[order])
    order = order[np.concatenate(([True], costs[order][1:] < best[:-1]))]
    if len(order) <= _STATES:
        return order
    # Of states with about the same bytes the cheapest, which is the last one, stays.
    own = sizes[order]
    bucket = (own - own[0]) * _STATES // (own[-1] - own[0] + 1)
    return order[np.concatenate((bucket[1:] != bucket[:-1], [True]))]
