"""Which experts the outputs miss least, measured.

The model runs without an expert of a mixture, and the loss of its outputs counts: divergence where
they are logits or probabilities. How often an expert is chosen says less: two that do the same work
are both chosen often, and each can stand in for the other one. After one is gone, the best few of
its mixture are measured again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.model import copy_model
from onnxcomp.passes.ir.traversal import Names, new_initializer
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Contest", "can_measure", "least_missed"]

# Inputs that outputs are compared on.
_PROBES = 16

# Experts of a mixture that are measured again when one of it is gone.
_AGAIN = 4

# Experts of a mixture that are tried, for each that goes and at least: those chosen least.
_TRIED, _FEWEST = 2, 16

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
) -> list[tuple[list[int], float]]:
    """Experts that go, of each mixture, in their order, and the loss of outputs behind the last.

    Args:
        model: A model with named values; only read.
        contests: Mixtures of its main graph.
        feeds: Calibration data. Outputs are compared on inputs that fits set aside.

    Raises:
        ModelError: The model does not run.
    """
    copy = copy_model(model)
    masks = _with_masks(copy, contests)
    gone: list[list[int]] = [[] for _ in contests]
    behind = [0.0] * len(contests)
    with tempfile.TemporaryDirectory() as folder:
        race = _Race(OutputLoss(copy, masks, feeds, _PROBES, Path(folder)), masks, contests)
        tried = [(at, e) for at, own in enumerate(contests) if own.count for e in own.tried]
        known = race.losses(gone, tried)
        while known:
            at, expert = min(known, key=lambda pair: (known[pair], pair))
            gone[at].append(expert)
            behind[at] = known.pop((at, expert))
            own = sorted((p for p in known if p[0] == at), key=lambda pair: (known[pair], pair))
            if len(gone[at]) == contests[at].count:
                known = {pair: loss for pair, loss in known.items() if pair[0] != at}
            else:
                known |= race.losses(gone, own[:_AGAIN])
    return list(zip(gone, behind, strict=True))


class _Race:
    """Losses of the outputs without some experts."""

    def __init__(self, loss: OutputLoss, masks: Sequence[str], contests: Sequence[Contest]) -> None:
        self._loss, self._masks = loss, masks
        self._sizes = [len(contest.order) for contest in contests]

    def losses(
        self, gone: Sequence[Sequence[int]], pairs: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], float]:
        """For each expert of a mixture, the loss without it and without those that are gone."""
        closed = {at: self._mask(at, own) for at, own in enumerate(gone) if own}
        found = {}
        for at, expert in pairs:
            without = closed | {at: self._mask(at, [*gone[at], expert])}
            changed = {self._masks[place]: mask for place, mask in without.items()}
            found[at, expert] = self._loss(changed)
        return found

    def _mask(self, at: int, absent: Sequence[int]) -> Array:
        mask = np.zeros(self._sizes[at], np.float32)
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
