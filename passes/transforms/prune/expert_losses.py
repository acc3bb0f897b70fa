"""Which experts the outputs miss least, measured.

The model runs without an expert of a mixture, and the loss of its outputs counts: divergence where
they are logits or probabilities. How often an expert is chosen says less: two that do the same work
are both chosen often, and each can stand in for the other one. After one is gone, the best few of
its mixture are measured again. Losses of several do not add up: where to take those that are chosen
least loses less, these go, and in the end each is exchanged for another one where that is better.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.model import copy_model
from onnxcomp.passes.ir.traversal import Names, new_initializer
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Contest", "can_measure", "least_missed"]

# Experts of each mixture that are absent.
Gone = Sequence[Sequence[int]]

# Inputs that outputs are compared on.
_PROBES = 16

# Experts of a mixture that are measured again when one of it is gone.
_AGAIN = 4

# Experts of a mixture that are tried, for each that goes and at least: those chosen least.
_TRIED, _FEWEST = 2, 16

# Experts that each one that goes may be exchanged for: those chosen least.
_EXCHANGED = 6

# Bytes of initializers above which nothing is measured: the model is in memory once more.
_LARGEST = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Contest:
    """A mixture of which some experts are to go.

    Attributes:
        topk: Name of what the mixture's TopK reads: scores of all experts.
        product: Name of what the router's product gives.
        order: Its experts, those that are chosen least first.
        count: How many go.
    """

    topk: str
    product: str
    order: Sequence[int]
    count: int

    @property
    def tried(self) -> list[int]:
        """Experts that may go."""
        return list(self.order[: max(_TRIED * self.count, _FEWEST)])


def can_measure(model: ir.Model) -> bool:
    """Whether a model is small enough to be in memory once more."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) <= _LARGEST


def least_missed(
    model: ir.Model, contests: Sequence[Contest], feeds: Sequence[Feed]
) -> tuple[list[list[int]], float]:
    """Experts that go, of each mixture, and the loss of the outputs without all of them.

    Args:
        model: A model with named values; only read.
        contests: Mixtures of its main graph.
        feeds: Calibration data. Outputs are compared on inputs that fits set aside.

    Raises:
        ModelError: The model does not run.
    """
    copy = copy_model(model)
    masks = _with_masks(copy, contests)
    with tempfile.TemporaryDirectory() as folder:
        race = _Race(OutputLoss(copy, masks, feeds, _PROBES, Path(folder)), masks, contests)
        ways = [race.one_by_one(), [list(own.order[: own.count]) for own in contests]]
        losses = [race.loss(way) for way in ways]
        return race.exchanged(*min(zip(ways, losses, strict=True), key=lambda way: way[1]))


class _Race:
    """Losses of the outputs without some experts."""

    def __init__(self, loss: OutputLoss, masks: Sequence[str], contests: Sequence[Contest]) -> None:
        self._loss, self._masks, self._contests = loss, masks, contests

    def loss(self, gone: Gone) -> float:
        """The loss without some experts of each mixture."""
        return self._loss({self._masks[at]: self._mask(at, own) for at, own in enumerate(gone)})

    def one_by_one(self) -> list[list[int]]:
        """The one that is missed least goes first, with what was known of those of other layers."""
        gone: list[list[int]] = [[] for _ in self._contests]
        known = {
            (at, expert): self._without(gone, at, expert)
            for at, own in enumerate(self._contests)
            if own.count
            for expert in own.tried
        }
        while known:
            at, expert = min(known, key=lambda pair: (known[pair], pair))
            gone[at].append(expert)
            del known[at, expert]
            own = sorted((p for p in known if p[0] == at), key=lambda pair: (known[pair], pair))
            if len(gone[at]) == self._contests[at].count:
                known = {pair: loss for pair, loss in known.items() if pair[0] != at}
            else:
                known |= {pair: self._without(gone, *pair) for pair in own[:_AGAIN]}
        return gone

    def exchanged(self, gone: Gone, loss: float) -> tuple[list[list[int]], float]:
        """Each expert that is gone is put back where another one of its mixture is missed less."""
        best = [list(own) for own in gone]
        for at, place in [(a, p) for a, own in enumerate(gone) for p in range(len(own))]:
            others = [expert for expert in self._contests[at].tried if expert not in best[at]]
            for other in others[:_EXCHANGED]:
                trial = [list(own) for own in best]
                trial[at][place] = other
                found = self.loss(trial)
                if found < loss:
                    best, loss = trial, found
        return best, loss

    def _without(self, gone: Gone, at: int, expert: int) -> float:
        return self.loss([[*own, expert] if n == at else own for n, own in enumerate(gone)])

    def _mask(self, at: int, absent: Sequence[int]) -> Array:
        mask = np.zeros(len(self._contests[at].order), np.float32)
        # Below all scores, and a number of float16.
        mask[list(absent)] = -3e4
        return mask


def _with_masks(model: ir.Model, contests: Sequence[Contest]) -> list[str]:
    """Add to the scores of each mixture numbers of its own, which are 0; the names of these.

    They are added twice. Behind the product they keep an expert from its share of a softmax, in
    front of TopK from being chosen for an offset that is added in between.
    """
    taken = Names(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    masks = []
    for contest in contests:
        kind = values[contest.product].dtype or ir.DataType.FLOAT
        zeros = np.zeros(len(contest.order), kind.numpy())
        mask = new_initializer(model, taken.value("absent"), zeros)
        for name in dict.fromkeys((contest.product, contest.topk)):
            value = values[name]
            added = _as_type(model, mask, kind, value, taken)
            total = ir.node("Add", [value, added])
            total.outputs[0].name = taken.value("present")
            producer, readers = value.producer(), list(value.uses())
            assert producer is not None
            model.graph.insert_after(producer, total)
            for node, place in readers:
                if node is not total:
                    node.replace_input_with(place, total.outputs[0])
        masks.append(mask.name or "")
    return masks


def _as_type(
    model: ir.Model, mask: ir.Value, kind: ir.DataType, value: ir.Value, taken: Names
) -> ir.Value:
    """The mask in the type of a value: scores are often cast on their way to TopK."""
    if value.dtype in (kind, None):
        return mask
    cast = ir.node("Cast", [mask], {"to": value.dtype})
    cast.outputs[0].name = taken.value("absent_cast")
    producer = value.producer()
    assert producer is not None
    model.graph.insert_before(producer, cast)
    return cast.outputs[0]
