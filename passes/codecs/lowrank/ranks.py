"""Ranks that are asked for by what they keep: energy, weights, or singular values.

`kept` is the same share of every weight, and `above` the same threshold for the singular values of
every weight over its largest one: the local and the global truncation of LoRITa (Alkhouri et al.,
arXiv 2405.03089); `beyond` is the threshold for singular values as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["GOALS", "rank_for"]

GOALS: Mapping[str, str] = {
    "energy": "the least rank with this share of the sum of squared singular values, up to 1",
    "kept": "the largest rank whose factors have this share of the weights, below 1",
    "above": "as many as there are singular values of at least this share of the largest one",
    "beyond": "as many as there are singular values of at least this size",
}

# Shares have a highest value; a threshold for singular values has none.
_HIGHEST = {"energy": 1.0, "kept": 1.0, "above": 1.0, "beyond": math.inf}

# What rounding may take from the sum of energies.
_ROUNDING = 1e-12


def rank_for(site: WeightSite, goal: str, value: object, energies: Array, step: int) -> int:
    """The rank of a weight that reaches a goal, as a multiple of `step` and at least that.

    It is rounded down where the goal is a size, else up, so that what was asked for is kept.

    Args:
        site: The weight.
        goal: One of `GOALS`.
        value: How much of it.
        energies: Squared singular values of the weight, or of its products, largest first.
        step: What ranks are multiples of.

    Raises:
        UsageError: The value is out of range.
    """
    highest = _HIGHEST[goal]
    number = float(value) if isinstance(value, (int, float)) else math.nan
    if not 0.0 < number <= highest:
        limit = "above 0" if math.isinf(highest) else f"above 0 and at most {highest:g}"
        raise UsageError(f"{goal} is {value!r} for {site.name!r}", hint=f"it is a number {limit}")
    if goal == "kept":
        exact = number * site.size / (site.rows + site.length)
        return max(step, int(exact / step) * step)
    return max(step, -(-_count(goal, number, energies) // step) * step)


def _count(goal: str, value: float, energies: Array) -> int:
    """How many of the largest singular values are wanted."""
    if goal == "energy":
        sums = np.cumsum(energies)
        return int(np.searchsorted(sums, (value - _ROUNDING) * sums[-1])) + 1 if sums[-1] else 1
    least = value * value * (energies[0] if goal == "above" else 1.0)
    return int(np.count_nonzero(energies >= least))
