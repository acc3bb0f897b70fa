"""Every choice has its reason."""

from __future__ import annotations

import dataclasses
import math

import pytest

from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.config.rules import Rule, parse_rule
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.planning.explain import explain
from onnxcomp.passes.planning.plan import Budget
from onnxcomp.passes.planning.search_space import CandidateSet, keep
from onnxcomp.passes.weight import Use, WeightSite


def site(name: str = "w", *, filters_input: bool = False) -> WeightSite:
    use = Use("n", "Conv", 1, "dense")
    found = WeightSite(name, (256, 256), "float32", (use,), "", 256, 256, False)
    return dataclasses.replace(found, filters_input=filters_input)


def candidate(bits: int, error: float, where: WeightSite | None = None) -> Candidate:
    return Candidate(
        site() if where is None else where, "hyper", HyperParams(bits), 8192 * bits, error
    )


def words(pick: Candidate, budget: Budget, rule: Rule | None = None, **known: float) -> str:
    options = tuple(candidate(bits, 2.0**-bits, pick.site) for bits in (2, 3, 4))
    policy = Policy(("hyper",), params={} if rule is None else rule.params, rule=rule)
    sets = [CandidateSet(pick.site, options, policy=policy, **known)]
    (found,) = explain(sets, [pick], budget)
    return found


def test_equal_bits_say_so_and_say_who_has_more() -> None:
    budget = Budget(bits=3)
    assert words(candidate(3, 0.125), budget) == "3 bits for all weights"
    assert words(candidate(4, 0.06), budget).startswith("1 more bit than others: small")
    raw = candidate(4, 0.06, site(filters_input=True))
    assert "it filters an input" in words(raw, budget)
    rule = parse_rule("w:bits=4")
    assert words(candidate(4, 0.06), budget, rule) == "set by the rule w:bits=4"


def test_a_target_says_what_the_next_settings_would_do() -> None:
    found = words(candidate(3, 0.125), Budget(bytes=25_000))
    assert found == (
        "bits=2 would save 8.19 KB and add 12 % to the error of the weight, "
        "bits=4 would cost 8.19 KB and take 6.2 % from it"
    )


def test_with_sensitivities_it_is_the_error_of_the_outputs() -> None:
    found = words(candidate(3, 0.125), Budget(bytes=25_000), sensitivity=0.04, measured=0.04)
    added = 100 * math.sqrt(0.04) * 0.125
    assert found.startswith("bits=2 would save 8.19 KB and add ")
    assert f"add {added:.2g} % to the expected error of the outputs, bits=4" in found


def test_the_largest_step_is_the_dense_weight() -> None:
    found = words(candidate(4, 0.0625), Budget(bytes=40_000))
    assert "the dense weight would cost 229 KB and take 6.2 % from it" in found


def test_what_is_kept_keeps_its_reason() -> None:
    assert words(keep(site(), "holds NaN"), Budget(bytes=1)) == "holds NaN"


@pytest.mark.parametrize("changed", [False, True])
def test_a_reason_goes_when_the_setting_it_speaks_of_was_changed(*, changed: bool) -> None:
    where = site()
    choice = Choice.of(Candidate(where, "hyper", HyperParams(3), 0, 0.1), reason="a reason")
    choice = dataclasses.replace(choice.settle(where), reason="a reason")
    if changed:
        choice = choice.with_(bits=4)
    assert choice.settle(where).reason == ("set in the plan" if changed else "a reason")
