"""Choosing one setting for each weight: the same bits everywhere, or the least error in a budget.

The objective is a sum over weights, so the best plan for a given price of a byte is found weight by
weight, and the plans of all prices lie on the lower convex hulls of the weights' (bytes, cost)
points. Walking the hulls steepest step first is that Lagrangian solution; what is left of the
budget is then filled with whatever single step still fits and saves most per byte.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.codec import Codec, Params, WeightSite
from onnxcomp.passes.plan import Candidate
from onnxcomp.passes.settings import Rule, suggest, typed_params

__all__ = ["FRAMING", "Menu", "allocate", "fit", "menu", "objective", "sensitivity", "uniform"]

# Bytes of the nodes, names and tensor headers that come with one compressed weight; the exact
# number depends on the lengths of names and is counted when the skeleton is serialised.
FRAMING = 768

# Allocations measured by `fit`; two or three are enough unless the output crosses the limit above
# which weights are stored externally and aligned.
_ROUNDS = 8

# A plan is good when less than this part of the target is left over.
_CLOSE = 400

# Single steps measured by `fit` where allocations leave room.
_TRIALS = 12


def sensitivity(site: WeightSite) -> float:
    """Weight of a site in the objective; a calibrated plan replaces it by measured numbers."""
    del site
    return 1.0


def objective(site: WeightSite, error: float) -> float:
    """Cost of storing a site with a relative error: ``sensitivity * error^2``.

    A layer whose weight has relative error e, not correlated with its input, has an output with
    relative error e in the mean, and independent errors add in squares. So without knowing the
    data, the squared relative errors of the weights are the noise power of the model.
    """
    return sensitivity(site) * error * error


@dataclasses.dataclass(frozen=True, slots=True)
class Menu:
    """What there is to choose from for one site.

    Attributes:
        site: The weight.
        options: Candidates by increasing bytes and decreasing error; never empty.
    """

    site: WeightSite
    options: tuple[Candidate, ...]

    def cost(self, index: int) -> float:
        """Objective of one option."""
        return objective(self.site, self.options[index].error)


def keep(site: WeightSite, reason: str) -> Candidate:
    """The candidate that leaves a weight as it is."""
    return Candidate(site, "dense", CODECS["dense"].params_type(), site.nbytes, 0.0, reason=reason)


def _settings_of(codec: Codec, site: WeightSite, fixed: Mapping[str, object]) -> list[Params]:
    """Settings a codec offers for a site, with some parameters held fixed."""
    offered = list(codec.candidates(site))
    exact = [p for p in offered if all(getattr(p, key) == v for key, v in fixed.items())]
    if exact or not fixed:
        return exact
    # Values outside the usual choice are taken at their word, with the other parameters as offered.
    forced = dict.fromkeys(dataclasses.replace(params, **fixed) for params in offered)
    valid = []
    for params in forced:
        try:
            codec.check(params)
        except UsageError:
            continue
        valid.append(params)
    if forced and not valid:
        codec.check(next(iter(forced)))
    return valid


def _candidates(codec: Codec, site: WeightSite, fixed: Mapping[str, object]) -> list[Candidate]:
    typed_params(codec.params_type, fixed, codec.name)
    return [
        Candidate(site, codec.name, p, codec.size(site, p), codec.predict(site, p))
        for p in _settings_of(codec, site, fixed)
    ]


def menu(
    site: WeightSite,
    methods: Sequence[str],
    rule: Rule | None = None,
    *,
    codecs: Mapping[str, Codec] | None = None,
) -> Menu:
    """Everything that may be chosen for a site; only to keep it where nothing pays.

    Args:
        site: The weight.
        methods: Codecs of the run.
        rule: Settings for this weight; its methods win over those of the run.
        codecs: All codecs by name.

    Raises:
        UsageError: The rule names an unknown codec or parameter.
    """
    known = CODECS if codecs is None else codecs
    rule = Rule("") if rule is None else rule
    found: list[Candidate] = []
    reasons: list[str] = []
    for name in rule.methods or methods:
        if name not in known:
            raise UsageError(f"method {name!r} is unknown", hint=suggest(name, known))
        refusal = known[name].refuse(site)
        if refusal is not None:
            reasons.append(f"{name}: {refusal}")
            continue
        offered = _candidates(known[name], site, rule.params)
        # The identity codec is asked for by name only, and never for its size.
        paying = [c for c in offered if name == "dense" or c.bytes + FRAMING < site.nbytes]
        found += paying
        if not paying:
            reasons.append(f"{name}: {_not_smaller(offered, site)}")
    if not found:
        return Menu(site, (keep(site, "; ".join(reasons)),))
    return Menu(site, tuple(found))


def _not_smaller(offered: Sequence[Candidate], site: WeightSite) -> str:
    if not offered:
        return "offers no setting"
    least = min(candidate.bytes for candidate in offered)
    return f"{least} bytes and about {FRAMING} of framing are not less than {site.nbytes} dense"


def uniform(menu: Menu, bits: int) -> Candidate:
    """The candidate with `bits` bits per weight: the smallest that is no worse than the default.

    Codecs without a parameter `bits` take part with all their candidates.
    """
    options = [c for c in menu.options if getattr(c.params, "bits", bits) == bits]
    if not options:
        return keep(menu.site, f"with {bits} bits per weight it would not be smaller")
    first = [c for c in options if c.codec == options[0].codec]
    return min(first, key=lambda c: (_worse(c, first), c.bytes, _distance(c)))


def _distance(candidate: Candidate) -> int:
    """Number of parameters that differ from the codec's defaults."""
    default = type(candidate.params)()
    names = [field.name for field in dataclasses.fields(default)]
    return sum(getattr(candidate.params, n) != getattr(default, n) for n in names)


