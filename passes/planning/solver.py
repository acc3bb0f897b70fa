"""From sets of candidates to one for each weight: equal bits, a size, or an error to keep."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import method_names
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.filter_boost import with_better_filters
from onnxcomp.passes.planning.lagrangian import allocate
from onnxcomp.passes.planning.plan import Budget
from onnxcomp.passes.planning.search_space import (
    CandidateSet,
    keep,
    offered_bits,
    uniform,
    uniform_bits,
)
from onnxcomp.passes.planning.size_fitting import fit, with_dense
from onnxcomp.passes.weight import Use, WeightSite

__all__ = ["choose", "default_bits", "expected_error", "plans_of_bits"]

# Bits per weight where neither bits nor a target is asked for.
DEFAULT_BITS = 4

# Prices of time that are tried, going up and then between two of them.
_PRICES = 20

# Relative differences of expected times that mean nothing.
_SAME_TIME = 0.03

# Halvings of the range of bytes in which the least size for an error is looked for.
_HALVINGS = 24

SizeOf = Callable[[Sequence[Candidate]], int]


def expected_error(sets: Sequence[CandidateSet], picks: Sequence[Candidate]) -> float | None:
    """Expected relative error of the outputs; None where sensitivities were not measured."""
    if any(candidates.sensitivity is None for candidates in sets):
        return None
    noise = (candidates.expected_noise(pick) for candidates, pick in zip(sets, picks, strict=True))
    return math.sqrt(math.fsum(noise))


def choose(
    sets: Sequence[CandidateSet],
    budget: Budget,
    settings: Settings,
    size_of: SizeOf,
    seconds: float | None = None,
) -> tuple[list[Candidate], int]:
    """One candidate of each set, and the bytes of the output.

    Args:
        sets: One for each weight.
        budget: What the plan has to meet.
        settings: What is asked for.
        size_of: Exact bytes of the output written with some candidates.
        seconds: Most seconds that a run may take longer; None where that does not matter.

    Raises:
        UsageError: No method offers the number of bits.
    """
    picks, total = _chosen(sets, budget, settings, size_of)
    if settings.objective == "latency":
        if budget.bytes is not None:
            return fit(_priced(sets, total, -math.inf), budget.bytes, size_of)
        picks = _fastest(sets, picks)
        total = size_of(picks)
    if seconds is None or sum(pick.time for pick in picks) <= seconds:
        return picks, total
    if budget.bytes is None:
        picks = _fast_enough(sets, picks, seconds)
        return picks, size_of(picks)
    sets = _priced(sets, sum(pick.bytes for pick in picks), seconds)
    return fit(sets, budget.bytes, size_of)


def _fastest(sets: Sequence[CandidateSet], picks: Sequence[Candidate]) -> list[Candidate]:
    """For each weight the fastest candidate that is no less accurate; the smallest of equals."""
    found = []
    for candidates, pick in zip(sets, picks, strict=True):
        options = [c for c in with_dense(candidates).options if c.harm <= pick.harm]
        least = min((c.time for c in (pick, *options)), default=0.0)
        good = [c for c in (pick, *options) if c.time <= least + _SAME_TIME * abs(least)]
        best = min(good, key=lambda c: (c.bytes, c.time))
        reason = "dense is expected to be the fastest"
        found.append(best if pick.codec == "dense" else _as_dense(best, reason))
    return found


def _fast_enough(
    sets: Sequence[CandidateSet], picks: Sequence[Candidate], seconds: float
) -> list[Candidate]:
    """The choices, with faster forms that are no less accurate until the plan is fast.

    Those come first that save most time for each byte that they add; where that does not suffice,
    the fastest forms.
    """
    found = list(picks)
    faster = [
        [c for c in with_dense(own).options if c.time < pick.time and c.harm <= pick.harm]
        for own, pick in zip(sets, picks, strict=True)
    ]
    for best in (_saved_per_byte, _saved):
        steps = [
            (n, max(options, key=functools.partial(best, picks[n])))
            for n, options in enumerate(faster)
            if options
        ]
        steps.sort(key=lambda step: -best(picks[step[0]], step[1]))
        for number, candidate in steps:
            if sum(pick.time for pick in found) <= seconds:
                return found
            if candidate.time < found[number].time:
                found[number] = _as_dense(candidate, "compressed it would run too slowly")
    return found


def _saved(pick: Candidate, other: Candidate) -> float:
    """Seconds that another candidate saves."""
    return pick.time - other.time


def _saved_per_byte(pick: Candidate, other: Candidate) -> float:
    """The same for each byte that it adds; smaller ones come before all others."""
    added = other.bytes - pick.bytes
    return _saved(pick, other) / added if added > 0 else math.inf


def _as_dense(candidate: Candidate, reason: str) -> Candidate:
    """The candidate, with a reason where it leaves the weight dense."""
    return keep(candidate.site, reason) if candidate.codec == "dense" else candidate


def _priced(sets: Sequence[CandidateSet], size: int, seconds: float) -> list[CandidateSet]:
    """The sets with the least price of time at which plans of a size are fast enough.

    Where no price is high enough, the plan is the fastest that there is.
    """
    complete = [with_dense(candidates) for candidates in sets]
    fastest = [
        dataclasses.replace(candidates, fastest=min(c.time for c in candidates.options))
        for candidates in complete
    ]

    def priced(price: float) -> tuple[list[CandidateSet], bool]:
        found = [dataclasses.replace(candidates, price=price) for candidates in fastest]
        return found, sum(pick.time for pick in allocate(found, size)) <= seconds

    noise = sum(
        candidates.noise(max(candidates.options, key=lambda c: c.error)) for candidates in sets
    )
    spans = [max(abs(c.time) for c in candidates.options) for candidates in sets]
    unit = noise / max(sum(spans), 1e-12)
    low, high = 0.0, 1e-6 * unit
    for _ in range(_PRICES):
        if priced(high)[1]:
            break
        low, high = high, 4.0 * high
    for _ in range(_PRICES):
        middle = (low + high) / 2
        low, high = (low, middle) if priced(middle)[1] else (middle, high)
    return priced(high)[0]


def _chosen(
    sets: Sequence[CandidateSet], budget: Budget, settings: Settings, size_of: SizeOf
) -> tuple[list[Candidate], int]:
    if budget.bytes is not None:
        return fit(sets, budget.bytes, size_of, plans_of_bits(sets))
    if budget.max_error is not None and budget.bits is None:
        picks = smallest_within(sets, budget.max_error)
        return _worth_it(picks, size_of(picks), size_of)
    bits = budget.bits or DEFAULT_BITS
    _check_bits(bits, method_names(settings.method, CODECS, stock=settings.stock))
    picks = _of_bits(sets, bits)
    return _worth_it(picks, size_of(picks), size_of)


def _of_bits(sets: Sequence[CandidateSet], bits: int) -> list[Candidate]:
    """A number of bits for all weights, more for filters that need them."""
    fixed = {candidates.site.name: _fixed_bits(candidates) for candidates in sets}
    wanted = [fixed[candidates.site.name] or uniform_bits(candidates, bits) for candidates in sets]
    picks = [uniform(candidates, own) for candidates, own in zip(sets, wanted, strict=True)]
    return with_better_filters(sets, picks, [name for name, own in fixed.items() if own])


def _only(candidates: CandidateSet, codec: str) -> CandidateSet:
    """The set with the options of one codec, or all where that has none."""
    options = [candidate for candidate in candidates.options if candidate.codec == codec]
    return candidates.with_options(options) if options else candidates


def plans_of_bits(sets: Sequence[CandidateSet]) -> list[list[Candidate]]:
    """What a run with each number of bits would do, for each codec that counts in bits."""
    names = dict.fromkeys(
        c.codec for candidates in sets for c in candidates.options if not c.reason
    )
    return [
        _of_bits([_only(candidates, name) for candidates in sets], bits)
        for name in names
        for bits in offered_bits(sets, name)
    ]


def smallest_within(sets: Sequence[CandidateSet], max_error: float) -> list[Candidate]:
    """The smallest candidates whose expected error of the outputs is at most `max_error`."""
    sets = [with_dense(candidates) for candidates in sets]
    low = sum(min(c.bytes for c in candidates.options) for candidates in sets)
    high = sum(max(c.bytes for c in candidates.options) for candidates in sets)
    best = allocate(sets, high)
    for _ in range(_HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        picks = allocate(sets, middle)
        error = expected_error(sets, picks)
        if error is None or error <= max_error:
            best, high = picks, middle
        else:
            low = middle
    return best


def _fixed_bits(candidates: CandidateSet) -> int | None:
    """Bits that a rule gives to a weight."""
    fixed = candidates.policy.params
    names = {CODECS[candidate.codec].width for candidate in candidates.options}
    return next((int(fixed[name]) for name in names if name is not None and name in fixed), None)


def _offered_bits(methods: Sequence[str]) -> set[int]:
    """Bits per weight that methods offer a large weight; empty where one offers any number."""
    use = Use("", "MatMul", 1, "matmul")
    extent = (1024, 1024)
    sample = WeightSite("", extent, "float32", (use,), "", *extent, False, kept=512 * 1024)
    offered: set[int] = set()
    for codec in (CODECS[name] for name in methods):
        if codec.width is not None:
            offered |= {int(getattr(params, codec.width)) for params in codec.candidates(sample)}
        elif not codec.automatic:
            return set()
    return offered


def default_bits(settings: Settings) -> int:
    """Bits per weight where none are asked for: 4, or the nearest that the methods offer."""
    offered = _offered_bits(method_names(settings.method, CODECS, stock=settings.stock))
    return min(offered, key=lambda bits: (abs(bits - DEFAULT_BITS), bits), default=DEFAULT_BITS)


def _check_bits(bits: int, methods: Sequence[str]) -> None:
    """Raise `UsageError` for bits per weight that no method offers, even for a large weight."""
    offered = _offered_bits(methods)
    if offered and bits not in offered:
        raise UsageError(
            f"no method offers {bits} bits per weight",
            hint=f"choose from {', '.join(str(b) for b in sorted(offered))}",
        )


def _worth_it(picks: list[Candidate], total: int, size_of: SizeOf) -> tuple[list[Candidate], int]:
    """The choices, or only dense weights where tables and functions cost more than is saved."""
    if all(pick.reason or pick.codec == "dense" for pick in picks):
        return picks, total
    reason = "what compressed weights bring with them would outweigh what they save"
    untouched = [keep(pick.site, pick.reason or reason) for pick in picks]
    least = size_of(untouched)
    return (picks, total) if total < least else (untouched, least)
