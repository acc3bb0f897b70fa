"""From sets of candidates to a plan with exact bytes, and from a given plan to one that fits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.latency.model import Timing
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.planning.contest import Entry, Referee, contest, expected_of
from onnxcomp.passes.planning.error_model import Estimates
from onnxcomp.passes.planning.explain import explain
from onnxcomp.passes.planning.plan import Budget, Plan
from onnxcomp.passes.planning.search_space import CandidateSet
from onnxcomp.passes.planning.size_model import planned_size, portable_load_bytes
from onnxcomp.passes.planning.solver import (
    choose,
    default_bits,
    expected_error,
    plans_of_bits,
)

__all__ = ["measured_size", "plan_from", "settle"]

# How many times as much a plan for a size is expected to lose with constants bit for bit as with
# rounded ones, so that they are rounded: where sensitivities were measured, and where not. A bit
# more or less for all weights is a factor of four.
_WORTH, _UNSURE = 4.0, 16.0


def _size(prepared: Prepared, settings: Settings, name: str, choices: Sequence[Choice]) -> int:
    return planned_size(prepared.model, prepared.sites, choices, settings, name=name)


def _choice(candidate: Candidate, prepared: Prepared, reason: str = "") -> Choice:
    return Choice.of(candidate, prepared.policies[candidate.site.name].mode, reason)


def measured_size(
    prepared: Prepared, settings: Settings, name: str, picks: Sequence[Candidate]
) -> int:
    """Exact bytes of the output, called `name`, written with these candidates."""
    return _size(prepared, settings, name, [_choice(pick, prepared) for pick in picks])


def plan_from(
    sets: Sequence[CandidateSet],
    prepared: Prepared,
    settings: Settings,
    *,
    name: str = "out.onnx",
    timing: Timing | None = None,
    referee: Referee | None = None,
) -> Plan:
    """Decide for every weight.

    Args:
        sets: What there is to choose from, for each weight.
        prepared: The model and its weights.
        settings: What is asked for.
        name: File name of the output; external data refers to it.
        timing: What settings cost in time.
        referee: How plans of a size are compared; None for their expected errors.

    Returns:
        A plan with the exact bytes of the output. When no plan meets the target, it is the
        smallest there is, and `Plan.met` is false.

    Raises:
        UsageError: No method offers the number of bits.
    """
    budget = Budget.of(settings, prepared.source.bytes, default_bits(settings))
    size_of = functools.partial(measured_size, prepared, settings, name)
    limit = None
    if timing is not None and settings.max_slowdown is not None:
        limit = (settings.max_slowdown - 1.0) * timing.dense_seconds
    picks, total = choose(sets, budget, settings, size_of, limit)
    loose = [own.rounded or own for own in sets]
    if budget.bytes is not None and any(own.rounded for own in sets):
        others, other_total = choose(loose, budget, settings, size_of, limit)
        if _pays(loose, (picks, total), (others, other_total), budget.bytes):
            sets, picks, total = loose, others, other_total
    entries: list[Entry] = []
    if referee is not None and budget.bytes is not None:
        first = Entry("expected best", picks, total)
        equal = plans_of_bits(sets)
        entries = contest(sets, first, budget.bytes, size_of, referee, equal)
        picks, total = list(entries[0].picks), entries[0].bytes
    told = None
    if entries and referee is not None and referee.real:
        told = expected_of(entries[0], referee)
    added = sum(pick.time for pick in picks)
    reasons = explain(sets, picks, budget)
    choices = {
        pick.site.name: _choice(pick, prepared, reason)
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
        error=expected_error(sets, picks) if told is None else math.sqrt(told.mean().noise),
        loss=None if told is None else told.mean().loss,
        loss_error=None if told is None else _standard_error(told),
        compared=tuple(entry.to_json() for entry in entries) if told is not None else (),
        slowdown=None if timing is None else max(0.0, 1.0 + added / timing.dense_seconds),
        pruned=prepared.pruned,
    )


def _pays(
    sets: Sequence[CandidateSet],
    exact: tuple[Sequence[Candidate], int],
    rounded: tuple[Sequence[Candidate], int],
    target: int,
) -> bool:
    """Whether constants are rounded: without it the target is missed, or weights lose too much."""
    if exact[1] > target:
        return rounded[1] < exact[1]
    lost, other = (
        math.fsum(own.noise(pick) for own, pick in zip(sets, picks, strict=True))
        for picks in (exact[0], rounded[0])
    )
    measured = all(own.sensitivity is not None for own in sets)
    return lost > (_WORTH if measured else _UNSURE) * other


def _standard_error(told: OutputDifference) -> float | None:
    """Standard error of the mean loss; None where one input was all."""
    share = told.uncertainty()
    return told.mean().loss * share if math.isfinite(share) else None


def settle(plan: Plan, prepared: Prepared, *, name: str = "out.onnx") -> Plan:
    """The plan with bytes and errors as they are for this model.

    Raises:
        UsageError: The plan does not fit the model.
    """
    settled = plan.settle(prepared.sites, Estimates(prepared.model, sites=prepared.sites))
    choices = list(settled)
    return dataclasses.replace(
        settled,
        source=prepared.source,
        skipped=prepared.skipped,
        bytes=_size(prepared, plan.settings, name, choices),
        portable_load_bytes=portable_load_bytes(prepared.sites, choices),
        pruned=prepared.pruned,
    )
