"""BatchNormalization behind pruned layers: statistics that go with what it reads now.

A layer that lost inputs gives its outputs another mean and another variance. The stored statistics
follow by as much as both moved on the calibration data, so that data which are not quite those of
the training do no harm. Held-out data decide, as they do for products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.walk import CARRIED, CONSUMED, Member
from onnxcomp.passes.weight import Array

__all__ = ["ChannelSums", "Norm", "Statistics", "behind", "best_statistics", "find_norms"]

# How much a variance may change at most; beyond that the data are not enough to know it.
_MOST = 16.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A BatchNormalization node with stored statistics.

    Attributes:
        node: The node.
        mean: The initializer with the means, float ``(channels,)``.
        variance: The initializer with the variances.
        classes: For each channel its class; None where its channels have none.
    """

    node: ir.Node
    mean: ir.Value
    variance: ir.Value
    classes: Array | None

    @property
    def name(self) -> str:
        """Name of the means."""
        return self.mean.name or ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values to observe."""
        value = self.node.inputs[0]
        assert value is not None
        return (value.name or "",)

    def channels(self, array: Array) -> Array:
        """A value ``(n, channels, ...)`` as ``(channels, positions)``."""
        return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)

    @property
    def epsilon(self) -> float:
        """What is added to a variance."""
        return float(self.node.attributes.get_float("epsilon", 1e-5))

    @property
    def scale(self) -> Array:
        """Scales of the channels, float64; ones where they are not constants."""
        value = self.node.inputs[1]
        if value is None or value.const_value is None:
            return np.ones(len(_numbers(self.mean)))
        return _numbers(value)

    def statistics(self) -> Statistics:
        """What is stored."""
        return Statistics(_numbers(self.mean), _numbers(self.variance))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Means and variances of channels, float64 ``(channels,)`` each."""

    mean: Array
    variance: Array


class ChannelSums:
    """Sums over the positions of a value ``x`` and of the same value ``t`` of the dense model.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self._sums = np.zeros((5, channels))

    def add(self, x: Array, t: Array) -> None:
        """Add values ``(channels, positions)``."""
        x, t = x.astype(np.float64), t.astype(np.float64)
        self.count += x.shape[1]
        self._sums += [part.sum(axis=1) for part in (x, x * x, t, t * t, x * t)]

    @property
    def means(self) -> tuple[Array, ...]:
        """Means of x, x^2, t, t^2 and xt."""
        return tuple(self._sums / max(1, self.count))


def find_norms(analysis: Analysis, gone: Array) -> list[Norm]:
    """Nodes behind something that goes, ``gone[class]``, whose statistics may be written anew."""
    bound = {m.value: m for m in analysis.members if m.role == CARRIED and m.input_index in (3, 4)}
    return [
        Norm(node, *_stored(node), _classes(analysis, node, bound))
        for node in behind(analysis, gone)
        if node.op_type == "BatchNormalization"
        and not node.attributes.get_int("training_mode", 0)
        and all(_is_own(value, bound) for value in node.inputs[3:5])
    ]


def _stored(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    mean, variance = node.inputs[3], node.inputs[4]
    assert mean is not None and variance is not None
    return mean, variance


def _is_own(value: ir.Value | None, bound: Mapping[ir.Value, Member]) -> bool:
    if value is None or value.const_value is None or len(value.uses()) != 1:
        return False
    return not value.is_graph_input() or value in bound


def _classes(analysis: Analysis, node: ir.Node, bound: Mapping[ir.Value, Member]) -> Array | None:
    member = bound.get(_stored(node)[0])
    return None if member is None else analysis.classes(member.atoms)


def behind(analysis: Analysis, gone: Array) -> list[ir.Node]:
    """Nodes whose inputs change when classes go, in graph order."""
    losing = {
        member.node
        for member in analysis.members
        if member.role == CONSUMED and gone[analysis.classes(member.atoms)].any()
    }
    changed: set[ir.Value] = set()
    found = []
    for node in analysis.model.graph:
        reads = any(value in changed for value in node.inputs if value is not None)
        if reads:
            found.append(node)
        if reads or node in losing:
            changed.update(node.outputs)
    return found


def _numbers(value: ir.Value) -> Array:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float64)


def _error(norm: Norm, other: Statistics, held: ChannelSums, kept: Array) -> tuple[float, float]:
    """Squared error of the kept outputs on held-out data, and power of the dense ones."""
    x, xx, t, tt, xt = held.means
    stored, power = norm.statistics(), np.square(norm.scale)
    dense = 1 / np.sqrt(stored.variance + norm.epsilon)
    own = 1 / np.sqrt(other.variance + norm.epsilon)
    shift = dense * stored.mean - own * other.mean
    error = own**2 * xx - 2 * own * dense * xt + dense**2 * tt
    error += shift**2 + 2 * shift * (own * x - dense * t)
    whole = dense**2 * (tt - 2 * stored.mean * t + stored.mean**2)
    return float((power * error)[kept].sum()), float((power * whole)[kept].sum())


def best_statistics(
    norm: Norm, seen: ChannelSums, held: ChannelSums, gone: Array, *, means_only: bool = False
) -> tuple[Statistics, float, float, str]:
    """The statistics that do best on held-out data; those stored are among the choices.

    Args:
        norm: The node.
        seen: Sums over calibration data.
        held: Sums over held-out data.
        gone: Which classes go.
        means_only: Leave variances as they are.

    Returns:
        Statistics, relative squared error of the outputs with the stored ones and with these, and
        "stored", "means" or "statistics".
    """
    stored = norm.statistics()
    x, xx, t, tt, _ = seen.means
    variances = np.maximum(xx - x * x, 0.0), np.maximum(tt - t * t, 0.0)
    least = 1e-12 + 1e-6 * stored.variance
    ratio = np.clip((variances[0] + least) / (variances[1] + least), 1 / _MOST, _MOST)
    moved = stored.mean + x - t
    choices = {"stored": stored, "means": Statistics(moved, stored.variance)}
    if not means_only:
        choices["statistics"] = Statistics(moved, stored.variance * ratio)
    kept = np.ones(len(x), bool) if norm.classes is None else ~gone[norm.classes]
    errors = {name: _error(norm, other, held, kept) for name, other in choices.items()}
    finite = {name: error for name, (error, _) in errors.items() if np.isfinite(error)}
    used = min(finite, key=lambda name: finite[name]) if finite else "stored"
    power = max(errors["stored"][1], 1e-30)
    return choices[used], errors["stored"][0] / power, errors[used][0] / power, used
