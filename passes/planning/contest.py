"""Plans of one size against each other, by a measured loss.

Expectations add up what each weight loses, and know the mean of what codes do. What a whole plan
loses is measured on the outputs instead: of the plan that is expected to be the best one, of one
with equal bits, and of some between the two. Equal bits are left only for a gain that is more than
chance among the inputs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.search_space import CandidateSet, equal_plans
from onnxcomp.passes.planning.size_fitting import fit

__all__ = ["Entry", "Judge", "LongJudge", "Referee", "contest", "expected_of"]

log = logging.getLogger(__name__)

# Standard errors of the difference of two plans that it has to be larger than.
_SURE = 2.0

# What a plan loses, measured; None where that cannot be told.
Judge = Callable[[Sequence[Candidate]], OutputDifference | None]

# The same on so many inputs, if there are as many.
LongJudge = Callable[[Sequence[Candidate], int], OutputDifference | None]

_EQUAL, _TABLES = "equal", "equal, and a bit more for tables"

# Share of the target that a plan near equal bits has to use to be the safe one.
_USED = 0.97

# Standard error of what is expected of the chosen plan, over the loss; how many times as many
# inputs as before are run for it, and how often at most: few tell badly how many it takes.
_FINE, _MORE, _ROUNDS = 0.05, 16, 2

SizeOf = Callable[[Sequence[Candidate]], int]


@dataclasses.dataclass(frozen=True, slots=True)
class Referee:
    """How plans of one size are compared.

    Attributes:
        judge: Measures what a plan loses; None where no inputs say anything.
        margin: By what part of its loss another plan has to be better than the safe one: 0 where
            the judge's inputs are real and its codes those that will be written.
        estimated: Whether the judge's codes are not those that will be written: the safe plan then
            spends what is left on tables of look-ups, of which estimates think too well.
        longer: Measures on a given number of inputs; None where there are no more of them.
    """

    judge: Judge | None = None
    margin: float = 0.0
    estimated: bool = False
    longer: LongJudge | None = None

    @property
    def real(self) -> bool:
        """Whether the judge's inputs are real: what is measured is what to expect then."""
        return self.estimated or not self.margin


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One plan of the contest.

    Attributes:
        name: What it does: "expected best", "equal".
        picks: The plan.
        bytes: Of the output.
        measured: What it loses; None where that was not measured.
    """

    name: str
    picks: Sequence[Candidate]
    bytes: int
    measured: OutputDifference | None = None

    @property
    def loss(self) -> float:
        """The measured loss; infinite where there is none."""
        found = math.inf if self.measured is None else self.measured.mean().loss
        return found if math.isfinite(found) else math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the plan itself."""
        return {"plan": self.name, "bytes": self.bytes, "loss": float(f"{self.loss:.4g}")}


def contest(
    sets: Sequence[CandidateSet],
    first: Entry,
    target: int,
    size_of: SizeOf,
    referee: Referee,
    equal: Sequence[Sequence[Candidate]],
) -> list[Entry]:
    """All plans that were compared, the best first.

    The safe one has equal bits, and spends what is left on more of the same, by the prior. It is
    taken where nothing can be measured, and where no other one is better by more than chance.

    Args:
        sets: What there is to choose from, for each weight.
        first: The plan that is expected to be the best.
        target: Most bytes of the output.
        size_of: Exact bytes of the output written with some candidates.
        referee: How plans are compared.
        equal: Plans with equal bits for all weights.
    """
    if first.bytes > target:
        return [first]
    near = _around_equal(sets, target, size_of, equal)
    usual = [entry for entry in near if referee.estimated and entry.name == _TABLES] or near
    safe = usual[0] if usual and usual[0].bytes >= _USED * target else first
    if referee.judge is None:
        return [safe]
    entries: list[Entry] = []
    for entry in (safe, *near, *_fitted("mixed", sets, target, size_of), first):
        _add(entries, entry)
    known = [_settings(entry.picks) for entry in entries]
    by_size = _fitted("mixed by size", _by_size(sets), target, size_of)
    entries += [entry for entry in by_size if _settings(entry.picks) not in known]
    if len(entries) == 1 and not referee.real:
        return entries
    judged = [dataclasses.replace(own, measured=referee.judge(own.picks)) for own in entries]
    for entry in judged:
        log.info("plan %s: %d bytes, loss %.4g", entry.name, entry.bytes, entry.loss)
    if any(entry.measured is None for entry in judged):
        return [safe if referee.margin else first]
    judged = _on_more(judged, referee)
    ordered = sorted(judged[1:], key=lambda entry: entry.loss)
    better = [entry for entry in ordered if _beats(entry, judged[0], referee.margin)]
    best = better[0] if better else judged[0]
    return [best, *(entry for entry in (judged[0], *ordered) if entry is not best)]


