"""Positions inside heads of queries and keys: no weight sums over them, their products do.

Scores of attention are sums over positions, ``s = sum_j q_j k_j``. Without the positions S they
change by ``sum_S q_j k_j``, in the mean square over queries and keys that are taken as independent
``sum_{i,j in S} E[q_i q_j] Cov[k_i, k_j]`` (a change that is the same for all keys is none behind a
Softmax). What that does to the values read next is measured: a quarter of the positions is left
out, one attention at a time, and the loss is taken as proportional.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.calibration.sensitivity import spread
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.groups import Group
from onnxcomp.passes.transforms.prune.select import Step, floor_of, step_size
from onnxcomp.passes.transforms.prune.walk import CONSUMED, QkProduct
from onnxcomp.passes.weight import Array, Feed

__all__ = ["qk_steps", "silenced"]

# Inputs that moments are taken from, and those that a measurement runs on.
_FEEDS, _PROBES = 16, 4

# Share of the positions that is left out to measure.
_SHARE = 0.25


@dataclasses.dataclass(slots=True, eq=False)
class _Pair:
    """Queries and keys of one attention whose positions may go.

    Attributes:
        group: Their candidates.
        product: Where they are multiplied.
        behind: The product that reads what attention makes.
        matrix: Change of the scores, float64 ``(candidates, candidates)``: its sum over a set of
            candidates is the mean square for that set.
        factor: Loss for a change of one.
    """

    group: Group
    product: QkProduct
    behind: Consumer
    matrix: Array
    factor: float = 0.0

    def order(self, least: float, round_to: int) -> Iterator[tuple[list[int], float]]:
        """Candidates that go together, and what that adds to the change of the scores."""
        slots = np.split(np.arange(len(self.matrix)), len(self.group.slots))
        gone: list[int] = []
        added = np.diag(self.matrix).copy()
        count = step_size(self.group, round_to)
        while self.group.size - len(gone) // len(slots) - count >= floor_of(self.group, least):
            chosen: list[int] = []
            for slot in slots:
                left = np.setdiff1d(slot, gone)
                chosen += left[np.argsort(added[left], kind="stable")[:count]].tolist()
            before = float(self.matrix[np.ix_(gone, gone)].sum())
            gone += chosen
            added += 2 * self.matrix[:, chosen].sum(axis=1)
            yield chosen, max(0.0, float(self.matrix[np.ix_(gone, gone)].sum()) - before)

    def classes(self, chosen: Sequence[int]) -> frozenset[int]:
        """Classes of some candidates."""
        every = [candidate for slot in self.group.slots for candidate in slot]
        return frozenset(own for number in chosen for own in every[number])


def qk_steps(
    analysis: Analysis,
    groups: Sequence[Group],
    consumers: Sequence[Consumer],
    ledger: Ledger,
    feeds: Sequence[Feed],
    folder: Path | None = None,
    *,
    least: float,
    round_to: int,
) -> list[list[Step]]:
    """For each attention the order in which positions of queries and keys go.

    Args:
        analysis: Of the model.
        groups: What can be removed; those that some product reads are left out.
        consumers: The products of the model.
        ledger: Knows what is saved.
        feeds: Calibration data.
        folder: Where pieces of the model are written.
        least: Share of each group that stays.
        round_to: See `select.step_size`.

    Returns:
        Steps of each such group; `Step.loss` is relative to the power of what is read next.
    """
    pairs = list(_pairs(analysis, groups, consumers))
    _observe(analysis, pairs, spread(feeds, _FEEDS), folder)
    _measure(analysis, pairs, spread(feeds, _PROBES), folder, least, round_to)
    return [
        [
            Step(pair.group, pair.classes(chosen), pair.factor * change,
                 ledger.cost(pair.classes(chosen)))
            for chosen, change in pair.order(least, round_to)
        ]
        for pair in pairs
        if pair.factor > 0.0
    ]  # fmt: skip


def _pairs(
    analysis: Analysis, groups: Sequence[Group], consumers: Sequence[Consumer]
) -> Iterator[_Pair]:
    read = {own for consumer in consumers for own in consumer.classes.tolist()}
    for group in groups:
        every = [candidate for slot in group.slots for candidate in slot]
        own = frozenset().union(*every)
        found = [m for m in analysis.qk_products if own & set(analysis.classes(m.atoms).ravel())]
        if group.kind != "inner" or own & read or len(found) != 1:
            continue
        behind = _behind(found[0].node, consumers)
        if behind is not None:
            yield _Pair(group, found[0], behind, np.zeros((len(every), len(every))))


def _behind(node: ir.Node, consumers: Sequence[Consumer]) -> Consumer | None:
    """The first product, in graph order, that depends on a node."""
    reached: set[ir.Node] = set()
    pending = [node]
    while pending:
        for value in pending.pop().outputs:
            new = {use.node for use in value.uses()} - reached
            reached |= new
            pending += new
    return next((consumer for consumer in consumers if consumer.node in reached), None)


def _observe(
    analysis: Analysis, pairs: Sequence[_Pair], feeds: Sequence[Feed], folder: Path | None
) -> None:
    """Fill in the matrices."""
    wanted = [pair.product.wanted for pair in pairs]
    chain = Chain(analysis.model, feeds, wanted, folder)
    for pair in sorted(pairs, key=lambda pair: chain.position(pair.product.wanted)):
        product, total = pair.product, 0
        size = product.atoms.shape[-1]
        grams = np.zeros((2, product.atoms.size // size, size, size))
        means = np.zeros((product.atoms.size // size, size))
        for values in chain.advance(product.wanted):
            q, k = (side.vectors(values[side.name]) for side in (product.left, product.right))
            grams[0] += np.swapaxes(q, 1, 2) @ q / q.shape[1]
            grams[1] += np.swapaxes(k, 1, 2) @ k / k.shape[1]
            means += k.mean(axis=1)
            total += 1
        means /= total
        covariance = grams[1] / total - means[:, :, None] * means[:, None, :]
        pair.matrix[...] = _by_candidate(analysis, pair, grams[0] / total * covariance)


def _by_candidate(analysis: Analysis, pair: _Pair, changes: Array) -> Array:
    """Sums over the positions of candidates of ``(heads, size, size)``."""
    classes = analysis.classes(pair.product.atoms).reshape(changes.shape[:2])
    every = [candidate for slot in pair.group.slots for candidate in slot]
    holds = np.stack([np.isin(classes, list(candidate)) for candidate in every]).astype(float)
    return np.asarray(np.einsum("chi,hij,dhj->cd", holds, changes, holds, optimize=True))


def _measure(
    analysis: Analysis,
    pairs: Sequence[_Pair],
    feeds: Sequence[Feed],
    folder: Path | None,
    least: float,
    round_to: int,
) -> None:
    """Leave some positions of one attention out, and see what that does to what is read next."""
    results = [(_result(pair.behind),) for pair in pairs]
    dense = Chain(analysis.model, feeds, results, folder)
    order = sorted(range(len(pairs)), key=lambda number: dense.position(results[number]))
    for number in order:
        pair, (name,) = pairs[number], results[number]
        gone, change = _first(pair, least, round_to)
        exact = [values[name] for values in dense.advance((name,))]
        if change <= 0.0:
            continue
        other = Chain(analysis.model, feeds, [(name,)], folder)
        lost = np.zeros(int(analysis.relations.classes.max()) + 1, bool)
        lost[list(gone)] = True
        for weight, array in silenced(analysis, lost).items():
            other.replace(weight, array)
        wrong = power = 0.0
        for values, reference in zip(other.advance((name,)), exact, strict=True):
            wide = reference.astype(np.float64)
            power += float(np.square(wide).sum())
            wrong += float(np.square(wide - values[name]).sum())
        pair.factor = wrong / max(power, 1e-30) / change


def _first(pair: _Pair, least: float, round_to: int) -> tuple[frozenset[int], float]:
    """Classes of the share of candidates that go first, and the change of the scores."""
    gone: list[int] = []
    change = 0.0
    for chosen, added in pair.order(least, round_to):
        gone += chosen
        change += added
        if len(gone) >= _SHARE * len(pair.matrix):
            break
    return pair.classes(gone), change


def _result(consumer: Consumer) -> str:
    """Name of what is read next: the output of a product with what is added to it."""
    value = consumer.node.outputs[0]
    for added in (consumer.bias, consumer.addend):
        uses = tuple(value.uses())
        follows = len(uses) == 1 and uses[0].node.op_type == "Add"
        if added is not None and follows and added in uses[0].node.inputs:
            value = uses[0].node.outputs[0]
    return value.name or ""


def silenced(
    analysis: Analysis, gone: Array, others: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """Weights and biases that make queries and keys, with zeros where positions go.

    Args:
        analysis: Of the model.
        gone: Which classes go.
        others: Weights that have changed already; they are returned, too.
    """
    found = dict(others or {})
    summed = {int(own) for m in analysis.qk_products for own in analysis.classes(m.atoms).ravel()}
    wanted = np.zeros(len(gone), bool)
    wanted[list(summed)] = True
    for member in analysis.members:
        tensor, name = member.value.const_value, member.value.name or ""
        if member.role == CONSUMED or tensor is None:
            continue
        lost = (gone & wanted)[analysis.classes(member.atoms)]
        if lost.any():
            array = found.get(name, tensor.numpy())
            shape = [s if a in member.axes else 1 for a, s in enumerate(array.shape)]
            found[name] = np.where(lost.reshape(shape), np.zeros_like(array), array)
    return found
