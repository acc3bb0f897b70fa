"""Meeting a size exactly: allocations, measured and corrected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxcomp.passes.allocate import allocate
from onnxcomp.passes.choices import Candidate
from onnxcomp.passes.menus import NOISE, Menu, equal_plans, keep

__all__ = ["fit", "with_dense"]

# Allocations measured by `fit`; two or three are enough unless the output crosses the limit above
# which weights are stored externally and aligned.
_ROUNDS = 8

# Single steps measured by `fit` where allocations leave room.
_TRIALS = 12

# Plans of few settings are tried where names, nodes and what weights share are more than this part
# of the output.
_FRAMES = 20

# A plan is good when less than this part of the target is left over.
_CLOSE = 400


def fit(
    menus: Sequence[Menu], target: int, size_of: Callable[[Sequence[Candidate]], int]
) -> tuple[list[Candidate], int]:
    """Candidates whose whole output has at most `target` bytes, as close to it as they come.

    Names, nodes, alignment and what weights share depend on the candidates, so outputs are
    measured: allocations in a budget that is corrected until it fits, equal settings for all sites,
    mixtures of a few settings, which share more, and single steps from the best of these.

    Args:
        menus: One for each site.
        target: Most bytes of the output.
        size_of: Exact bytes of the output written with these candidates.

    Returns:
        The candidates and the bytes of the output; more than `target` only when no plan
        that was tried is smaller.
    """
    search = _Search([with_dense(menu) for menu in menus], target, size_of)
    least = allocate(search.menus, 0)
    search.try_(least)
    search.correct(search.menus, target - (search.best_bytes - _bytes(least)))
    search.try_equal(menus)
    search.try_few(menus)
    if search.best_bytes <= target:
        search.polish()
    return search.best, search.best_bytes


class _Search:
    """The best measured plan so far, and ways to better it."""

    def __init__(
        self,
        menus: Sequence[Menu],
        target: int,
        size_of: Callable[[Sequence[Candidate]], int],
    ) -> None:
        self.menus = menus
        self.best: list[Candidate] = []
        self.best_bytes = -1
        self._target = target
        self._size_of = size_of
        self._tried: list[tuple[int, Candidate]] = []

    def try_(self, picks: list[Candidate]) -> int:
        """Measure a plan, keep it when it is better, and return its bytes.

        Among plans that fit, the better one costs less; where none fits, it is smaller.
        """
        total = self._size_of(picks)
        if self.best_bytes < 0 or self.best_bytes > self._target:
            better = self.best_bytes < 0 or total < self.best_bytes
        else:
            better = total <= self._target and self._betters(self._cost(picks), total)
        if better:
            self.best, self.best_bytes = picks, total
        return total

    def _betters(self, cost: float, total: int) -> bool:
        """Whether a plan that fits costs less, or about as much and uses more of the target."""
        best = self._cost(self.best)
        return cost < best * (1 - NOISE) or (cost <= best * (1 + NOISE) and total > self.best_bytes)

    def correct(self, menus: Sequence[Menu], budget: int) -> None:
        """Allocate in a budget, and correct it by what the measured output differs."""
        fits, exceeds = 0, self._target + 1
        last: list[Candidate] = []
        for _ in range(_ROUNDS):
            picks = allocate(menus, budget)
            if picks == last and fits == 0:
                return
            last = picks
            total = self.try_(picks)
            if total > self._target:
                exceeds = min(exceeds, budget)
            else:
                fits = max(fits, budget)
                if self._close() or picks == allocate(menus, exceeds - 1):
                    return
            budget = self._target - (total - _bytes(picks))
            if not fits < budget < exceeds:
                budget = (fits + exceeds) // 2
            if budget in (fits, exceeds):
                return

    def try_equal(self, menus: Sequence[Menu]) -> None:
        """Measure equal settings for all sites, where they could fit and be better."""
        for picks in equal_plans(menus):
            fits = self.best_bytes <= self._target
            if not fits or (
                _bytes(picks) <= self._target and self._cost(picks) < self._cost(self.best)
            ):
                self.try_(picks)

    def try_few(self, menus: Sequence[Menu]) -> None:
        """Allocate among two or three neighbouring equal settings, which share tensors and bodies.

        Only where what comes with the weights is a good part of the output.
        """
        frames = self.best_bytes - _bytes(self.best)
        if frames * _FRAMES < self.best_bytes:
            return
        plans = sorted(equal_plans(menus), key=_bytes)
        for count in (2, 3):
            for start in range(len(plans) - count + 1):
                window = plans[start : start + count]
                room = self._target - frames
                if not _bytes(window[0]) < room + frames // 2 or _bytes(window[-1]) < room // 2:
                    continue
                few = [
                    menu.with_options(dict.fromkeys(options))
                    for menu, *options in zip(menus, *window, strict=True)
                ]
                self.correct(few, room)

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
        return sum(menu.cost_of(pick) for menu, pick in zip(self.menus, picks, strict=True))

    def _steps(self, room: int) -> list[tuple[int, Candidate]]:
        """Other candidates of single sites that would save error, the most saved first."""
        found = []
        for site, (menu, pick) in enumerate(zip(self.menus, self.best, strict=True)):
            for candidate in menu.options:
                gain = menu.cost_of(pick) - menu.cost_of(candidate)
                if gain > 0 and candidate.bytes - pick.bytes <= room:
                    found.append((-gain, site, candidate))
        found.sort(key=lambda step: step[:2])
        return [(site, candidate) for _, site, candidate in found]


def with_dense(menu: Menu) -> Menu:
    """The menu with the dense weight as its largest option, for targets that leave room for it."""
    if any(candidate.codec == "dense" for candidate in menu.options):
        return menu
    return menu.with_options(
        (*menu.options, keep(menu.site, "the target leaves room for it")),
    )


def _bytes(picks: Sequence[Candidate]) -> int:
    return sum(candidate.bytes for candidate in picks)
