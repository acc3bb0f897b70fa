"""Rules that ask for a rank by what it keeps, such as ``energy=0.9``, for one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.lowrank.ranks import GOALS
from onnxcomp.passes.codecs.protocol import RankGoals
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["has_goal", "with_rank"]

# Squared singular values of a weight, or of its products.
Energies = Callable[[RankGoals, WeightSite], Array]

RANK = "rank"


def has_goal(policy: Policy) -> bool:
    """Whether a weight is asked for a rank by what it keeps."""
    return any(name in GOALS for name in policy.params)


def with_rank(policy: Policy, site: WeightSite, energies: Energies) -> Policy:
    """The policy with the rank that reaches its goal; as it is where it has none.

    Args:
        policy: What is asked of the weight.
        site: The weight.
        energies: Looks at the weight; called for a goal that needs it.

    Raises:
        UsageError: More than one of rank and goals, a method without ranks, or a value out of
            range.
    """
    if not has_goal(policy):
        return policy
    given = [name for name in policy.params if name in GOALS or name == RANK]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} were given together", hint="choose one of them")
    (goal,) = given
    codecs = [CODECS[name] for name in policy.methods]
    ranked = next(((codec, codec.ranks) for codec in codecs if codec.ranks is not None), None)
    if ranked is None:
        raise UsageError(
            f"{goal} says which rank to take, and {'+'.join(policy.methods)} has none",
            hint=f"write for example 'RE:method=lowrank,{goal}={policy.params[goal]}'",
        )
    codec, ranks = ranked
    value = policy.params[goal]
    if codec.refuse(site) is not None:
        return policy
    found = np.zeros(0) if goal == "kept" else energies(ranks, site)
    rest = {name: value for name, value in policy.params.items() if name != goal}
    return dataclasses.replace(
        policy, params={**rest, RANK: ranks.rank_for(site, goal, value, found)}
    )
