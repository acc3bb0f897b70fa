"""Find dense weights whose values are copies of fewer numbers, and store them by those.

``W -> Mul(Gather(memory, runs), signs)``: models that were trained with shared weights and then
folded hold plain tensors in which every absolute value occurs many times, in the same order as its
neighbours. The order is found from pairs of neighbours, then indices come in runs and are stored
as `index_runs` writes them. Every weight keeps its bits. Visits the main graph; the tensor a weight
is stored in must be float32.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.traversal import (
    Names,
    default_opset,
    initializers,
    new_initializer,
    remove_initializer,
    replace_value,
)
from onnxcomp.passes.transforms.index_runs import IndexedWeight, RunWriter
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass

__all__ = ["RepeatedValues"]

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

# A weight is stored anew where that takes at most this share of its bytes.
_WORTH = 0.5


class RepeatedValues(GraphPass):
    """Store weights of repeated values by the values and their places."""

    name: ClassVar[str] = "repeated_values"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Only where it was asked for."""
        return settings.detect_sharing

    def run(self, model: ir.Model, context: Context) -> Change:
        """``W -> Mul(Gather(memory, runs), signs)`` where that takes half of the bytes or less."""
        opset = default_opset(model)
        if opset is None or opset < 9:
            return Change(0, ())
        s: Settings = context.settings
        found = find_sites(model, min_size=s.min_size, include=s.include, exclude=s.exclude)
        tensors = initializers(model)
        writer, names, notes = RunWriter(model, opset), Names(model), []
        for site in found.sites:
            value = tensors[site.name]
            plain = site.dtype == "float32" and value.graph is model.graph
            if not plain or value.is_graph_input() or value.is_graph_output():
                continue
            note = _replace(model, value, writer, names)
            notes += [note] if note else []
        return Change(len(notes), tuple(notes))


def _replace(model: ir.Model, value: ir.Value, writer: RunWriter, names: Names) -> str:
    """Store one tensor by its values and their places; what was done, "" where it does not pay."""
    assert value.const_value is not None and value.name is not None
    weight = np.asarray(value.const_value.numpy())
    found = _memory_of(weight)
    if found is None:
        return ""
    memory, index = found
    negative = np.signbit(weight)
    entries = new_initializer(model, names.value(f"{value.name}::memory"), memory)
    signs = negative if negative.any() else None
    indexed = IndexedWeight(value.name, entries, index, signs)
    stored = memory.nbytes + writer.nbytes(indexed)
    if stored > _WORTH * weight.nbytes:
        remove_initializer(entries)
        return ""
    expanded = memory[index] * np.where(negative, np.float32(-1), np.float32(1))
    if not np.array_equal(expanded.view(np.uint32), weight.view(np.uint32)):
        raise AssertionError(f"weight {value.name!r} is not what its values expand to")
    made = writer.write(indexed, model.graph[0])
    remove_initializer(value)
    replace_value(value, made)
    note = f"{value.name}: {memory.size} values for {weight.size} weights, {stored} bytes"
    log.info("%s", note)
    return note


def _memory_of(weight: Array) -> tuple[Array, Array] | None:
    """Absolute values in an order in which they follow each other, and where each weight is.

    Returns:
        float32 (entries,) and int64 in the weight's shape; None where few values occur twice, or
        some are not finite.
    """
    bits = np.ascontiguousarray(weight).view(np.uint32) & np.uint32(0x7FFFFFFF)
    if not np.isfinite(weight).all():
        return None
    values, inverse = np.unique(bits, return_inverse=True)
    if len(values) > _WORTH * bits.size:
        return None
    inverse = inverse.reshape(weight.shape)
    orders = [inverse.reshape(-1)]
    if weight.ndim > 1:
        orders.append(inverse.reshape(len(weight), -1).T.reshape(-1))
    best, fewest = None, bits.size + 1
    for flat in orders:
        rank = _ranked(flat, len(values))
        breaks = int(np.count_nonzero(np.diff(rank[flat]) != 1))
        if breaks < fewest:
            best, fewest = rank, breaks
    assert best is not None
    memory = np.empty(len(values), np.uint32)
    memory[best] = values
    return memory.view(np.float32), best[inverse].astype(np.int64)


def _ranked(flat: Array, count: int) -> Array:
    """Places of values in an order in which as many as possible follow those they follow in `flat`.

    Args:
        flat: Numbers of values ``0 .. count - 1``, as they come.
        count: How many values there are.

    Returns:
        int64 (count,), a permutation.
    """
    pairs, uses = np.unique(flat[:-1].astype(np.int64) * count + flat[1:], return_counts=True)
    order = np.lexsort((pairs, -uses))
    left, right = pairs[order] // count, pairs[order] % count
    # The commonest successor of each value, and the commonest predecessor of each.
    after, before = np.full(count, -1, np.int64), np.full(count, -1, np.int64)
    after[left[::-1]] = right[::-1]
    before[right[::-1]] = left[::-1]
    agreed = (after >= 0) & (before[after] == np.arange(count)) & (after != np.arange(count))
    after[~agreed] = -1
    return _places(after)


def _places(after: Array) -> Array:
    """Places of values in their chains, one chain behind the other; rings are cut somewhere."""
    count = len(after)
    follows = np.zeros(count, bool)
    follows[after[after >= 0]] = True
    place, number, successor = np.full(count, -1, np.int64), 0, after.tolist()
    for begin in [*np.flatnonzero(~follows).tolist(), *range(count)]:
        at = begin
        while at >= 0 and place[at] < 0:
            place[at] = number
            number += 1
            at = successor[at]
    return place