def expected_of(entry: Entry, referee: Referee) -> OutputDifference | None:
    """What a plan is expected to lose, by as many inputs as that takes.

    Plans are compared input by input, and few inputs are enough for that. Their mean is less
    certain: of a classifier's pictures a tenth make up most of the loss. What was estimated is
    measured on as many at least.
    """
    found, estimated = entry.measured, referee.estimated
    if found is None or referee.longer is None:
        return found
    for _ in range(_ROUNDS):
        runs = len(found.losses())
        wanted = math.ceil(runs * (found.uncertainty() / _FINE) ** 2) if runs > 1 else _MORE
        if wanted <= runs and not estimated:
            break
        more = referee.longer(entry.picks, min(max(runs, wanted), _MORE * runs))
        if more is None or len(more.losses()) < runs + (not estimated):
            break
        found, estimated = more, False
    return found


def _on_more(judged: list[Entry], referee: Referee) -> list[Entry]:
    """The plans, two of them measured on more inputs where few leave open which one is better.

    Those are the safe one and the best other one, on as many inputs as it takes if the gain is what
    it seems to be, and half more.
    """
    safe, margin = judged[0], referee.margin
    others = [entry for entry in judged[1:] if entry.loss < safe.loss]
    if not others or referee.longer is None or any(_beats(own, safe, margin) for own in others):
        return judged
    best = min(others, key=lambda entry: entry.loss)
    runs, gain, error = _gain(best, safe)
    gain -= margin * safe.loss
    if gain <= 0 or referee.estimated:
        return judged
    wanted = math.ceil(1.5 * runs * (_SURE * error / gain) ** 2) if runs > 1 else _MORE
    count = min(max(wanted, runs + 1), _MORE * runs)
    found = {}
    for entry in (safe, best):
        more = referee.longer(entry.picks, count)
        if more is None or len(more.losses()) <= runs:
            return judged
        found[entry.name] = dataclasses.replace(entry, measured=more)
        log.info("plan %s, on more inputs: loss %.4g", entry.name, found[entry.name].loss)
    return [found.get(entry.name, entry) for entry in judged]


def _add(entries: list[Entry], entry: Entry) -> None:
    """Add a plan; one that is there already gets its name."""
    for number, other in enumerate(entries):
        if _settings(entry.picks) == _settings(other.picks):
            entries[number] = entry
            return
    entries.append(entry)


def _settings(picks: Sequence[Candidate]) -> list[object]:
    return [(pick.codec, pick.params) for pick in picks]


def _beats(entry: Entry, safe: Entry, margin: float) -> bool:
    """Whether a plan is better than the safe one by more than the margin and chance.

    Plans are compared input by input: they have to be measured on the same ones.
    """
    if entry.measured is None or safe.measured is None or not entry.loss < safe.loss:
        return False
    if len(entry.measured.losses()) != len(safe.measured.losses()):
        return False
    if not math.isfinite(safe.loss):
        return True
    runs, gain, error = _gain(entry, safe)
    return runs > 1 and gain > margin * safe.loss + _SURE * error


