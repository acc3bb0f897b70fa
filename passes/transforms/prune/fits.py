"""Fit the remaining weights after pruning, and update statistics of normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import FitReport
from onnxcomp.passes.codecs.moments import ENOUGH
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.compensate import best_fit
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.depthwise import Depthwise, best_filters, find_depthwise
from onnxcomp.passes.transforms.prune.norms import Norm, best_statistics, find_norms, nodes_behind
from onnxcomp.passes.transforms.prune.observe import Collector
from onnxcomp.passes.weight import Array, Feed

__all__ = ["make_up"]

Reports = tuple[FitReport, ...]

# Elements of a product up to which it is fitted again though it keeps all its columns: heads of
# language models, as large as all the rest, are left.
_LARGEST = 1 << 24


def make_up(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    gone: Array,
    feeds: Sequence[Feed],
    folder: Path | None = None,
    *,
    biases_only: bool = False,
    behind: bool = True,
) -> tuple[Reports, Reports]:
    """Fit what reads something else now, each behind the ones before, and write statistics anew.

    These are products that lose columns, and all products and depthwise filters behind them.

    Args:
        analysis: Of the model, whose initializers are replaced.
        consumers: Its products.
        gone: Which classes go.
        feeds: Calibration data.
        folder: Where pieces of the model are written.
        biases_only: Change biases and means only, and those of layers that lose columns alone.
        behind: Whether layers that lose nothing are fitted, too.

    Returns:
        What became of products, and of normalisations.
    """
    items: list[Consumer | Depthwise | Norm] = [*find_norms(analysis, gone)]
    if biases_only or not behind:
        items += [consumer for consumer in consumers if len(consumer.columns(gone))]
    else:
        items += [*_products(analysis, consumers, gone), *find_depthwise(analysis, gone)]
    walk = Collector(analysis, items, gone, feeds, folder)
    new = _Initializers(walk)
    fits, norms = [], []
    for item in walk.items:
        if isinstance(item, Depthwise):
            fits.append(_refit(item, walk, new))
        elif isinstance(item, Norm):
            norms.append(_follow(item, walk, new, gone, biases_only=biases_only))
        else:
            fits.append(_fit(item, walk, new, gone, biases_only=biases_only))
    new.store()
    return tuple(fits), tuple(norms)


def _products(analysis: Analysis, consumers: Sequence[Consumer], gone: Array) -> list[Consumer]:
    """Products that lose columns, and those whose inputs have changed."""
    changed = set(nodes_behind(analysis, gone))
    return [
        consumer
        for consumer in consumers
        if len(consumer.columns(gone)) or (consumer.node in changed and _is_small(consumer))
    ]


def _is_small(consumer: Consumer) -> bool:
    assert consumer.weight.const_value is not None
    return int(consumer.weight.const_value.size) <= _LARGEST


class _Initializers:
    """Initializers as they become; the model keeps its own until the walk is over."""

    def __init__(self, walk: Collector) -> None:
        self._walk = walk
        self._arrays: dict[ir.Value, Array] = {}

    def __getitem__(self, value: ir.Value) -> Array:
        if value in self._arrays:
            return self._arrays[value]
        assert value.const_value is not None
        return np.asarray(value.const_value.numpy())

    def __setitem__(self, value: ir.Value, array: Array) -> None:
        assert value.const_value is not None
        self._arrays[value] = array.astype(value.const_value.dtype.numpy())
        self._walk.replace(value.name or "", self._arrays[value])

    def store(self) -> None:
        """Write them into the model."""
        for value, array in self._arrays.items():
            assert value.const_value is not None
            value.const_value = ir.Tensor(array, dtype=value.const_value.dtype, name=value.name)


def _fit(
    consumer: Consumer, walk: Collector, new: _Initializers, gone: Array, *, biases_only: bool
) -> FitReport:
    seen, held = walk.observe(consumer)
    assert consumer.weight.const_value is not None
    weight = consumer.matrix(consumer.weight.const_value.numpy())
    bias = None
    if consumer.bias is not None and consumer.bias.const_value is not None:
        bias = consumer.offsets(consumer.bias.const_value.numpy())
    columns = consumer.columns(gone)
    fit = best_fit(weight, bias, columns, seen, held, biases_only=biases_only)
    new[consumer.weight] = consumer.stored(new[consumer.weight], fit.weight)
    if fit.bias is not None and consumer.bias is not None:
        new[consumer.bias] = consumer.stored_offsets(new[consumer.bias], fit.bias)
    few = seen.count + held.count < ENOUGH * weight.shape[1]
    return FitReport(consumer.name, fit.before, fit.after, fit.used, few)


def _refit(item: Depthwise, walk: Collector, new: _Initializers) -> FitReport:
    seen, held = walk.filters(item)
    biased = item.bias is not None
    found, before, after = best_filters(item.stored(), seen, held, biased=biased)
    if not after < before:
        return FitReport(item.name, before, before, "mask")
    new[item.weight] = found[..., :-1].reshape(new[item.weight].shape)
    if item.bias is not None:
        new[item.bias] = found[..., -1].ravel()
    return FitReport(item.name, before, after, "fit")


def _follow(
    norm: Norm, walk: Collector, new: _Initializers, gone: Array, *, biases_only: bool
) -> FitReport:
    seen, held = walk.channels(norm)
    found, before, after, used = best_statistics(norm, seen, held, gone, means_only=biases_only)
    if used != "stored":
        new[norm.mean], new[norm.variance] = found.mean, found.variance
    return FitReport(norm.name, before, after, used)
