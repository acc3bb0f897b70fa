"""Tune what is left of a pruned model, all weights together, for what the dense model computes.

Fits see one product at a time, and the errors they leave add up along the network. Here all weights
move against the gradient of one loss (Adam: Kingma and Ba, arXiv 1412.6980): the distance of the
outputs from those of the dense model, and that of the values which pruned layers hand on, as
block-wise reconstruction has it. Few inputs cannot mislead weights about the latter as they can
about outputs alone. Labels are not needed. Outputs for inputs that were set aside decide which
weights are kept.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.prune_report import TuningReport
from onnxcomp.passes.calibration.statistics import HELD_OUT, split_batches
from onnxcomp.passes.gradients.weight_gradients import Part, WeightGradients
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.weight import Array, Feed
from onnxcomp.runtime.activity import activity

__all__ = ["Effort", "tune"]

log = logging.getLogger(__name__)

# The largest step, relative to the root mean square of a tensor, the share of all steps until it is
# reached, and how much of their past the two running means of Adam keep.
_RATE, _WARM, _MEMORY = 2e-3, 0.15, (0.9, 0.99)

# What steps are multiplied by, and whether vectors alone move, one try after the other until one
# comes closer. Networks of narrow layers cannot bear that all of their weights move at once, and
# biases are too few to follow single inputs: MobileNetV2, 225 pictures, comes as close by them.
_TRIES = ((1.0, False), (0.5, True))

# Loss after a pass, relative to that before all, from which a try is given up.
_AWAY = 1.25

# Root mean square that is taken for a tensor of zeros, such as a new bias.
_LEAST = 1e-2

# What the errors of values on the way count beside those of the outputs.
_SHARE = 4.0

# Samples of one step at most, and steps of one pass at least.
_BATCH, _STEPS = 25, 16

# Share of the samples that are mixed with others, where inputs are floating point.
_MIXED = 0.5

# Passes over the data: at most so many, and none where fewer than these are within reach.
_PASSES, _FEWEST = 8, 4

# Floating-point operations of all passes together, and elements of all values of samples that run
# together, whose gradients take about as much again.
_WORK, _VALUES = 4e12, 1 << 26

# Operations of one run of the dense model and of the pruned one with its gradients, relative to
# those of the dense model.
_RUNS = 4.0

# Inputs of nodes that hold weights which may be tuned; of Add and Mul only vectors.
_WEIGHTS: Mapping[str, frozenset[int]] = {
    "Add": frozenset((0, 1)),
    "BatchNormalization": frozenset((1, 2)),
    "Conv": frozenset((1, 2)),
    "Gemm": frozenset((1, 2)),
    "LayerNormalization": frozenset((1, 2)),
    "MatMul": frozenset((0, 1)),
    "Mul": frozenset((0, 1)),
    "RMSNormalization": frozenset((1,)),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Effort:
    """How much tuning is worth its time.

    Attributes:
        passes: Passes over the data.
        samples: Samples that run together.
    """

    passes: int
    samples: int

    @classmethod
    def within_reach(cls, feeds: Sequence[Feed], flops: int, values: int) -> Effort | None:
        """What the limits allow; None where that is too little to gain by.

        Args:
            feeds: Calibration data.
            flops: Floating-point operations of the dense model on the first of them.
            values: Elements of all values of the model on the first of them.
        """
        first = max(1, _samples(feeds[0]))
        count = sum(_samples(feed) for feed in feeds)
        passes = int(_WORK * first / max(1.0, _RUNS * flops * count))
        together = _VALUES * first // max(1, values)
        if passes < _FEWEST or together < 1:
            return None
        return cls(min(passes, _PASSES), min(together, _BATCH))


def tune(
    model: ir.Model,
    reference: ir.Model,
    feeds: Sequence[Feed],
    values: Mapping[str, Part],
    effort: Effort,
    *,
    exclude: Sequence[str] = (),
    folder: Path | None = None,
) -> TuningReport | None:
    """Tune the weights of a pruned model, in place.

    Args:
        model: The pruned model.
        reference: The dense model; only read.
        feeds: Calibration data, which both models accept.
        values: Values that pruned layers hand on; see `WeightGradients`.
        effort: How much to do.
        exclude: Regular expressions of weights that stay.
        folder: Where the models are written for ONNX Runtime.

    Returns:
        What was found; None where the model has no gradients, or inputs are too few to set some
        aside. The weights stay where no pass made the loss on those smaller.
    """
    names = _tunable(model, exclude)
    vectors = [name for name in names if _array(model, name).ndim < 2]
    made = {value.name for node in model.graph for value in node.outputs}
    values = {name: part for name, part in values.items() if name in made}
    found: TuningReport | None = None
    for rate, alone in _TRIES:
        weights = {name: _Weight(_array(model, name)) for name in (vectors if alone else names)}
        try:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                run = WeightGradients(model, reference, list(weights), values, _SHARE, Path(place))
                used, held = _pieces(feeds, run, effort.samples)
                if not used or not held:
                    return None
                found = _Descent(run, weights, rate).run(used, held, effort.passes)
        except ModelError as error:
            log.info("pruned weights are not tuned: %s", error.message)
            return None
        if found.passes or not vectors:
            break
    if found is not None and found.passes:
        for name, weight in weights.items():
            model.graph.initializers[name].const_value = ir.Tensor(weight.best, name=name)
    return found


def _array(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def _tunable(model: ir.Model, exclude: Sequence[str]) -> list[str]:
    """Names of the float32 initializers that nodes read as weights and as nothing else."""
    found = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or value.is_graph_input():
            continue
        uses = tuple(value.uses())
        if any(re.search(pattern, name) for pattern in exclude) or not uses:
            continue
        if all(_is_weight(node, index, shape_of(tensor)) for node, index in uses):
            found.append(name)
    return found


def _is_weight(node: ir.Node, index: int, shape: Sequence[int]) -> bool:
    known = is_default_domain(node.domain) and index in _WEIGHTS.get(node.op_type, ())
    return known and math.prod(shape) > 1 and (node.op_type not in ("Add", "Mul") or len(shape) < 2)


def _pieces(
    feeds: Sequence[Feed], run: WeightGradients, most: int
) -> tuple[list[Feed], list[Feed]]:
    """Inputs to tune with, of few samples each, and those set aside: what fits set aside, too."""

    def parts(of: Sequence[Feed]) -> tuple[list[Feed], list[Feed]]:
        used = [feed for number, feed in enumerate(of) if number % HELD_OUT != HELD_OUT - 1]
        return used, list(of[HELD_OUT - 1 :: HELD_OUT])

    if len(feeds) < HELD_OUT:
        return parts(split_batches(feeds, run.dims, most=most))
    used, held = (split_batches(part, run.dims, most=most) for part in parts(feeds))
    return used, held


def _samples(feed: Feed) -> int:
    return max((len(array) for array in feed.values() if np.ndim(array)), default=1)


class _Weight:
    """One tensor on its way.

    Attributes:
        array: What it is now, float32.
        best: What it was when the loss was least.
    """

    def __init__(self, array: Array) -> None:
        self.array = np.array(array, np.float32)
        self.best = self.array.copy()
        self._scale = float(np.sqrt(np.square(array, dtype=np.float64).mean())) or _LEAST
        self._mean, self._square = np.zeros_like(self.array), np.zeros_like(self.array)

    def step(self, gradient: Array, rate: float, number: int) -> None:
        """One step of Adam, its number counted from 1."""
        first, second = _MEMORY
        self._mean += (1 - first) * (gradient - self._mean)
        self._square += (1 - second) * (np.square(gradient) - self._square)
        root = np.sqrt(self._square / (1 - second**number)) + 1e-12
        self.array -= (rate * self._scale / (1 - first**number)) * self._mean / root


class _Descent:
    """All weights on their way.

    Args:
        run: Gives losses and gradients.
        weights: The weights by name.
        rate: What the usual steps are multiplied by.
    """

    def __init__(self, run: WeightGradients, weights: dict[str, _Weight], rate: float) -> None:
        self._run, self._rate = run, rate
        self.weights = weights

    def run(self, used: Sequence[Feed], held: Sequence[Feed], passes: int) -> TuningReport:
        """Go through the data some times; the best weights are noted in each weight.

        They are noted in the second half, when steps are small. It ends where outputs move away.
        """
        before = best = self._loss(held)
        kept, number = 0, 0
        rng = np.random.default_rng(0)
        samples = sum(_samples(feed) for feed in used)
        count = min(len(used), max(samples // _BATCH, min(samples, _STEPS)))
        for done in range(1, passes + 1):
            for part in np.array_split(rng.permutation(len(used)), count):
                activity("tuning what is left", number, passes * count, "steps")
                number += 1
                feeds = list(_mixed([used[i] for i in part], rng))
                self._step(feeds, self._rate * _rate(number / (passes * count)), number)
            loss = self._loss(held)
            if not loss < _AWAY * before:
                break
            if 2 * done > passes and loss < best:
                best, kept = loss, done
                for weight in self.weights.values():
                    weight.best[...] = weight.array
        log.info("pruned weights tuned: held-out loss %.4g, before %.4g", best, before)
        return TuningReport(before, best, kept)

    def _arrays(self) -> dict[str, Array]:
        return {name: weight.array for name, weight in self.weights.items()}

    def _loss(self, feeds: Sequence[Feed]) -> float:
        losses = [self._run.loss_of_outputs(feed, self._arrays()) for feed in feeds]
        return float(np.average(losses, weights=[_samples(feed) for feed in feeds]))

    def _step(self, feeds: Sequence[Feed], rate: float, number: int) -> None:
        total = sum(_samples(feed) for feed in feeds)
        sums: dict[str, Array] = {}
        for feed in feeds:
            _, gradients = self._run(feed, self._arrays())
            for name, gradient in gradients.items():
                part = gradient * np.float32(_samples(feed) / total)
                sums[name] = sums[name] + part if name in sums else part
        if all(np.isfinite(gradient).all() for gradient in sums.values()):
            for name, gradient in sums.items():
                self.weights[name].step(gradient, rate, number)


def _mixed(feeds: Sequence[Feed], rng: np.random.Generator) -> Iterator[Feed]:
    """Inputs some of whose samples are weighted means of two, of the next input or the same one.

    What the dense model makes of these is as good a target as any, and few inputs become many
    (Zhang et al., arXiv 1710.09412). Integers cannot be mixed.
    """
    for number, feed in enumerate(feeds):
        other = feeds[(number + 1) % len(feeds)]
        count = _samples(feed)
        alike = all(
            array.dtype == np.float32 and np.shape(other[name]) == np.shape(array) and array.ndim
            and len(array) == count
            for name, array in feed.items()
        )  # fmt: skip
        shares = np.where(rng.random(count) < _MIXED, rng.random(count), 1.0).astype(np.float32)
        places = (np.arange(count) + int(rng.integers(0, count))) % count
        if not alike:
            yield feed
            continue
        mixed = {}
        for name, array in feed.items():
            share = shares.reshape(-1, *[1] * (array.ndim - 1))
            mixed[name] = share * array + (1 - share) * other[name][places]
        yield mixed


def _rate(place: float) -> float:
    """Size of the steps at a share of the way: it grows at first, and falls along a cosine."""
    return _RATE * min(1.0, place / _WARM) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, place)))