def _gain(entry: Entry, safe: Entry) -> tuple[int, float, float]:
    """Over how many inputs a plan is better than another one, by how much, and standard error."""
    assert entry.measured is not None and safe.measured is not None
    gains = safe.measured.losses() - entry.measured.losses()
    runs = len(gains)
    error = float(gains.std(ddof=1)) / math.sqrt(runs) if runs > 1 else math.inf
    return runs, float(np.mean(gains)), error


def _around_equal(
    sets: Sequence[CandidateSet],
    target: int,
    size_of: SizeOf,
    equal: Sequence[Sequence[Candidate]],
) -> list[Entry]:
    """Equal bits, and what is left spent on the next number of bits; the safest plan first.

    There are none where the codec does not count in bits: equal ranks are not safe.
    """
    best = _best_equal(sets, target, size_of, equal)
    codec = None if best is None else _codec(best.picks)
    if best is None or codec is None or CODECS[codec].width is None:
        return []
    near = _near(sets, best.picks, equal)
    if near is None:
        return [best]
    found: list[Entry] = []
    for entry in (
        *_fitted("equal, and a bit more by size", _by_size(near), target, size_of),
        *_fitted("equal, and a bit more where it helps", near, target, size_of),
        *_for_tables(near, target, size_of),
        best,
    ):
        _add(found, entry)
    return found


def _by_size(sets: Sequence[CandidateSet]) -> list[CandidateSet]:
    """The sets without what was measured."""
    return [dataclasses.replace(own, sensitivity=None, scale=None) for own in sets]


def _fitted(
    name: str, sets: Sequence[CandidateSet], target: int, size_of: SizeOf
) -> Iterator[Entry]:
    """The best plan of some candidates in a size, if there is one."""
    picks, size = fit(sets, target, size_of, mixed=True)
    if size <= target:
        yield Entry(name, picks, size)


def _best_equal(
    sets: Sequence[CandidateSet],
    target: int,
    size_of: SizeOf,
    equal: Sequence[Sequence[Candidate]],
) -> Entry | None:
    """The plan with equal bits that is expected to be the best of those that fit."""
    plans = [*equal, *equal_plans(sets)]
    plans = [picks for picks in plans if _bytes(picks) <= target]
    plans.sort(key=lambda picks: sum(s.cost_of(p) for s, p in zip(sets, picks, strict=True)))
    for picks in plans:
        size = size_of(picks)
        if size <= target:
            return Entry(_EQUAL, picks, size)
    return None


def _near(
    sets: Sequence[CandidateSet],
    picks: Sequence[Candidate],
    equal: Sequence[Sequence[Candidate]],
) -> list[CandidateSet] | None:
    """Sets that offer what an equal plan has, and what the next larger one of its codec has."""
    larger = [p for p in equal if _bytes(p) > _bytes(picks) and _codec(p) == _codec(picks)]
    if not larger:
        return None
    above = min(larger, key=_bytes)
    return [
        own.with_options(dict.fromkeys((pick, more)))
        for own, pick, more in zip(sets, picks, above, strict=True)
    ]


def _for_tables(near: Sequence[CandidateSet], target: int, size_of: SizeOf) -> Iterator[Entry]:
    """Equal bits, and the next number for tables of look-ups first: most are the head as well."""
    tables = [any(use.need == "gather" for use in own.site.uses) for own in near]
    if any(tables) and not all(tables):
        sets = [
            own.with_options(own.options[-1:]) if table else own
            for own, table in zip(near, tables, strict=True)
        ]
        yield from _fitted(_TABLES, sets, target, size_of)


def _codec(picks: Sequence[Candidate]) -> str | None:
    """The codec of the first weight that is not left as it is."""
    return next((pick.codec for pick in picks if not pick.reason), None)


def _bytes(picks: Sequence[Candidate]) -> int:
    return sum(pick.bytes for pick in picks)
