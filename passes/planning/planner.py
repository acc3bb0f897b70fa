"""From a model and settings to a plan: find the weights, ask the codecs, meet the budget."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.config.settings import Settings, method_names
from onnxcomp.passes.latency.model import Timing
from onnxcomp.passes.planning.candidates import Candidate, Choice, Estimate, Estimator
from onnxcomp.passes.planning.error_model import Estimates
from onnxcomp.passes.planning.exact import constant_menu
from onnxcomp.passes.planning.explain import explain
from onnxcomp.passes.planning.measurements import Evidence, observed
from onnxcomp.passes.planning.plan import Budget, Plan
from onnxcomp.passes.planning.rank_goals import with_rank
from onnxcomp.passes.planning.search_space import Menu, menu
from onnxcomp.passes.planning.sensitivity_prior import guesses
from onnxcomp.passes.planning.size_model import planned_size, portable_load_bytes
from onnxcomp.passes.planning.solver import DEFAULT_BITS, choose, expected_error, rule_of
from onnxcomp.passes.weight import WeightSite

__all__ = ["make_menus", "make_plan", "measured_size", "plan_from", "settle"]

# The codec of what stays dense.
_HALF = "fp16"


def _menu(
    site: WeightSite,
    methods: Sequence[str],
    settings: Settings,
    evidence: Evidence,
    estimates: Estimates,
    guess: float,
) -> Menu:
    """What there is to choose from; half precision last where the rest is to have it."""
    rule = rule_of(site, settings)
    exact = constant_menu(site, methods, rule, settings)
    if exact is not None:
        return exact
    method_names(rule.methods or methods, CODECS, stock=settings.stock)
    rule = with_rank(rule, methods, site, estimates.energies)
    chosen: Estimator = estimates
    if settings.rest != "keep" and not rule.methods:
        methods = [*(name for name in methods if name not in ("dense", _HALF)), _HALF]
        chosen = estimates if settings.rest == "fp16" else functools.partial(_exact, estimates)
    return menu(
        site,
        methods,
        rule,
        estimator=chosen,
        sensitivity=evidence.sensitivities.get(site.name),
        measured=evidence.measured.get(site.name),
        scale=evidence.scale.get(site.name),
        guess=guess,
    )


def _exact(
    estimator: Estimator, codec: Codec, site: WeightSite, params: Sequence[Params]
) -> Sequence[Estimate]:
    """What is expected, with half precision only where it changes nothing."""
    found = estimator(codec, site, params)
    if codec.name != _HALF:
        return found
    return [e if e.error == 0.0 else dataclasses.replace(e, error=math.inf) for e in found]


def _measure(prepared: Prepared, settings: Settings, name: str, choices: Sequence[Choice]) -> int:
    return planned_size(prepared.model, prepared.sites, choices, settings, name=name)


def _choice(candidate: Candidate, settings: Settings, reason: str = "") -> Choice:
    return Choice.of(candidate, rule_of(candidate.site, settings).mode or settings.mode, reason)


def measured_size(
    prepared: Prepared, settings: Settings, name: str, picks: Sequence[Candidate]
) -> int:
    """Exact bytes of the output, called `name`, written with these candidates."""
    return _measure(prepared, settings, name, [_choice(pick, settings) for pick in picks])


def make_menus(prepared: Prepared, settings: Settings, evidence: Evidence) -> list[Menu]:
    """What there is to choose from for every site, with all that is expected of it."""
    methods = method_names(settings.method, CODECS, stock=settings.stock)
    estimates = Estimates(prepared.model, calibrated=evidence.calibrated, timer=evidence.timing)
    usual = guesses(prepared.sites)
    found: dict[str, Menu] = {}
    for site, stats in observed(prepared.model, prepared.sites, evidence.feeds):
        estimates.look_at(stats)
        found[site.name] = _menu(site, methods, settings, evidence, estimates, usual[site.name])
    return [
        dataclasses.replace(found[site.name], chance=evidence.chance) for site in prepared.sites
    ]


def make_plan(
    prepared: Prepared,
    settings: Settings,
    *,
    name: str = "out.onnx",
    evidence: Evidence | None = None,
) -> Plan:
    """Decide for every site.

    Args:
        prepared: The model and its weights.
        settings: What is asked for.
        name: File name of the output; external data refers to it.
        evidence: What is known besides the weights.

    Returns:
        A plan with the exact bytes of the output. When no plan meets the target, it is the
        smallest there is, and `Plan.met` is false.

    Raises:
        UsageError: A method, a rule or the number of bits does not exist.
    """
    known = Evidence() if evidence is None else evidence
    menus = make_menus(prepared, settings, known)
    return plan_from(menus, prepared, settings, name=name, timing=known.timing)


def plan_from(
    menus: Sequence[Menu],
    prepared: Prepared,
    settings: Settings,
    *,
    name: str = "out.onnx",
    timing: Timing | None = None,
) -> Plan:
    """`make_plan` for menus that are made already."""
    budget = Budget.of(settings, prepared.source.bytes, DEFAULT_BITS)
    size_of = functools.partial(measured_size, prepared, settings, name)
    limit = None
    if timing is not None and settings.max_slowdown is not None:
        limit = (settings.max_slowdown - 1.0) * timing.dense_seconds
    picks, total = choose(menus, budget, settings, size_of, limit)
    added = sum(pick.time for pick in picks)
    reasons = explain(menus, picks, [rule_of(pick.site, settings) for pick in picks], budget)
    choices = {
        pick.site.name: _choice(pick, settings, reason)
        for pick, reason in zip(picks, reasons, strict=True)
    }
    return Plan(
        source=prepared.source,
        settings=settings,
        budget=budget,
        choices=choices,
        skipped=prepared.skipped,
        bytes=total,
        portable_load_bytes=portable_load_bytes(prepared.sites, list(choices.values())),
        error=expected_error(menus, picks),
        slowdown=None if timing is None else max(0.0, 1.0 + added / timing.dense_seconds),
        pruned=prepared.facts.get("prune"),
    )


def settle(plan: Plan, prepared: Prepared, *, name: str = "out.onnx") -> Plan:
    """The plan with bytes and errors as they are for this model.

    Raises:
        UsageError: The plan does not fit the model.
    """
    settled = plan.settle(prepared.sites, Estimates(prepared.model))
    choices = list(settled)
    return dataclasses.replace(
        settled,
        source=prepared.source,
        skipped=prepared.skipped,
        bytes=_measure(prepared, plan.settings, name, choices),
        portable_load_bytes=portable_load_bytes(prepared.sites, choices),
        pruned=prepared.facts.get("prune"),
    )
