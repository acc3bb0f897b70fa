"""Recognise weights that a graph looks up in a memory, as modules made by `share` are exported.

``W = Mul(Slice(Reshape(Transpose(Reshape(Where(minus, Neg(T), T))))), scale)`` with
``T = Gather(memory, slots)``. The nodes are run on the numbers of entries instead of the entries,
so that it does not matter in which standard operators an exporter writes it. What comes out is
compared with the map of the hash operators. The map has a name, which the exporter keeps as that
of the table of slots or of the nodes that belong to it (`places_name`). Visits the main graph and
all subgraphs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs.hash.format import (
    TILE,
    ChunkLayout,
    Sharing,
    chunk_signs,
    places,
    to_matrix,
)
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import is_default_domain, scopes
from onnxcomp.passes.transforms.dedup_index_tables import SHAPING, constant_of, shaped
from onnxcomp.passes.weight import Array

__all__ = ["Lookup", "find_lookups", "places_name"]

_NAME = re.compile(r"(?:^|(.*)[./])places_(\d{1,10})_(\d{1,10})_(\d{1,10})_(\d{1,10})(?!\d)")

# Dimensions of the weights of products and look-ups, and of convolutions.
_WEIGHTS = (2, 4)


def places_name(sharing: Sharing) -> str:
    """What the part of a module is called that looks its weight up by this map."""
    return f"places_{sharing.base}_{sharing.run}_{sharing.rotate}_{sharing.sign}"


def _named(name: str) -> tuple[str, Sharing] | None:
    """The layer and the map that a name tells of, if it does."""
    match = _NAME.search(name)
    if match is None:
        return None
    base, run, rotate, sign = map(int, match.groups()[1:])
    try:
        sharing = Sharing.of(np.array([base, run, 0, rotate, sign, 1], np.int64))
    except ValueError:
        return None
    return (match[1] or "").strip("./").replace("/", "."), sharing


@dataclasses.dataclass(frozen=True, slots=True)
class Lookup:
    """A weight that is looked up in a memory.

    Attributes:
        value: The weight in the graph, its first dimension the rows.
        memory: The memory, an initializer of float32 ``(slots, 256)``.
        layer: Name of the layer it belongs to, if that is known.
        sharing: The map.
        shape: Shape of the weight.
        scale: Factor of its entries.
    """

    value: ir.Value
    memory: ir.Value
    layer: str
    sharing: Sharing
    shape: tuple[int, ...]
    scale: np.float32

    @property
    def geometry(self) -> ChunkLayout:
        """Sizes of the weight as a matrix, as it was trained."""
        return ChunkLayout(self.shape[0], math.prod(self.shape[1:]))


@dataclasses.dataclass(frozen=True, slots=True)
class _Trace:
    """What is known of a value on the way from the look-up to the weight.

    Attributes:
        memory: Where it is looked up.
        maps: Layers and maps that names tell of.
        entries: Number of each entry plus one, negative where its sign is a minus; int32.
        scale: What entries are multiplied by; None for nothing.
    """

    memory: ir.Value
    maps: tuple[tuple[str, Sharing], ...]
    entries: Array
    scale: np.float32 | None = None


def find_lookups(model: ir.Model, *, frozen: bool = False) -> list[Lookup]:
    """Weights that are looked up in memories by maps of the hash operators, in graph order.

    Args:
        model: The model.
        frozen: Whether nobody feeds initializers that are graph inputs as well.
    """
    listed = set() if frozen else set(model.graph.inputs)
    found: list[Lookup] = []
    for scope in scopes(model):
        for node in scope.graph:
            trace = _start(node, listed)
            if trace is not None:
                found += _followed(node.outputs[0], trace, listed)
    return found


def _followed(value: ir.Value, trace: _Trace, listed: set[ir.Value]) -> Iterator[Lookup]:
    """The weights that a look-up leads to."""
    traces, waiting = {value: trace}, [value]
    found: dict[ir.Value, Lookup] = {}
    for value in waiting:
        weight = _weight(value, traces[value])
        if weight is not None:
            found[value] = weight
        for use in value.uses():
            made = use.node.outputs[0]
            further = None if made in traces else _step(use.node, traces, listed)
            if further is not None:
                traces[made] = further
                waiting.append(made)
    return (weight for value, weight in found.items() if _final(value, found))


def _final(value: ir.Value, found: dict[ir.Value, Lookup]) -> bool:
    """Whether somebody reads this value as the weight, not to cut or scale it further."""
    if value.is_graph_output():
        return False
    return any(use.node.outputs[0] not in found for use in value.uses())


def _start(node: ir.Node, listed: set[ir.Value]) -> _Trace | None:
    """``Gather(memory, slots)``."""
    if node.op_type != "Gather" or not is_default_domain(node.domain):
        return None
    memory, table = _memory(node.inputs[0], listed), node.inputs[1]
    if memory is None or table is None or table in listed or _axis(node, 2) != 0:
        return None
    slots = constant_of(table)
    count = _slots(memory)
    if slots is None or slots.dtype.kind != "i" or not slots.size:
        return None
    if slots.min() < 0 or slots.max() >= count or count * TILE >= 2**31:
        return None
    producer = table.producer()
    names = (table.name, node.name, node.outputs[0].name, producer and producer.name)
    maps = tuple(_maps(name for name in names if name))
    if not maps:
        return None
    entries = slots[..., None].astype(np.int32) * TILE + np.arange(1, TILE + 1, dtype=np.int32)
    return _Trace(memory, maps, entries)


def _memory(value: ir.Value | None, listed: set[ir.Value]) -> ir.Value | None:
    """The memory behind a value: an initializer, or one that was cut and put together again."""
    if value is None or value in listed:
        return None
    tensor = value.const_value if value.is_initializer() else None
    if tensor is not None:
        plain = tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2
        return value if plain and tensor.shape[1] == TILE else None
    joined = value.producer()
    if joined is None or joined.op_type != "Concat" or not is_default_domain(joined.domain):
        return None
    cut = joined.inputs[0].producer() if joined.inputs[0] is not None else None
    if cut is None or cut.op_type != "Split" or not is_default_domain(cut.domain):
        return None
    same = list(joined.inputs) == list(cut.outputs) and _axis(joined, 2) == _axis(cut, 2)
    return _memory(cut.inputs[0], listed) if same else None


def _slots(memory: ir.Value) -> int:
    assert memory.const_value is not None
    return shape_of(memory.const_value)[0]


def _axis(node: ir.Node, rank: int) -> int:
    return node.attributes.get_int("axis", 0) % rank


def _step(node: ir.Node, traces: dict[ir.Value, _Trace], listed: set[ir.Value]) -> _Trace | None:
    """What is known behind a node; None where it does more than move, negate and scale."""
    if not is_default_domain(node.domain) or len(node.outputs) != 1:
        return None
    inputs = [value for value in node.inputs if value in traces]
    if not inputs or inputs[0] is None:
        return None
    value, trace = inputs[0], traces[inputs[0]]
    if node.op_type == "Neg":
        return dataclasses.replace(trace, entries=-trace.entries)
    if node.op_type == "Where":
        return _chosen(node, traces, listed)
    if node.op_type == "Mul":
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        factor = None if other is None or other in listed else constant_of(other)
        if factor is None or factor.dtype != np.float32 or factor.size != 1:
            return None
        if trace.scale is not None or factor.ndim > trace.entries.ndim:
            return None
        return dataclasses.replace(trace, scale=np.float32(factor.reshape(())))
    if node.inputs[0] is not value or any(other in listed for other in node.inputs[1:]):
        return None
    moved = None
    if node.op_type == "Slice":
        moved = _cut(node, trace.entries)
    elif node.op_type in SHAPING:
        moved = shaped(node, trace.entries)
    return None if moved is None else dataclasses.replace(trace, entries=moved)


def _chosen(node: ir.Node, traces: dict[ir.Value, _Trace], listed: set[ir.Value]) -> _Trace | None:
    """``Where(minus, -T, T)``."""
    condition, *values = node.inputs
    minus = None if condition is None or condition in listed else constant_of(condition)
    known = [traces[value] for value in values if value in traces]
    if minus is None or len(known) != 2:
        return None
    first, second = known
    if first.memory is not second.memory or first.scale != second.scale:
        return None
    if first.entries.shape != second.entries.shape:
        return None
    entries = np.where(minus, first.entries, second.entries)
    if entries.shape != first.entries.shape:
        return None
    return dataclasses.replace(second, entries=entries)


def _cut(node: ir.Node, entries: Array) -> Array | None:
    """A Slice with constant bounds, of opset 10 or later."""
    given = [None if value is None else constant_of(value) for value in node.inputs[1:]]
    if len(given) < 2 or any(item is None for item in given):
        return None
    starts, ends, *rest = [np.asarray(item).reshape(-1).tolist() for item in given]
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    slices = [slice(None)] * entries.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step <= 0:
            return None
        slices[axis] = slice(start, end, step)
    return entries[tuple(slices)]


def _weight(value: ir.Value, trace: _Trace) -> Lookup | None:
    """The weight that a value is; None where its entries are not those of a map that is named."""
    shape = trace.entries.shape
    if len(shape) not in _WEIGHTS or 0 in shape:
        return None
    matrix = trace.entries.reshape(shape[0], -1)
    geometry = ChunkLayout(*matrix.shape)
    for layer, sharing in trace.maps:
        if np.array_equal(matrix, _entries(trace.memory, geometry, sharing)):
            scale = np.float32(1) if trace.scale is None else trace.scale
            return Lookup(value, trace.memory, layer, sharing, shape, scale)
    return None


def _maps(names: Iterable[str]) -> Iterator[tuple[str, Sharing]]:
    found = (_named(name) for name in names)
    yield from dict.fromkeys(item for item in found if item is not None)


def _entries(memory: ir.Value, geometry: ChunkLayout, sharing: Sharing) -> Array:
    """Entries of a weight as `_Trace` has them, int32 ``(rows, length)``."""
    slots = places(geometry, sharing, _slots(memory)).reshape(-1, 1)
    numbers = slots.astype(np.int32) * TILE + np.arange(1, TILE + 1, dtype=np.int32)
    signs: Any = chunk_signs(geometry, sharing).reshape(-1, 1).astype(np.int32)
    return to_matrix(numbers * signs, geometry)