def _worse(candidate: Candidate, options: Sequence[Candidate]) -> bool:
    """Whether a candidate is worse than the one nearest to the codec's defaults."""
    nearest = min(options, key=_distance)
    return candidate.error > nearest.error * (1 + 1e-9)


def _pareto(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Candidates that no other beats in bytes and error, by increasing bytes."""
    result: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bytes, c.error, _distance(c))):
        if not result or candidate.error < result[-1].error:
            result.append(candidate)
    return tuple(result)


def _hull(menu: Menu) -> list[int]:
    """Indices of the options on the lower convex hull of (bytes, cost)."""
    hull: list[int] = []
    for index in range(len(menu.options)):
        while len(hull) > 1 and _slope(menu, hull[-2], hull[-1]) <= _slope(menu, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(menu: Menu, low: int, high: int) -> float:
    """Cost saved per byte by going from one option to a larger one."""
    added = menu.options[high].bytes - menu.options[low].bytes
    return (menu.cost(low) - menu.cost(high)) / added


def _walk(menus: Sequence[Menu], room: int) -> tuple[list[int], int]:
    """Hull steps of all menus, steepest first, as far as they fit into `room` bytes."""
    hulls = [_hull(menu) for menu in menus]
    picks = [hull[0] for hull in hulls]
    steps = [
        (-_slope(menu, hull[0], hull[1]), site, 1)
        for site, (menu, hull) in enumerate(zip(menus, hulls, strict=True))
        if len(hull) > 1
    ]
    heapq.heapify(steps)
    while steps:
        _, site, position = heapq.heappop(steps)
        menu, hull = menus[site], hulls[site]
        added = menu.options[hull[position]].bytes - menu.options[picks[site]].bytes
        if added > room:
            continue
        room -= added
        picks[site] = hull[position]
        if position + 1 < len(hull):
            slope = _slope(menu, hull[position], hull[position + 1])
            heapq.heappush(steps, (-slope, site, position + 1))
    return picks, room


def _step(menu: Menu, pick: int, room: int) -> tuple[float, int] | None:
    """The step up from one option that saves most per byte in `room` bytes: slope and option."""
    start = menu.options[pick].bytes
    fitting = [
        (_slope(menu, pick, higher), -higher)
        for higher in range(pick + 1, len(menu.options))
        if menu.options[higher].bytes - start <= room
    ]
    if not fitting:
        return None
    slope, higher = max(fitting)
    return slope, -higher


def _fill(menus: Sequence[Menu], picks: Sequence[int], room: int) -> list[int]:
    """Take the single step that saves most per byte while one fits into `room` bytes."""
    picks = list(picks)
    heap: list[tuple[float, int, int]] = []

    def offer(site: int) -> None:
        step = _step(menus[site], picks[site], room)
        if step is not None:
            heapq.heappush(heap, (-step[0], site, step[1]))

    for site in range(len(menus)):
        offer(site)
    while heap:
        _, site, higher = heapq.heappop(heap)
        options = menus[site].options
        added = options[higher].bytes - options[picks[site]].bytes
        # Room only shrinks: a step that no longer fits is replaced by the best that does.
        if added <= room:
            room -= added
            picks[site] = higher
        offer(site)
    return picks


def _total(menus: Sequence[Menu], picks: Sequence[int]) -> int:
    return sum(menu.options[pick].bytes for menu, pick in zip(menus, picks, strict=True))


def _uniform_picks(menus: Sequence[Menu], fronts: Sequence[Menu]) -> list[list[int]]:
    """For each number of bits, the options of `fronts` nearest below that setting of all sites."""
    widths = {getattr(c.params, "bits", None) for menu in menus for c in menu.options}
    result = []
    for bits in sorted(width for width in widths if width is not None):
        sizes = [uniform(menu, bits).bytes for menu in menus]
        at_most = [
            sum(option.bytes <= size for option in front.options)
            for front, size in zip(fronts, sizes, strict=True)
        ]
        result.append([max(0, count - 1) for count in at_most])
    return result


def allocate(menus: Sequence[Menu], budget: int) -> list[Candidate]:
    """One candidate for each menu with the least total cost in `budget` bytes.

    Equal settings for all sites are among the plans compared. When not even the smallest
    candidates fit, they are the answer.
    """
    fronts = [Menu(menu.site, _pareto(menu.options)) for menu in menus]
    picks, room = _walk(fronts, budget - _total(fronts, [0] * len(fronts)))
    plans = [_fill(fronts, picks, room)]
    for equal in _uniform_picks(menus, fronts):
        room = budget - _total(fronts, equal)
        if room >= 0:
            plans.append(_fill(fronts, equal, room))
    best = min(plans, key=lambda p: sum(f.cost(i) for f, i in zip(fronts, p, strict=True)))
    return [front.options[pick] for front, pick in zip(fronts, best, strict=True)]


def fit(
    menus: Sequence[Menu], target: int, size_of: Callable[[Sequence[Candidate]], int]
) -> tuple[list[Candidate], int]:
    """Candidates whose whole output has at most `target` bytes, as close to it as they come.

    Names, nodes, alignment and what weights share depend on the candidates, so outputs are
    measured: allocations in a budget that is corrected until it fits, equal settings for all sites,
    and single steps from the best of these.

    Args:
        menus: One for each site.
        target: Most bytes of the output.
        size_of: Exact bytes of the output written with these candidates.

    Returns:
        The candidates and the bytes of the output; more than `target` only when no plan
        that was tried is smaller.
    """
    search = _Search([_with_dense(menu) for menu in menus], target, size_of)
    least = allocate(search.menus, 0)
    search.try_(least)
    search.correct(target - (search.best_bytes - _bytes(least)))
    search.try_equal(menus)
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
            better = total <= self._target and _cost(picks) < _cost(self.best)
        if better:
            self.best, self.best_bytes = picks, total
        return total

    def correct(self, budget: int) -> None:
        """Allocate in a budget, and correct it by what the measured output differs."""
        fits, exceeds = 0, self._target + 1
        for _ in range(_ROUNDS):
            picks = allocate(self.menus, budget)
            total = self.try_(picks)
            if total > self._target:
                exceeds = min(exceeds, budget)
            else:
                fits = max(fits, budget)
                if self._close() or picks == allocate(self.menus, exceeds - 1):
                    return
            budget = self._target - (total - _bytes(picks))
            if not fits < budget < exceeds:
                budget = (fits + exceeds) // 2
            if budget in (fits, exceeds):
                return

    def try_equal(self, menus: Sequence[Menu]) -> None:
        """Measure equal settings for all sites, where they could fit and be better."""
        widths = {getattr(c.params, "bits", None) for menu in menus for c in menu.options}
        for bits in sorted(width for width in widths if width is not None):
            picks = [uniform(menu, bits) for menu in menus]
            fits = self.best_bytes <= self._target
            if not fits or (_bytes(picks) <= self._target and _cost(picks) < _cost(self.best)):
                self.try_(picks)

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

    def _steps(self, room: int) -> list[tuple[int, Candidate]]:
        """Other candidates of single sites that would save error, the most saved first."""
        found = []
        for site, (menu, pick) in enumerate(zip(self.menus, self.best, strict=True)):
            for candidate in menu.options:
                gain = objective(menu.site, pick.error) - objective(menu.site, candidate.error)
                if gain > 0 and candidate.bytes - pick.bytes <= room:
                    found.append((-gain, site, candidate))
        found.sort(key=lambda step: step[:2])
        return [(site, candidate) for _, site, candidate in found]


def _with_dense(menu: Menu) -> Menu:
    """The menu with the dense weight as its largest option, for targets that leave room for it."""
    if any(candidate.codec == "dense" for candidate in menu.options):
        return menu
    return Menu(menu.site, (*menu.options, keep(menu.site, "the target leaves room for it")))


def _bytes(picks: Sequence[Candidate]) -> int:
    return sum(candidate.bytes for candidate in picks)


def _cost(picks: Sequence[Candidate]) -> float:
    return sum(objective(candidate.site, candidate.error) for candidate in picks)
