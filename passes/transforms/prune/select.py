"""Select what to remove: one knapsack over all groups, or the same share of each.

`obs` removes greedily inside clusters of groups that share products, always the step with the
smallest loss for what it saves; the clusters' sequences are then merged by the same measure. Other
scores rank candidates by themselves.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnxcomp.passes.analysis.prune_report import GroupReport
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.groups import Group, Groups
from onnxcomp.passes.transforms.prune.obs import Surgeon, Unseen
from onnxcomp.passes.weight import Array

__all__ = [
    "Step",
    "clusters",
    "expected_steps",
    "floor_of",
    "greedy",
    "group_reports",
    "merge",
    "removed",
    "step_size",
]

# Groups of at least this many candidates of one slot lose `round_to` at a time.
_ROUNDED = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """Candidates of one group that go together.

    Attributes:
        group: The group.
        classes: What goes.
        loss: Relative squared error this adds to the outputs of its products, summed over them.
        cost: What it saves.
    """

    group: Group
    classes: frozenset[int]
    loss: float
    cost: float


def floor_of(group: Group, least: float) -> int:
    """Candidates of each slot that must stay."""
    return max(1, math.ceil(group.size * least))


def step_size(group: Group, round_to: int) -> int:
    """Candidates of each slot that go at a time, so that sizes stay multiples of `round_to`."""
    return round_to if group.size >= max(_ROUNDED, 4 * round_to) else 1


def expected_steps(groups: Sequence[Group], least: float, round_to: int) -> int:
    """Steps that `greedy` takes until the floors of some groups are reached."""
    free = [(g.size - floor_of(g, least), step_size(g, round_to)) for g in groups]
    return sum(max(0, count // width) for count, width in free)


def clusters(
    groups: Sequence[Group], consumers: Sequence[Consumer]
) -> list[tuple[list[Group], list[Consumer]]]:
    """Groups joined by products they share, each with its products."""
    owners: list[tuple[set[int], list[Group], list[Consumer]]] = []
    for group in groups:
        classes = {own for slot in group.slots for candidate in slot for own in candidate}
        products = [c for c in consumers if classes & set(c.classes.tolist())]
        joined = {id(product) for product in products}
        mine, products_of = [group], products
        for other in [other for other in owners if other[0] & joined]:
            owners.remove(other)
            joined |= other[0]
            mine = other[1] + mine
            products_of = other[2] + [p for p in products_of if p not in other[2]]
        owners.append((joined, mine, products_of))
    return [(mine, products) for _, mine, products in owners]


class _Race:
    """Greedy removal from groups that share products."""

    def __init__(
        self, products: Sequence[Consumer], surgeons: Mapping[str, Surgeon | Unseen], ledger: Ledger
    ) -> None:
        self.products = products
        self.surgeons = surgeons
        self.gone = np.zeros_like(ledger.gone)
        # Losses do not depend on one another where nothing is known of inputs.
        self._apart = all(isinstance(surgeons[p.name], Unseen) for p in products)
        self._known: dict[frozenset[int], float] = {}
        self._live: dict[frozenset[int], bool] = {}
        self.places = [_places(product) for product in products]
        self._ledger = ledger

    def columns(self, number: int, candidate: Iterable[int]) -> Array:
        """Columns of a product that a candidate holds and that are still there."""
        place = self.places[number]
        own = [place[c] for c in candidate if c in place and not self.gone[c]]
        return np.sort(np.concatenate(own)) if own else np.zeros(0, np.int64)

    def losses(self, candidates: Sequence[frozenset[int]]) -> Array:
        """Relative loss of each candidate, summed over the products."""
        if not self._apart:
            return self._losses(candidates)
        new = [candidate for candidate in candidates if candidate not in self._known]
        self._known.update(zip(new, self._losses(new).tolist(), strict=True))
        return np.array([self._known[candidate] for candidate in candidates])

    def _losses(self, candidates: Sequence[frozenset[int]]) -> Array:
        total = np.zeros(len(candidates))
        for number, product in enumerate(self.products):
            surgeon = self.surgeons[product.name]
            by_length: dict[int, list[int]] = {}
            own = [self.columns(number, candidate) for candidate in candidates]
            for index, columns in enumerate(own):
                by_length.setdefault(len(columns), []).append(index)
            for length, members in by_length.items():
                if length:
                    found = surgeon.losses(np.stack([own[index] for index in members]))
                    total[members] += found / surgeon.energy
        return total

    def propose(self, group: Group, count: int, left: int) -> Step | None:
        """The next step of a group; None where nothing more may go."""
        chosen: set[int] = set()
        loss = 0.0
        for slot in group.slots:
            open_ = [c for c in slot if not all(self.gone[own] for own in c)]
            alive = [c for c in open_ if self._counts(c)]
            if not alive:
                continue
            if len(alive) - count < left:
                return None
            losses = self.losses(alive)
            order = np.argsort(losses, kind="stable")[:count]
            loss += float(losses[order].sum())
            chosen |= {own for index in order for own in alive[index]}
        if not chosen:
            return None
        return Step(group, frozenset(chosen), loss, self._ledger.cost(chosen))

    def _counts(self, candidate: frozenset[int]) -> bool:
        """Whether any product still has a column of a candidate."""
        if candidate not in self._live:
            found = (len(self.columns(n, candidate)) for n in range(len(self.products)))
            self._live[candidate] = any(found)
        return self._live[candidate]

    def commit(self, step: Step) -> Step:
        """Take a step; the same with the loss it really has."""
        loss = 0.0
        for number, product in enumerate(self.products):
            columns = self.columns(number, step.classes)
            if len(columns):
                surgeon = self.surgeons[product.name]
                loss += surgeon.remove(columns) / surgeon.energy
        self.gone[list(step.classes)] = True
        for candidate in [c for c in self._live if not c.isdisjoint(step.classes)]:
            del self._live[candidate]
            self._known.pop(candidate, None)
        return dataclasses.replace(step, loss=loss)


def _places(product: Consumer) -> dict[int, Array]:
    """Columns of each class."""
    found: dict[int, list[int]] = {}
    for position, own in enumerate(product.classes.tolist()):
        start = position * product.block
        found.setdefault(own, []).extend(range(start, start + product.block))
    return {own: np.array(columns) for own, columns in found.items()}


def greedy(
    groups: Sequence[Group],
    products: Sequence[Consumer],
    surgeons: Mapping[str, Surgeon | Unseen],
    ledger: Ledger,
    *,
    least: float,
    round_to: int,
    watch: Callable[[Sequence[Step]], None] | None = None,
) -> list[Step]:
    """The order in which a cluster's candidates go, until its floors are reached.

    `watch` is told of the steps so far after each one; the surgeons then hold the fitted weights.
    """
    race = _Race(products, surgeons, ledger)
    steps: list[Step] = []
    while True:
        proposals = [
            race.propose(group, step_size(group, round_to), floor_of(group, least))
            for group in groups
        ]
        real = [step for step in proposals if step is not None]
        if not real:
            return steps
        best = min(real, key=lambda step: step.loss / max(step.cost, 1e-30))
        steps.append(race.commit(best))
        if watch is not None:
            watch(steps)


def merge(
    sequences: Sequence[Sequence[Step]], ledger: Ledger, share: float, *, trim: bool = False
) -> list[Step]:
    """Steps in the order of loss for what they save, until a share is gone.

    Inside a sequence the order stays: a step behind a costlier one counts as costly as that.

    Args:
        sequences: Of each cluster.
        ledger: Told what goes.
        share: Share of the whole to remove.
        trim: Whether steps that the share is reached without are put back: the last one may have
            taken much more than was left to take.
    """
    heap: list[tuple[float, int, int]] = []
    for number, steps in enumerate(sequences):
        if steps:
            heap.append((steps[0].loss / max(steps[0].cost, 1e-30), number, 0))
    heapq.heapify(heap)
    taken: list[Step] = []
    while heap and ledger.removed < share:
        slope, number, place = heapq.heappop(heap)
        step = sequences[number][place]
        ledger.remove(step.classes)
        taken.append(step)
        if place + 1 < len(sequences[number]):
            following = sequences[number][place + 1]
            own = following.loss / max(following.cost, 1e-30)
            heapq.heappush(heap, (max(slope, own), number, place + 1))
    return _trimmed(taken, ledger, share) if trim else taken


def _trimmed(steps: Sequence[Step], ledger: Ledger, share: float) -> list[Step]:
    """Without those steps, each the last one of its group, that the share is reached without.

    Those with the largest losses go first.
    """
    kept = list(steps)
    tried: set[int] = set()
    while True:
        last = {id(step.group): step for step in kept}
        open_ = [step for step in last.values() if id(step) not in tried]
        if not open_:
            return kept
        step = max(open_, key=lambda step: step.loss)
        ledger.restore(step.classes)
        if ledger.removed < share:
            ledger.remove(step.classes)
            tried.add(id(step))
        else:
            kept = [other for other in kept if other is not step]


def removed(steps: Sequence[Step]) -> frozenset[int]:
    """All classes that steps take."""
    return frozenset(own for step in steps for own in step.classes)


def group_reports(groups: Groups, steps: Sequence[Step]) -> tuple[GroupReport, ...]:
    """The groups that lost something to steps."""
    gone = removed(steps)
    found = []
    for group in groups.groups:
        alive = [sum(not candidate <= gone for candidate in slot) for slot in group.slots]
        touched = any(step.group is group for step in steps)
        if touched:
            after = max(alive)
            found.append(GroupReport(group.name, group.kind, group.size, after, group.weights))
    return tuple(found)
