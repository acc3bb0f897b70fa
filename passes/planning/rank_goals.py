"""Rules that ask for a rank by what it keeps, such as ``energy=0.9``, for one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.lowrank.ranks import GOALS
from onnxcomp.passes.codecs.protocol import RankGoals
from onnxcomp.passes.config.settings import Rule
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["has_goal", "with_rank"]

# Squared singular values of a weight, or of its products.
Energies = Callable[[RankGoals, WeightSite], Array]

RANK = "rank"


def has_goal(rule: Rule) -> bool:
    """Whether a rule says what a rank is to keep."""
    return any(name in GOALS for name in rule.params)


def with_rank(rule: Rule, methods: Sequence[str], site: WeightSite, energies: Energies) -> Rule:
    """The rule with the rank that reaches its goal; as it is where it has none.

    Args:
        rule: What is asked for.
        methods: Codecs of the run, where the rule names none.
        site: The weight.
        energies: Looks at the weight; called for a goal that needs it.

    Raises:
        UsageError: More than one of rank and goals, a method without ranks, or a value out of
            range.
    """
    if not has_goal(rule):
        return rule
    given = [name for name in rule.params if name in GOALS or name == RANK]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} were given together", hint="choose one of them")
    (goal,) = given
    names = rule.methods or tuple(methods)
    codecs = [CODECS[name] for name in names if name in CODECS]
    ranked = next(((codec, codec.ranks) for codec in codecs if codec.ranks is not None), None)
    if ranked is None:
        raise UsageError(
            f"{goal} says which rank to take, and {'+'.join(names)} has none",
            hint=f"write for example 'RE:method=lowrank,{goal}={rule.params[goal]}'",
        )
    codec, ranks = ranked
    value = rule.params[goal]
    if codec.refuse(site) is not None:
        return rule
    found = np.zeros(0) if goal == "kept" else energies(ranks, site)
    rest = {name: value for name, value in rule.params.items() if name != goal}
    return dataclasses.replace(
        rule, params={**rest, RANK: ranks.rank_for(site, goal, value, found)}
    )
