"""Losses of steps as the outputs of the model show them.

The knapsack compares losses of layers, and these are errors of what is read next. How much such an
error matters to the outputs differs from layer to layer, and so does how fast it grows. So each
sequence of steps is tried at a few places: the model runs with the layers of that sequence pruned
and fitted so far, and the losses of the steps between two places are scaled to what was measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.cost import measure
from onnxcomp.passes.transforms.prune.groups import Group, Groups
from onnxcomp.passes.transforms.prune.obs import Surgeon, Unseen
from onnxcomp.passes.transforms.prune.observe import masked_members
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.transforms.prune.qk_products import silenced
from onnxcomp.passes.transforms.prune.select import Step, expected_steps, removed
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Measured", "measuring", "rescaled"]

# Where losses are measured on the way of a sequence of steps.
_PLACES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)

# Inputs that outputs are compared on, and floating-point operations that all measurements may take.
_PROBES, _WORK = 16, 2e12

# Bytes of initializers above which nothing is measured: the model is in memory once more.
_LARGEST = 1 << 30


@contextmanager
def measuring(
    analysis: Analysis,
    groups: Groups,
    consumers: Sequence[Consumer],
    feeds: Sequence[Feed],
    folder: Path | None,
    limits: tuple[float, int],
    *,
    wanted: bool,
) -> Iterator[Measured | None]:
    """What measures losses; None without data, and for models too large for it.

    Args:
        analysis: Of the model.
        groups: What may go.
        consumers: Products that may lose columns.
        feeds: Calibration data.
        folder: Where the model is written for ONNX Runtime.
        limits: Share of each group that stays, and `round_to` of `select.step_size`.
        wanted: Whether losses are to be measured at all.

    Raises:
        ModelError: The model does not run.
    """
    tensors = (value.const_value for value in analysis.model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    work = measure(analysis.model, analysis.seen).flops * len(groups.groups) * len(_PLACES)
    probes = min(_PROBES, int(_WORK / max(1, work)))
    if not (wanted and feeds and probes) or size > _LARGEST:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=folder) as place:
        names = _changeable(analysis, consumers)
        loss = OutputLoss(analysis.model, names, feeds, probes, Path(place))
        yield Measured(analysis, loss, *limits) if loss.tells else None


def _changeable(analysis: Analysis, consumers: Sequence[Consumer]) -> list[str]:
    """Initializers that are given other values when losses are measured."""
    every = np.ones(int(analysis.relations.classes.max(initial=-1)) + 1, bool)
    found = set(silenced(analysis, every, masked_members(analysis, every, set())))
    found |= {c.bias.name or "" for c in consumers if c.bias is not None}
    return [name for name in analysis.model.graph.initializers if name in found]


class Measured:
    """Measures sequences of steps, one after the other.

    Args:
        analysis: Of the model.
        loss: Measures the outputs.
        least: Share of each group that stays.
        round_to: See `select.step_size`.
    """

    def __init__(self, analysis: Analysis, loss: OutputLoss, least: float, round_to: int) -> None:
        self._analysis, self._loss = analysis, loss
        self._least, self._round_to = least, round_to

    def places(self, groups: Sequence[Group]) -> frozenset[int]:
        """After how many steps of a cluster its loss is measured."""
        return _places(expected_steps(groups, self._least, self._round_to))

    def with_fits(
        self,
        steps: Sequence[Step],
        products: Sequence[Consumer],
        surgeons: Mapping[str, Surgeon | Unseen],
    ) -> float:
        """Loss with the channels of steps gone and products as their surgeons have fitted them."""
        gone = self._gone(steps)
        found = masked_members(self._analysis, gone, set())
        for product in products:
            surgeon, name = surgeons[product.name], product.weight.name or ""
            if isinstance(surgeon, Surgeon) and name in found:
                found[name] = product.stored(found[name], surgeon.weight)
                _move_bias(product, surgeon, found)
        return self._loss(found)

    def without_positions(self, steps: Sequence[Step]) -> list[Step]:
        """Steps that take positions of queries and keys, their losses as measured."""
        marks = {
            count: self._loss(silenced(self._analysis, self._gone(steps[:count])))
            for count in _places(len(steps))
        }
        return rescaled(steps, marks)

    def _gone(self, steps: Iterable[Step]) -> Array:
        gone = np.zeros(int(self._analysis.relations.classes.max(initial=-1)) + 1, bool)
        gone[list(removed(list(steps)))] = True
        return gone


def _move_bias(product: Consumer, surgeon: Surgeon, found: dict[str, Array]) -> None:
    """Give a product the bias that makes up for the mean of what it lost."""
    if product.bias is None or product.bias.const_value is None:
        return
    name = product.bias.name or ""
    array = found.get(name, product.bias.const_value.numpy())
    found[name] = product.stored_offsets(array, product.offsets(array) + surgeon.shift)


def _places(count: int) -> frozenset[int]:
    return frozenset(math.ceil(count * share) for share in _PLACES) if count else frozenset()


def rescaled(steps: Sequence[Step], marks: Mapping[int, float]) -> list[Step]:
    """Steps whose losses add up to what was measured after some of them.

    Args:
        steps: In their order.
        marks: By number of steps the loss behind them. A lower one than before counts as that.
    """
    found: list[Step] = []
    before, scale = 0.0, 1.0
    places = sorted(count for count in marks if 0 < count <= len(steps))
    for start, stop in itertools.pairwise([0, *places]):
        part = steps[start:stop]
        after = max(before, marks[stop])
        scale = (after - before) / max(sum(step.loss for step in part), 1e-30)
        found += [dataclasses.replace(step, loss=scale * step.loss) for step in part]
        before = after
    return [*found, *(dataclasses.replace(s, loss=scale * s.loss) for s in steps[len(found) :])]
