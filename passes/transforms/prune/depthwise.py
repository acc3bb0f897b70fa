"""Depthwise convolutions behind pruned layers: each filter is fitted to what it reads now.

They sum over no channels, so pruning takes whole filters and leaves the others as they were. What
those read has changed. A filter has few numbers, so all of them are fitted by least squares at
once, and each keeps its fit only where held-out data say so.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.im2col import Patches, patches, windows
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.norms import behind
from onnxcomp.passes.weight import Array

__all__ = ["Depthwise", "FilterSums", "best_filters", "find_depthwise"]

# Shrinkage towards the original filter, as a share of the mean diagonal of the moments.
_SHRINK = 0.01


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Depthwise:
    """A convolution with filters for each channel.

    Attributes:
        node: The convolution.
        weight: Its filters, an initializer ``(channels * filters, 1, *window)``.
        bias: What is added to the outputs, an initializer, if there is one.
        cut: How it cuts its input.
        channels: Channels of its input.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    cut: Patches
    channels: int

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.weight.name or ""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values to observe."""
        value = self.node.inputs[0]
        assert value is not None
        return (value.name or "",)

    def stored(self) -> Array:
        """Filters and, behind them, offsets: float64 ``(channels, filters, window + 1)``."""
        assert self.weight.const_value is not None
        weight = np.asarray(self.weight.const_value.numpy(), np.float64)
        flat = weight.reshape(self.channels, -1, int(np.prod(self.cut.kernel)))
        offsets = np.zeros(flat.shape[:2])
        if self.bias is not None and self.bias.const_value is not None:
            offsets = np.asarray(self.bias.const_value.numpy(), np.float64).reshape(offsets.shape)
        return np.concatenate([flat, offsets[..., None]], axis=2)

    def vectors(self, array: Array) -> Array:
        """Windows of a value of the input and a one behind each: ``(channels, n, window + 1)``."""
        flat = patches(array.astype(np.float32, copy=False), self.cut)
        x = flat.reshape(len(flat), self.channels, -1).transpose(1, 0, 2)
        return np.concatenate([x, np.ones((*x.shape[:2], 1), np.float32)], axis=2)


class FilterSums:
    """Sums over windows of a depthwise convolution and what its outputs should be.

    Args:
        shape: ``(channels, filters, window + 1)``.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        channels, filters, length = shape
        self.count = 0
        self.gram = np.zeros((channels, length, length))
        self.cross = np.zeros((channels, filters, length))
        self.power = np.zeros((channels, filters))

    def add(self, x: Array, target: Array) -> None:
        """Add windows ``(channels, n, window + 1)`` with outputs ``(channels, n, filters)``."""
        self.count += x.shape[1]
        self.gram += x.transpose(0, 2, 1) @ x
        self.cross += target.transpose(0, 2, 1) @ x
        self.power += np.square(target, dtype=np.float64).sum(axis=1)

    def errors(self, filters: Array) -> Array:
        """Sum of the squared errors of each filter, ``(channels, filters)``."""
        along = (filters * self.cross).sum(axis=2)
        return np.asarray(self.power - 2 * along + ((filters @ self.gram) * filters).sum(axis=2))


def best_filters(
    filters: Array, seen: FilterSums, held: FilterSums, *, biased: bool
) -> tuple[Array, float, float]:
    """The fit of each filter, where it does better on held-out data; else the filter.

    Args:
        filters: As they are, ``(channels, filters, window + 1)``.
        seen: Sums over calibration data.
        held: Sums over held-out data.
        biased: Whether offsets may change.

    Returns:
        The filters, and the relative squared error of all outputs on held-out data, before and
        after.
    """
    size = filters.shape[2] if biased else filters.shape[2] - 1
    gram, cross = seen.gram[:, :size, :size], seen.cross[..., :size]
    if not biased:  # an offset that stays is taken off the wanted outputs
        cross = cross - filters[..., size:] * seen.gram[:, None, size, :size]
    mean = np.trace(gram, axis1=1, axis2=2) / size
    least = _SHRINK * np.where(mean > 0.0, mean, 1.0)[:, None, None]
    start = filters[..., :size]
    solved = np.linalg.solve(
        gram + least * np.eye(size), (cross + least * start).transpose(0, 2, 1)
    ).transpose(0, 2, 1)
    fitted = np.concatenate([solved, filters[..., size:]], axis=2)
    before, after = held.errors(filters), held.errors(fitted)
    better = (after < before) & np.isfinite(fitted).all(axis=2)
    power = max(float(held.power.sum()), 1e-30)
    found = np.where(better[..., None], fitted, filters)
    kept = np.where(better, after, before)
    return found, float(before.sum()) / power, float(kept.sum()) / power


def find_depthwise(analysis: Analysis, gone: Array) -> list[Depthwise]:
    """Depthwise convolutions behind something that goes, ``gone[class]``."""
    found = []
    for node in behind(analysis, gone):
        made = _depthwise(analysis, node) if node.op_type == "Conv" else None
        if made is not None:
            found.append(made)
    return found


def _depthwise(analysis: Analysis, node: ir.Node) -> Depthwise | None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or not _is_own(weight):
        return None
    shape = analysis.seen.shapes.get(weight.name or "", ())
    groups = node.attributes.get_int("group", 1)
    if groups < 2 or len(shape) < 3 or shape[1] != 1:
        return None
    cut = windows(node, tuple(shape[2:]))
    if cut is None:
        return None
    return Depthwise(
        node, weight, bias if bias is not None and _is_own(bias) else None, cut, groups
    )


def _is_own(value: ir.Value) -> bool:
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and len(value.uses()) == 1
    )
