"""From scores to removals: the steps that reach a share of parameters or FLOPs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from onnxcomp.passes.config.values import PruneScore
from onnxcomp.passes.transforms.prune import scores
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.compensate import Sums, measured_loss
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.groups import Group
from onnxcomp.passes.transforms.prune.measured import Measured, rescaled
from onnxcomp.passes.transforms.prune.obs import Surgeon, Unseen, damping
from onnxcomp.passes.transforms.prune.select import (
    Step,
    clusters,
    floor_of,
    greedy,
    merge,
    removed,
    step_size,
)
from onnxcomp.passes.weight import Array

__all__ = ["Choice", "Numerical", "by_obs", "by_rank"]

# Where losses are measured on the way of a sequence of steps.
_PLACES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """Steps that reach a share, and what they were chosen from.

    Attributes:
        steps: In the order in which they were taken.
        sequences: All steps of each cluster, in their order; none where a budget was not divided.
    """

    steps: Sequence[Step]
    sequences: Sequence[Sequence[Step]] = ()


def by_obs(
    groups: Sequence[Group],
    consumers: Sequence[Consumer],
    seen: Iterable[tuple[Consumer, Sums | None]],
    ledger: Ledger,
    share: float,
    more: Sequence[Sequence[Step]] = (),
    measured: Measured | None = None,
    *,
    least: float,
    round_to: int,
) -> list[Choice]:
    """One knapsack over all groups by loss for what is saved.

    A loss is relative to the power of what is read next: behind a residual that of the sum, not
    of the product alone. On the reference language model, a fifth of whose parameters go, the
    divergence is 0.012 instead of 0.032 for it, without any fit behind pruned layers.

    Sequences of steps whose losses are known already take part (`more`). With `measured` there are
    two answers: by the losses of the outputs, and by the others as they were.

    Clusters are worked on as soon as their moments are there, so that those of few products are
    in memory at a time.

    Returns:
        Steps that reach the share; what is expected to do best comes first. The ledger holds what
        the last ones take.
    """
    waiting = clusters(groups, consumers)
    found: dict[str, Surgeon | Unseen] = {}
    known: dict[str, Sums] = {}
    sequences: list[list[Step]] = [[] for _ in waiting]
    local: list[list[Step]] = [[] for _ in waiting]
    for consumer, sums in seen:
        found[consumer.name] = _surgeon(consumer, sums)
        if sums is not None:
            known[consumer.name] = sums
        for number, (own, products) in enumerate(waiting):
            names = [product.name for product in products]
            if consumer.name in names and all(name in found for name in names):
                marks: dict[int, float] = {}
                watch = _watch(measured, own, products, found, marks)
                steps = greedy(
                    own, products, found, ledger, least=least, round_to=round_to, watch=watch
                )
                local[number] = steps = _checked(steps, products, known, found, ledger)
                if measured is not None and steps:
                    if not marks:
                        marks[len(steps)] = measured.with_fits(steps, products, found)
                    steps = rescaled(steps, marks)
                sequences[number] = steps
                for name in names:
                    del found[name]
                    known.pop(name, None)
    if measured is None:
        return [Choice(merge([*local, *more], ledger, share), [*local, *more])]
    positions = (measured.without_positions(steps) for steps in more)
    choices = []
    for every in ([*sequences, *positions], [*local, *more]):
        ledger.clear()
        choices.append(Choice(merge(every, ledger, share, trim=True), every))
    return choices


def _watch(
    measured: Measured | None,
    groups: Sequence[Group],
    products: Sequence[Consumer],
    surgeons: Mapping[str, Surgeon | Unseen],
    marks: dict[int, float],
) -> Callable[[Sequence[Step]], None] | None:
    """What notes the measured loss of a cluster at some places on its way."""
    if measured is None:
        return None
    places = measured.places(groups)

    def watch(steps: Sequence[Step]) -> None:
        if len(steps) in places:
            marks[len(steps)] = measured.with_fits(steps, products, surgeons)

    return watch


def _surgeon(consumer: Consumer, sums: Sums | None) -> Surgeon | Unseen:
    """A product that will lose columns; without moments where nothing is known of its inputs."""
    if sums is None:
        assert consumer.weight.const_value is not None
        return Unseen(consumer.view(consumer.weight.const_value.numpy()), consumer.groups)
    weight = _weight(consumer)
    power = sums.power or float(np.einsum("ij,ij->", weight @ sums.gram, weight))
    power *= consumer.groups  # all groups of a convolution, were they alike
    mean = None if consumer.bias is None else sums.mean
    return Surgeon(weight, sums.gram, damping(sums.gram), power, mean)


def _weight(consumer: Consumer) -> Array:
    tensor = consumer.weight.const_value
    assert tensor is not None
    return consumer.matrix(tensor.numpy())


def _checked(
    steps: list[Step],
    products: Sequence[Consumer],
    known: Mapping[str, Sums],
    surgeons: Mapping[str, Surgeon | Unseen],
    ledger: Ledger,
) -> list[Step]:
    """The steps with losses as vectors kept aside measure them, where the data are few.

    Moments of few vectors promise too much: a layer of 1,280 columns that has seen 50 images looks
    as if 50 columns were enough. At some places of a sequence the loss is measured, and those of
    the steps between two places are scaled to agree.
    """
    few = [p for p in products if p.name in known and known[p.name].held is not None]
    if not few or not steps:
        return steps
    found: list[Step] = []
    gone = np.zeros_like(ledger.gone)
    before = 0.0
    places = sorted({math.ceil(len(steps) * share) for share in _PLACES})
    for start, stop in itertools.pairwise([0, *places]):
        part = steps[start:stop]
        gone[list(removed(part))] = True
        after = sum(
            measured_loss(
                _weight(c), known[c.name], c.columns(gone), biased=c.bias is not None
            ) / surgeons[c.name].energy
            for c in few
        )  # fmt: skip
        expected = sum(step.loss for step in part)
        scale = max(1.0, (after - before) / max(expected, 1e-30))
        found += [dataclasses.replace(step, loss=scale * step.loss) for step in part]
        before = max(before, after)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Numerical:
    """How the score `numerical` is read.

    Attributes:
        damp: Added to the diagonal of the mask problem, as a share of its mean.
        steps: Newton steps; 0 for the closed form, which they equal.
        heads: Whether the published weight of heads multiplies their scores ("score"), or heads
            are as dear as the parameters they hold and compare by their scores alone ("cost").
    """

    damp: float = scores.DAMP
    steps: int = 0
    heads: Literal["score", "cost"] = "score"


@dataclasses.dataclass(frozen=True, slots=True)
class _Ranked:
    """Candidates of a group in the order in which they go."""

    group: Group
    steps: tuple[frozenset[int], ...]
    scores: tuple[float, ...]


def by_rank(
    analysis: Analysis,
    groups: Sequence[Group],
    consumers: Sequence[Consumer],
    seen: Mapping[str, Sums],
    ledger: Ledger,
    share: float,
    score: PruneScore,
    reading: Numerical | None = None,
    *,
    uniform: bool,
    least: float,
    round_to: int,
) -> list[Step]:
    """Candidates by their own scores: the same share of every group, or the lowest of all.

    Scores of `flap` are standardised in each group; those of `numerical` are masks, which compare
    across products as they are, with the published weight on heads.
    """
    how = reading or Numerical()
    columns = {c.name: _columns(c, seen.get(c.name), score, share, how) for c in consumers}
    weigh = score == "numerical" and how.heads == "score"
    ranked = [
        _ranked(analysis, group, consumers, columns, score, step_size(group, round_to), weigh=weigh)
        for group in groups
        if group.kind != "inner"
    ]
    items = [
        (key, number, place)
        for number, group in enumerate(ranked)
        for place, key in enumerate(_keys(group, uniform, score))
    ]
    taken: list[Step] = []
    counts = [0] * len(ranked)
    for _, number, place in sorted(items):
        own = ranked[number]
        step = own.steps[place]
        width = step_size(own.group, round_to)
        if ledger.removed >= share:
            break
        if own.group.size - counts[number] - width < floor_of(own.group, least):
            continue
        counts[number] += width
        ledger.remove(step)
        taken.append(Step(own.group, step, own.scores[place], ledger.cost(step)))
    return taken


def _columns(
    consumer: Consumer, sums: Sums | None, score: PruneScore, share: float, how: Numerical
) -> Array:
    """Score of each column of a product."""
    weight = _weight(consumer)
    if sums is None or score == "magnitude":
        return scores.magnitude(weight)
    if score == "wanda":
        return scores.wanda(weight, sums.gram)
    if score == "flap":
        return scores.flap(weight, sums.gram, sums.mean)
    return scores.numerical(weight, sums.gram, share, damp=how.damp, steps=how.steps)


def _ranked(
    analysis: Analysis,
    group: Group,
    consumers: Sequence[Consumer],
    columns: Mapping[str, Array],
    score: PruneScore,
    width: int,
    *,
    weigh: bool,
) -> _Ranked:
    candidates = group.slots[0]
    totals = np.zeros(len(candidates))
    counts = np.zeros(len(candidates))
    place = {own: index for index, c in enumerate(candidates) for own in c}
    for consumer in consumers:
        own = columns[consumer.name].reshape(len(consumer.classes), -1)
        for position, name in enumerate(consumer.classes.tolist()):
            if name in place:
                totals[place[name]] += own[position].sum()
                counts[place[name]] += own.shape[1]
    if not counts.any():
        totals = _norms(analysis, group)
    if score in ("numerical", "flap"):
        totals = totals / np.maximum(counts, 1)
    if weigh and group.kind == "heads":
        totals = totals * _head_weight(analysis, group)
    order = np.argsort(totals, kind="stable")
    steps, values = [], []
    for start in range(0, len(order) - width + 1, width):
        chunk = order[start : start + width]
        steps.append(frozenset(own for index in chunk for own in candidates[index]))
        values.append(float(totals[chunk].mean()))
    return _Ranked(group, tuple(steps), tuple(values))


def _norms(analysis: Analysis, group: Group) -> Array:
    """Squared norms of all weights of each candidate, for groups without observed products."""
    place = {own: index for index, c in enumerate(group.slots[0]) for own in c}
    totals = np.zeros(group.size)
    for member in analysis.members:
        tensor = member.value.const_value
        if tensor is None or member.value.name not in group.weights or len(member.axes) > 1:
            continue
        array = np.moveaxis(np.asarray(tensor.numpy(), np.float64), member.axes[0], 0)
        power = np.square(array.reshape(len(array), -1)).sum(axis=1)
        for position, own in enumerate(analysis.classes(member.atoms).tolist()):
            if own in place:
                totals[place[own]] += power[position]
    return totals


def _head_weight(analysis: Analysis, group: Group) -> float:
    """The published weight of a head's score: 4 matrices of its size for 3 of one neuron."""
    for member in analysis.members:
        if member.role == "in" and member.value.name in group.weights:
            return 4.0 * member.atoms.size / group.size / 3.0
    return 1.0


def _keys(ranked: _Ranked, uniform: bool, score: PruneScore) -> Iterator[float]:
    count = len(ranked.steps)
    if uniform:
        yield from ((place + 0.5) / count for place in range(count))
        return
    own = np.array(ranked.scores)
    if score == "flap":
        own = (own - own.mean()) / max(float(own.std()), 1e-30)
    yield from own.tolist()
