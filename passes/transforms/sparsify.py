"""Zeros where they are asked for, before weights are looked for: ``W -> W * mask``."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.constants import mark_constants
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.analysis.zeros import LEAST_OPSET
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.traversal import default_opset, find_initializer
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.transforms.zeroing import ZeroingGoal, by_inputs, by_size
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["Sparsify"]

log = logging.getLogger(__name__)

_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv"))


class Sparsify(GraphPass):
    """Set a share of the weights of products to zero, or all but n of every m in a row."""

    name: ClassVar[str] = "sparsify"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Where a sparsity is given."""
        return settings.sparsity is not None

    def run(self, model: ir.Model, context: Context) -> Change:
        """``W (rows, length) -> W'`` with zeros; with inputs, each behind those that have them."""
        settings = context.settings
        assert settings.sparsity is not None
        goal = ZeroingGoal.of_text(settings.sparsity)
        opset = default_opset(model) or 0
        if opset < LEAST_OPSET:
            log.warning(
                "the model has opset %d: weights are pruned, but stored with their zeros; "
                "sparse codecs need opset %d",
                opset,
                LEAST_OPSET,
            )
        found = find_sites(
            model,
            min_size=settings.min_size,
            include=settings.include,
            exclude=settings.exclude,
            freeze_inputs=settings.freeze_inputs,
        )
        chosen = [site for site in mark_constants(model, found.sites) if _is_multiplied(site)]
        feeds = context.feeds()
        pruned = dict(_by_inputs(model, chosen, goal, feeds)) if feeds else {}
        notes = []
        for site in chosen:
            weight = read_weight(model, site)
            changed = pruned.pop(site.name) if site.name in pruned else by_size(weight, goal)
            notes.append(_note(site, weight, changed))
            _put(model, site, changed)
        return Change(len(notes), tuple(notes))


def _is_multiplied(site: WeightSite) -> bool:
    """Whether it is a trained weight that is multiplied with inputs, and nothing else is done."""
    if site.constant is not None or site.wide:
        return False
    return all(use.op_type in _PRODUCTS and use.input_index < 2 for use in site.uses)


def _by_inputs(
    model: ir.Model, sites: Sequence[WeightSite], goal: ZeroingGoal, feeds: Sequence[Feed]
) -> Iterator[tuple[str, Array]]:
    """Weights whose inputs can be observed, each behind those that have their zeros."""
    calibration = Calibration(model, feeds, sites)
    for group, stats in calibration:
        for site in group:
            changed = by_inputs(read_weight(model, site), goal, stats)
            calibration.replace(site, changed)
            yield site.name, changed


def _note(site: WeightSite, weight: Array, changed: Array) -> str:
    lost = float(np.square(weight - changed, dtype=np.float64).sum())
    power = float(np.square(weight, dtype=np.float64).sum())
    share = 1 - np.count_nonzero(changed) / site.size
    error = math.sqrt(lost / power) if power else 0.0
    return f"{site.name}: {share:.1%} of it is zero, relative error {error:.3g}"


def _put(model: ir.Model, site: WeightSite, weight: Array) -> None:
    """Store ``(rows, length)`` as the tensor of a site."""
    value = find_initializer(model, site.name)
    assert value is not None and value.const_value is not None
    dtype = value.const_value.dtype
    array = site.stored_form(weight).astype(dtype.numpy(), copy=False)
    value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)
