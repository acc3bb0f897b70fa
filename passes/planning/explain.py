"""Why a plan stores each weight as it does, in words, with what its neighbours would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.lagrangian import hull_of, undominated
from onnxcomp.passes.planning.plan import Budget
from onnxcomp.passes.planning.search_space import CandidateSet
from onnxcomp.passes.planning.size_fitting import with_dense

__all__ = ["explain"]


def explain(sets: Sequence[CandidateSet], picks: Sequence[Candidate], budget: Budget) -> list[str]:
    """One sentence for each pick.

    Args:
        sets: What there was to choose from.
        picks: What was chosen from each.
        budget: What the plan had to meet.
    """
    alike = budget.bits if budget.bytes is None else None
    known = all(candidates.sensitivity is not None for candidates in sets)
    noise = sum(m.expected_noise(c) for m, c in zip(sets, picks, strict=True)) if known else None
    found = []
    for candidates, pick in zip(sets, picks, strict=True):
        if pick.reason:
            found.append(pick.reason)
        elif alike is not None:
            found.append(_of_bits(pick, candidates.policy, alike))
        else:
            found.append(_of_bytes(candidates, pick, noise))
    return found


def _of_bits(pick: Candidate, policy: Policy, bits: int) -> str:
    """Where all weights were to get the same number of bits."""
    width = CODECS[pick.codec].width
    if pick.codec == "dense":
        return "as it is, as asked for"
    if width in policy.params or (width is None and policy.params):
        return f"set by the rule {policy.rule}"
    if width is None and pick.error == 0.0:
        return f"every bit is kept in {8 * pick.bytes / pick.site.size:.3g} bits per weight"
    if width is None:
        return f"{pick.codec} has no number of bits"
    own = int(getattr(pick.params, width))
    if own == bits:
        return f"{bits} bits for all weights"
    if own != bits and pick.time:
        return "expected to be the fastest form that is no less accurate"
    if own < bits:
        return f"nothing with {bits} bits is smaller than the weight"
    more = f"{own - bits} more bit{'s' if own - bits > 1 else ''}"
    if pick.site.filters_input:
        return f"{more} than others: it filters an input of the model"
    return f"{more} than others: small, and all that follows sees its error"


def _of_bytes(candidates: CandidateSet, pick: Candidate, noise: float | None) -> str:
    """Where bytes went to where they help most: what the next smaller and larger ones would do."""
    front = undominated(with_dense(candidates))
    steps = [front.options[index] for index in hull_of(front)]
    smaller = max((c for c in steps if c.bytes < pick.bytes), key=_bytes, default=None)
    larger = min((c for c in steps if c.bytes > pick.bytes), key=_bytes, default=None)
    what = "the error of the weight" if noise is None else "the expected error of the outputs"
    parts = []
    if smaller is not None:
        saved, added = _step(candidates, smaller, pick, noise)
        parts.append(f"{_label(smaller, pick)} would save {saved} and add {added} to {what}")
        what = "it"
    if larger is not None:
        added, taken = _step(candidates, larger, pick, noise)
        parts.append(f"{_label(larger, pick)} would cost {added} and take {taken} from {what}")
    return ", ".join(parts) or "the only setting that is offered"


def _step(
    candidates: CandidateSet, other: Candidate, pick: Candidate, noise: float | None
) -> tuple[str, str]:
    """By how much another candidate differs in bytes and in the error."""
    change = abs(_error(candidates, other, pick, noise) - _error(candidates, pick, pick, noise))
    return _size(abs(pick.bytes - other.bytes)), f"{100 * change:.2g} %"


def _error(
    candidates: CandidateSet, candidate: Candidate, pick: Candidate, noise: float | None
) -> float:
    """The error of the outputs with a candidate in the place of the pick, or of the weight."""
    if noise is None:
        return candidate.error
    changed = noise - candidates.expected_noise(pick) + candidates.expected_noise(candidate)
    return math.sqrt(max(0.0, changed))


def _label(candidate: Candidate, beside: Candidate) -> str:
    """The codec of a candidate and its first setting, where it differs from another one."""
    if candidate.codec == "dense":
        return "the dense weight"
    values = candidate.params.to_json()
    width = CODECS[candidate.codec].width
    told = {} if candidate.codec != beside.codec else beside.params.to_json()
    changed = [name for name, value in values.items() if told.get(name) != value]
    name = width if width in changed else next(iter(changed), None)
    setting = "" if name is None else f"{name}={values[name]}"
    return setting if told and setting else f"{candidate.codec} {setting}".strip()


def _bytes(candidate: Candidate) -> int:
    return candidate.bytes


def _size(count: int) -> str:
    unit, size = next((u for u in (("MB", 1e6), ("KB", 1e3)) if count >= u[1]), ("B", 1))
    return f"{count / size:.3g} {unit}" if size > 1 else f"{count} B"
