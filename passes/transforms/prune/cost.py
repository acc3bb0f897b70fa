"""What a model costs while it loses channels: parameters, FLOPs and bytes of caches."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import Cost
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.groups import Groups
from onnxcomp.passes.transforms.prune.observed_shapes import ObservedShapes
from onnxcomp.passes.weight import Array

__all__ = ["Ledger", "measure"]

# Operators of attention on queries, keys and values, and where each reads a cache of keys.
_ATTENTION = {"MultiHeadAttention": 6, "Attention": 4, "GroupQueryAttention": 3}

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "FusedConv", "Attention")


def measure(model: ir.Model, seen: ObservedShapes) -> Cost:
    """Parameters, FLOPs and cache bytes of a model with known sizes."""
    floats = [
        value.const_value.size
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    ]
    flops = sum(_flops(node, seen) for node in model.graph)
    return Cost(int(sum(floats)), flops, _cache_bytes(model))


def _shape(seen: ObservedShapes, value: ir.Value | None) -> tuple[int, ...]:
    return seen.shapes.get((value.name or "") if value is not None else "", ())


def _flops(node: ir.Node, seen: ObservedShapes) -> int:
    """Operations of a product; attention operators count their two products of activations."""
    out, left = _shape(seen, node.outputs[0]), _shape(seen, node.inputs[0] if node.inputs else None)
    right = _shape(seen, node.inputs[1] if len(node.inputs) > 1 else None)
    if node.op_type == "MatMul" and left and right:
        return int(2 * np.prod(out) * left[-1])
    if node.op_type == "Gemm" and left:
        inner = left[0] if node.attributes.get_int("transA", 0) else left[-1]
        return int(2 * np.prod(out) * inner)
    if node.op_type in ("Conv", "FusedConv") and right:
        return int(2 * np.prod(out) * np.prod(right[1:]))
    if node.op_type == "ConvTranspose" and right:
        return int(2 * np.prod(left) * np.prod(right[1:]))
    if node.op_type == "Attention" and node.domain == "com.microsoft" and right:
        scores = 2 * left[-2] * np.prod(left[:-1]) * right[-1] * 2 // 3
        return int(2 * np.prod(left[:-1]) * np.prod(right) + scores)
    if node.op_type in _ATTENTION and left and right:
        keys = right[-2] + _past(node, seen)
        return int(2 * keys * (np.prod(left) + np.prod(out)))
    return 0


def _past(node: ir.Node, seen: ObservedShapes) -> int:
    """Steps in the cache of keys that an attention operator reads."""
    index = _ATTENTION[node.op_type]
    past = _shape(seen, node.inputs[index] if len(node.inputs) > index else None)
    return past[-2] if len(past) == 4 else 0


def _cache_bytes(model: ir.Model) -> int:
    total = 0.0
    for value in model.graph.inputs:
        shape = value.shape
        named = any(word in (value.name or "").lower() for word in ("past", "cache"))
        if named and shape is not None and value.dtype is not None and not value.is_initializer():
            fixed = [dim for dim in shape if isinstance(dim, int)]
            total += int(np.prod(fixed)) * value.dtype.itemsize
    return int(total)


@dataclasses.dataclass(slots=True, eq=False)
class _Weight:
    """An initializer that shrinks: elements, operations on them, and classes by axes."""

    name: str
    size: int
    flops: float
    axes: dict[tuple[int, ...], Array]

    def left(self, gone: Array) -> float:
        """Share of the elements that stay."""
        share = 1.0
        for classes in self.axes.values():
            share *= 1.0 - float(gone[classes].mean())
        return share


class Ledger:
    """Parameters and FLOPs of the layers that can shrink, for any choice of classes.

    Args:
        analysis: Of the model.
        groups: What can be removed.
        unit: "parameters" or "flops".
    """

    def __init__(self, analysis: Analysis, groups: Groups, unit: str = "parameters") -> None:
        self.gone = np.zeros(int(analysis.relations.classes.max(initial=-1)) + 1, bool)
        names = {name for group in groups.groups for name in group.weights}
        self._weights = [w for w in _weights(analysis) if w.name in names]
        self._unit = unit
        self._touched: dict[int, list[_Weight]] = defaultdict(list)
        for weight in self._weights:
            for own in {int(c) for axes in weight.axes.values() for c in np.unique(axes)}:
                self._touched[own].append(weight)
        self._amounts = {w.name: self._full(w) * w.left(self.gone) for w in self._weights}
        # FLOPs of the rest of the model do not change.
        self.rest = 0.0
        if unit == "flops":
            self.rest = measure(analysis.model, analysis.seen).flops - sum(self._amounts.values())
        self.whole = self.total

    def _full(self, weight: _Weight) -> float:
        return float(weight.size) if self._unit == "parameters" else weight.flops

    @property
    def total(self) -> float:
        """What is left."""
        return sum(self._amounts.values()) + self.rest

    @property
    def removed(self) -> float:
        """Share of the whole that is gone."""
        return 1.0 - self.total / self.whole if self.whole else 0.0

    def cost(self, classes: Iterable[int]) -> float:
        """What removing classes from the whole model would save."""
        own = set(classes)
        gone = np.zeros_like(self.gone)
        gone[list(own)] = True
        touched = {w.name: w for c in own for w in self._touched.get(c, ())}
        return sum(self._full(w) * (1.0 - w.left(gone)) for w in touched.values())

    def remove(self, classes: Iterable[int]) -> None:
        """Take classes out."""
        self._set(classes, gone=True)

    def restore(self, classes: Iterable[int]) -> None:
        """Put classes back."""
        self._set(classes, gone=False)

    def clear(self) -> None:
        """Put everything back."""
        self.restore(np.flatnonzero(self.gone).tolist())

    def _set(self, classes: Iterable[int], *, gone: bool) -> None:
        own = set(classes)
        self.gone[list(own)] = gone
        for weight in {w.name: w for c in own for w in self._touched.get(c, ())}.values():
            self._amounts[weight.name] = self._full(weight) * weight.left(self.gone)


def _weights(analysis: Analysis) -> list[_Weight]:
    found: dict[ir.Value, _Weight] = {}
    for member in analysis.members:
        tensor = member.value.const_value
        if tensor is None:
            continue
        if member.value not in found:
            found[member.value] = _Weight(member.value.name or "", int(tensor.size), 0.0, {})
        weight = found[member.value]
        if member.axes not in weight.axes and member.node is not None:
            weight.axes[member.axes] = analysis.classes(member.atoms)
        product = member.node is not None and member.node.op_type in _PRODUCTS
        if product and member.role != "along" and member.node is not None and not weight.flops:
            weight.flops = float(_flops(member.node, analysis.seen))
        elif product and weight.size and len(tensor.shape) > 2 and member.node is not None:
            weight.flops = weight.flops or float(_flops(member.node, analysis.seen))
    return list(found.values())
