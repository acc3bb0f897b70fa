"""Fit a size exactly: allocate, measure the output, correct the budget."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.lagrangian import allocate
from onnxcomp.passes.planning.search_space import NOISE, CandidateSet, equal_plans, keep

__all__ = ["fit", "with_dense"]

# Allocations measured by `fit`; two or three are enough unless the output crosses the limit above
# which weights are stored externally and aligned.
_ROUNDS = 8

# Single steps measured by `fit` where allocations leave room.
_TRIALS = 12

# Plans of few settings are tried where names, nodes and what weights share are more than this part
# of the output.
_FRAMES = 20

# Allocations with shared tensors counted, and bytes of the name and the type of a tensor.
_ALIKE, _HEADER = 6, 80

# Share of the target that a plan with equal settings has to use to be preferred.
_USED = 0.99

# A plan is good when less than this part of the target is left over.
_CLOSE = 400


def fit(
    sets: Sequence[CandidateSet],
    target: int,
    size_of: Callable[[Sequence[Candidate]], int],
    others: Sequence[Sequence[Candidate]] = (),
    *,
    mixed: bool = False,
) -> tuple[list[Candidate], int]:
    """Candidates whose whole output has at most `target` bytes, as close to it as they come.

    Names, nodes, alignment and what weights share depend on the candidates, so outputs are
    measured: allocations in a budget that is corrected until it fits, equal settings for all sites,
    mixtures of a few settings, which share more, what goes with the tensors that the best of these
    shares, and single steps from there.

    Args:
        sets: One for each site.
        target: Most bytes of the output.
        size_of: Exact bytes of the output written with these candidates.
        others: Plans that are to be among those compared.
        mixed: Leave plans with equal settings out.

    Returns:
        The candidates and the bytes of the output; more than `target` only when no plan
        that was tried is smaller.
    """
    search = _Search([with_dense(candidates) for candidates in sets], target, size_of)
    least = allocate(search.sets, 0)
    search.try_(least)
    search.correct(search.sets, target - (search.best_bytes - _bytes(least)))
    if not mixed:
        search.try_given([*equal_plans(sets), *map(list, others)])
    search.try_few(sets)
    if search.best_bytes <= target:
        search.try_alike()
        search.polish()
    return search.best, search.best_bytes


class _Search:
    """The best measured plan so far, and ways to better it."""

    def __init__(
        self,
        sets: Sequence[CandidateSet],
        target: int,
        size_of: Callable[[Sequence[Candidate]], int],
    ) -> None:
        self.sets = sets
        self.best: list[Candidate] = []
        self.best_bytes = -1
        self._target = target
        self._size_of = size_of
        self._handicap = 1.0
        self._tried: list[tuple[int, Candidate]] = []
        self._sizes: dict[tuple[tuple[str, Params], ...], int] = {}

    def try_(self, picks: list[Candidate], handicap: float = 1.0) -> int:
        """Measure a plan, keep it when it is better, and return its bytes.

        Among plans that fit, the better one costs less; where none fits, it is smaller.

        Args:
            picks: The plan.
            handicap: What its cost is multiplied by, in this comparison and in later ones, where it
                uses nearly all of the target.
        """
        settings = tuple((pick.codec, pick.params) for pick in picks)
        if settings not in self._sizes:
            self._sizes[settings] = self._size_of(picks)
        total = self._sizes[settings]
        handicap = handicap if total >= _USED * self._target else 1.0
        if self.best_bytes < 0 or self.best_bytes > self._target:
            better = self.best_bytes < 0 or total < self.best_bytes
        else:
            cost = handicap * self._cost(picks)
            better = total <= self._target and self._betters(cost, total)
        if better:
            self.best, self.best_bytes, self._handicap = picks, total, handicap
        return total

    def _betters(self, cost: float, total: int) -> bool:
        """Whether a plan that fits costs less, or about as much and uses more of the target."""
        best = self._handicap * self._cost(self.best)
        return cost < best * (1 - NOISE) or (cost <= best * (1 + NOISE) and total > self.best_bytes)

    def correct(self, sets: Sequence[CandidateSet], budget: int) -> None:
        """Allocate in a budget, and correct it by what the measured output differs."""
        fits, exceeds = 0, self._target + 1
        last: list[Candidate] = []
        for _ in range(_ROUNDS):
            picks = allocate(sets, budget)
            if picks == last and fits == 0:
                return
            last = picks
            total = self.try_(picks)
            if total > self._target:
                exceeds = min(exceeds, budget)
            else:
                fits = max(fits, budget)
                if self._close() or picks == allocate(sets, exceeds - 1):
                    return
            budget = self._target - (total - _bytes(picks))
            if not fits < budget < exceeds:
                budget = (fits + exceeds) // 2
            if budget in (fits, exceeds):
                return

    def try_given(self, plans: Sequence[list[Candidate]]) -> None:
        """Measure plans with equal settings where they could fit and be better.

        They are left only for a gain that is more than chance in what sensitivities tell.
        """
        handicap = 1.0 - max((candidates.chance for candidates in self.sets), default=0.0)
        for picks in plans:
            fits = self.best_bytes <= self._target
            if not fits or (
                _bytes(picks) <= self._target
                and handicap * self._cost(picks) < self._handicap * self._cost(self.best)
            ):
                self.try_(picks, handicap)

    def try_few(self, sets: Sequence[CandidateSet]) -> None:
        """Allocate among two or three neighbouring equal settings, which share tensors and bodies.

        Only where what comes with the weights is a good part of the output.
        """
        frames = self._frames()
        if frames * _FRAMES < self.best_bytes:
            return
        plans = sorted(equal_plans(sets), key=_bytes)
        for count in (2, 3):
            for start in range(len(plans) - count + 1):
                window = plans[start : start + count]
                room = self._target - frames
                if not _bytes(window[0]) < room + frames // 2 or _bytes(window[-1]) < room // 2:
                    continue
                few = [
                    candidates.with_options(dict.fromkeys(options))
                    for candidates, *options in zip(sets, *window, strict=True)
                ]
                self.correct(few, room)

    def try_alike(self) -> None:
        """Allocate again, with tensors that the best plan does not share yet counted as well.

        Settings that bring large tensors for all weights (transforms, tables) otherwise look as
        cheap as those whose tensors are there already, and no budget is right for both.
        """
        for _ in range(_ALIKE):
            best, frames = self.best, self._frames()
            if self._close() or frames * _FRAMES < self.best_bytes:
                return
            origins, sets, counted = _surcharged(self.sets, best)
            room = self._target - frames + counted
            for _ in range(_ALIKE):
                picks = [origins[id(pick)] for pick in allocate(sets, room)]
                over = self.try_(picks) - self._target
                if over <= 0 or picks == best:
                    break
                room -= over
            if self.best is best:
                return

    def _frames(self) -> int:
        """Bytes of the best output that are not of a weight alone."""
        return self.best_bytes - _bytes(self.best)

    def polish(self) -> None:
        """Take single steps that fit, best first; only where more than a little room is left."""
        for _ in range(_TRIALS):
            steps = self._steps(self._target - self.best_bytes)
            steps = [step for step in steps if step not in self._tried]
            if self._close() or not steps:
                return
            site, candidate = steps[0]
            self._tried.append(steps[0])
            self.try_([*self.best[:site], candidate, *self.best[site + 1 :]])

    def _close(self) -> bool:
        """Whether the best plan leaves so little room that measuring more is not worth it."""
        return self._target - self._target // _CLOSE <= self.best_bytes <= self._target

    def _cost(self, picks: Sequence[Candidate]) -> float:
        return sum(
            candidates.cost_of(pick) for candidates, pick in zip(self.sets, picks, strict=True)
        )

    def _steps(self, room: int) -> list[tuple[int, Candidate]]:
        """Other candidates of single sites that would save error, the most saved first."""
        found = []
        for site, (candidates, pick) in enumerate(zip(self.sets, self.best, strict=True)):
            for candidate in candidates.options:
                gain = candidates.cost_of(pick) - candidates.cost_of(candidate)
                if gain > 0 and candidate.bytes - pick.bytes <= room:
                    found.append((-gain, site, candidate))
        found.sort(key=lambda step: step[:2])
        return [(site, candidate) for _, site, candidate in found]


def with_dense(candidates: CandidateSet) -> CandidateSet:
    """The set with the dense weight as its largest option, for targets that leave room for it."""
    if any(candidate.codec == "dense" for candidate in candidates.options):
        return candidates
    return candidates.with_options(
        (*candidates.options, keep(candidates.site, "the target leaves room for it")),
    )


def _surcharged(
    sets: Sequence[CandidateSet], picks: Sequence[Candidate]
) -> tuple[dict[int, Candidate], list[CandidateSet], int]:
    """Sets whose candidates count the tensors they share, but for those of other weights' picks.

    Codecs that nobody uses yet are left out: the bytes of their operators are not known.

    Returns:
        The original of each candidate, by identity, the sets, and the bytes of those tensors of
        the picks that count.
    """
    codecs = {"dense", *(pick.codec for pick in picks)}
    users = collections.Counter(key for pick in picks for key in _shared(pick))
    origins: dict[int, Candidate] = {}
    result, counted = [], 0
    for candidates, pick in zip(sets, picks, strict=True):
        own = _shared(pick)
        free = {key for key, count in users.items() if count > (key in own)}
        counted += _added(own, free)
        options = []
        for candidate in candidates.options:
            if candidate.codec in codecs:
                size = candidate.bytes + _added(_shared(candidate), free)
                options.append(dataclasses.replace(candidate, bytes=size))
                origins[id(options[-1])] = candidate
        result.append(candidates.with_options(options))
    return origins, result, counted


def _added(shared: Mapping[str, int], free: Collection[str]) -> int:
    return sum(size + _HEADER for key, size in shared.items() if key not in free)


def _shared(candidate: Candidate) -> dict[str, int]:
    """Bytes of the tensors that a candidate shares with others, by their keys."""
    found = CODECS[candidate.codec].shared(candidate.site, candidate.params)
    return {key: array.nbytes for key, array in found.items()}


def _bytes(picks: Sequence[Candidate]) -> int:
    return sum(candidate.bytes for candidate in picks)
