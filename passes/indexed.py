"""Store weights that a graph gathers from a shared array in a few numbers instead of an index each.

``Mul(Mul(Gather(memory, index), sign), scale) -> Mul(Mul(Gather(memory, starts + 0..r-1), unpacked
bits), scale)``: implementations of parameter sharing (ROAST, HashedNets) export an int64 index and
a float32 sign for every weight, 12 bytes where the dense weight has 4. Indices come in runs of
consecutive entries; a run is stored by its start, a sign by a bit. What replaces them are standard
operators on constants, which a session folds when it starts; every weight keeps its bits. Visits
the main graph; subgraphs and functions are not visited.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.graph import Change
from onnxcomp.passes.scopes import (
    LISTING_IR,
    Names,
    default_opset,
    is_default_domain,
    new_initializer,
    remove_dead,
    remove_initializer,
    replace_value,
)
from onnxcomp.passes.settings import Settings

__all__ = ["IndexedWeights"]

Array = npt.NDArray[Any]

# Cuts with more pieces than this are stored as equal runs.
_MOST_SLICES = 64

# Operators that move or shape values and take what else they need as constants.
_SHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")


@dataclasses.dataclass(frozen=True, slots=True)
class _Weight:
    """A weight as the graph makes it.

    Attributes:
        value: The value that its consumers read.
        memory: The shared array, a vector.
        index: Entry of each weight, int64, in the weight's shape.
        negative: Where its sign is a minus; None for no signs.
        factors: Numbers it is multiplied by after that, one by one.
    """

    value: ir.Value
    memory: ir.Value
    index: Array
    negative: Array | None
    factors: tuple[np.float32, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Chain:
    """What is known at one value on the way from the look-up to the weight."""

    index: Array
    sign: Array | None
    factors: tuple[np.float32, ...]


class IndexedWeights:
    """Replace tables of indices by runs."""

    name: ClassVar[str] = "indexed_weights"
    requires: ClassVar[tuple[str, ...]] = ()
    subgraphs: ClassVar[bool] = False
    functions: ClassVar[bool] = False

    def wanted(self, settings: Settings) -> bool:
        """Where weights may be stored in another way."""
        return bool({"auto", "hash"} & set(settings.method))

    def run(self, model: ir.Model, context: Any) -> Change:
        """``Gather(memory, index) -> Gather(memory, starts + 0..r-1)`` where that is smaller."""
        opset = default_opset(model)
        if opset is None or opset < 9:
            return Change(0, ())
        work = _Writer(model, opset)
        least = context.settings.min_size
        found = [weight for weight in _weights(model) if weight.index.nbytes >= least]
        notes = [note for weight in found if (note := work.replace(weight))]
        if notes:
            context.facts[self.name] = {"weights": len(notes)}
        return Change(len(notes), tuple(notes))


def _weights(model: ir.Model) -> Iterator[_Weight]:
    """Weights that are looked up in a vector by constant indices."""
    listed = set() if model.ir_version < LISTING_IR else set(model.graph.inputs)
    for node in list(model.graph):
        if node.op_type not in ("Gather", "GatherND") or not is_default_domain(node.domain):
            continue
        if len(node.inputs) != 2:
            continue
        memory, given = node.inputs
        values = None if memory is None or memory in listed else _constant(memory)
        index = None if given is None or given in listed else _constant(given)
        if values is None or index is None or values.dtype != np.float32:
            continue
        if values.ndim != 1 or index.dtype != np.int64 or not index.size or not values.size:
            continue
        if node.op_type == "GatherND":
            if index.shape[-1:] != (1,) or node.attributes.get_int("batch_dims", 0) != 0:
                continue
            index = index[..., 0]
        index = np.where(index < 0, index + len(values), index)
        if index.min() < 0 or index.max() >= len(values):
            continue
        assert memory is not None
        yield _followed(node.outputs[0], memory, _Chain(index, None, ()), listed)


def _followed(value: ir.Value, memory: ir.Value, chain: _Chain, listed: set[ir.Value]) -> _Weight:
    """Follow a value through shapes, signs and scales, as far as nobody else reads it."""
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        node = uses[0].node
        further = _step(node, value, chain, listed)
        if further is None:
            break
        value, chain = node.outputs[0], further
    negative = None if chain.sign is None else chain.sign < 0
    return _Weight(value, memory, chain.index, negative, chain.factors)


def _step(node: ir.Node, value: ir.Value, chain: _Chain, listed: set[ir.Value]) -> _Chain | None:
    """What is known behind a node; None where it does more than move and scale."""
    if not is_default_domain(node.domain):
        return None
    if node.op_type == "Mul":
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        constant = None if other is None or other in listed else _constant(other)
        return None if constant is None else _multiplied(chain, constant)
    if node.op_type not in _SHAPING or node.inputs[0] is not value:
        return None
    index = _shaped(node, chain.index)
    if index is None:
        return None
    sign = None if chain.sign is None else _shaped(node, chain.sign)
    return _Chain(index, sign, chain.factors)


def _multiplied(chain: _Chain, constant: Array) -> _Chain | None:
    """Behind a product with signs, or with one number."""
    if constant.dtype != np.float32:
        return None
    shape = chain.index.shape
    if constant.size == 1 and constant.ndim <= chain.index.ndim:
        return dataclasses.replace(chain, factors=(*chain.factors, np.float32(constant.flat[0])))
    if np.abs(constant).min() != 1 or np.abs(constant).max() != 1:
        return None
    if np.broadcast_shapes(shape, constant.shape) != shape:
        return None
    sign = np.broadcast_to(constant, shape)
    return dataclasses.replace(chain, sign=sign if chain.sign is None else chain.sign * sign)


def _shaped(node: ir.Node, array: Array) -> Array | None:
    """A node that moves values, applied to an array; None where its constants are unknown."""
    extra = [None if value is None else _constant(value) for value in node.inputs[1:]]
    if any(item is None for item in extra):
        return None
    arguments = [np.asarray(item).tolist() for item in extra]
    axes = node.attributes.get_ints("axes", None) or (arguments[0] if arguments else None)
    if node.op_type == "Identity":
        return array
    if node.op_type == "Transpose":
        return array.transpose(node.attributes.get_ints("perm", None))
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1) % (array.ndim + 1)
        return array.reshape(math.prod(array.shape[:axis]), -1)
    if node.op_type == "Reshape":
        if node.attributes.get_int("allowzero", 0) or not arguments:
            return None
        target = [array.shape[i] if size == 0 else size for i, size in enumerate(arguments[0])]
        return array.reshape(target)
    if node.op_type == "Unsqueeze":
        return None if axes is None else np.expand_dims(array, tuple(axes))
    return array.squeeze(None if axes is None else tuple(axes))


def _constant(value: ir.Value) -> Array | None:
    """The array of an initializer or Constant, also behind shaping nodes; None for others."""
    if value.const_value is not None and value.is_initializer():
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or not is_default_domain(node.domain):
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    if node.op_type in _SHAPING and node.inputs[0] is not None:
        inner = _constant(node.inputs[0])
        return None if inner is None else _shaped(node, inner)
    return None


def _runs(index: Array) -> Array:
    """Where runs of consecutive entries begin in a flat index."""
    return np.concatenate([[0], np.flatnonzero(np.diff(index) != 1) + 1])


def _best_order(index: Array) -> tuple[tuple[int, ...], Array]:
    """The order of axes in which a table has the fewest runs, and the table in it, flat."""
    orders = [tuple(range(index.ndim))]
    if index.ndim == 2:
        orders.append((1, 0))
    flat = [index.transpose(order).reshape(-1) for order in orders]
    best = min(range(len(orders)), key=lambda i: len(_runs(flat[i])))
    return orders[best], flat[best]


class _Writer:
    """Writes weights in their new form."""

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model = model
        self._opset = opset
        self._names = Names(model)
        self._anchor: ir.Node | None = None
        self._label = ""

    def replace(self, weight: _Weight) -> str:
        """Put runs in the place of a table; returns what was done, "" where it does not pay."""
        order, flat = _best_order(weight.index)
        starts = _runs(flat)
        step = int(np.gcd.reduce(np.concatenate([starts[1:], [len(flat)]])))
        sliced = len(starts) <= _MOST_SLICES
        stored = 16 * len(starts) if sliced else 4 * (len(flat) // step)
        stored += 0 if weight.negative is None else len(flat) // 8
        if stored >= 8 * len(flat):
            return ""
        producer = weight.value.producer()
        assert producer is not None
        self._anchor = producer
        self._label = weight.value.name or "weight"
        memory = weight.memory
        made = self._slices(memory, flat, starts) if sliced else self._gather(memory, flat, step)
        if weight.negative is not None:
            made = self._signed(made, weight.negative.transpose(order).reshape(-1))
        for factor in weight.factors:
            made = self._node("Mul", made, self._tensor("scale", np.array(factor, np.float32)))
        shape = weight.index.transpose(order).shape
        made = self._node("Reshape", made, self._tensor("shape", np.array(shape, np.int64)))
        if order != tuple(range(len(order))):
            made = self._node("Transpose", made, perm=ir.AttrInt64s("perm", list(order)))
        replace_value(weight.value, made)
        self._clean(producer)
        return f"{self._label}: {len(starts)} runs for {len(flat)} indices"

    def _slices(self, memory: ir.Value, flat: Array, starts: Array) -> ir.Value:
        """Pieces of the memory, one behind the other."""
        ends = np.concatenate([starts[1:], [len(flat)]])
        pieces = []
        for begin, end in zip(starts, ends, strict=True):
            bounds = [int(flat[begin]), int(flat[begin]) + int(end - begin)]
            if self._opset >= 10:
                given = [self._tensor("bound", np.array([bound], np.int64)) for bound in bounds]
                pieces.append(self._node("Slice", memory, *given))
            else:
                pieces.append(
                    self._node(
                        "Slice",
                        memory,
                        starts=ir.AttrInt64s("starts", bounds[:1]),
                        ends=ir.AttrInt64s("ends", bounds[1:]),
                    )
                )
        if len(pieces) == 1:
            return pieces[0]
        return self._node("Concat", *pieces, axis=ir.AttrInt64("axis", 0))

    def _gather(self, memory: ir.Value, flat: Array, step: int) -> ir.Value:
        """Runs of one length, by their starts."""
        starts = self._tensor("starts", flat[::step].astype(np.int32)[:, None])
        index = starts
        if step > 1:
            places = self._tensor("places", np.arange(step, dtype=np.int32)[None])
            index = self._node("Add", starts, places)
        rows = self._node("Gather", memory, index, axis=ir.AttrInt64("axis", 0))
        return self._node("Reshape", rows, self._tensor("flat", np.array([-1], np.int64)))

    def _signed(self, value: ir.Value, negative: Array) -> ir.Value:
        """Times -1 where a bit is set; eight bits a byte, the lowest first."""
        packed = np.packbits(negative, bitorder="little")[:, None]
        octets = self._tensor("signs", packed)
        octets = self._node("Cast", octets, to=ir.AttrInt64("to", int(ir.DataType.INT32)))
        powers = self._tensor("powers", (1 << np.arange(8, dtype=np.int32))[None])
        two = self._tensor("two", np.array(2, np.int32))
        shifted = self._node("Div", octets, powers)
        rest = self._node("Mul", self._node("Div", shifted, two), two)
        bits = self._node("Sub", shifted, rest)
        twice = self._node("Mul", bits, two)
        one = self._tensor("one", np.array(1, np.int32))
        signs = self._node("Sub", one, twice)
        signs = self._node("Cast", signs, to=ir.AttrInt64("to", int(ir.DataType.FLOAT)))
        flat = self._node("Reshape", signs, self._tensor("flat", np.array([-1], np.int64)))
        if negative.size % 8:
            flat = self._cut(flat, negative.size)
        return self._node("Mul", value, flat)

    def _cut(self, value: ir.Value, size: int) -> ir.Value:
        if self._opset >= 10:
            bounds = [self._tensor("bound", np.array([b], np.int64)) for b in (0, size)]
            return self._node("Slice", value, *bounds)
        return self._node(
            "Slice",
            value,
            starts=ir.AttrInt64s("starts", [0]),
            ends=ir.AttrInt64s("ends", [size]),
        )

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: ir.Attr) -> ir.Value:
        name = self._names.node(f"{self._label}/{op_type}")
        node = ir.Node("", op_type, inputs, list(attributes.values()), name=name)
        node.outputs[0].name = self._names.value(name)
        assert self._anchor is not None and self._anchor.graph is not None
        self._anchor.graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def _tensor(self, role: str, array: Array) -> ir.Value:
        name = self._names.value(f"{self._label}::{role}")
        return new_initializer(self._model, name, np.ascontiguousarray(array).reshape(array.shape))

    def _clean(self, last: ir.Node) -> None:
        """Remove the nodes and tables that made the weight before."""
        dead, tables = [last], []
        for node in dead:
            for value in node.inputs:
                producer = None if value is None else value.producer()
                if producer is not None and producer not in dead:
                    dead.append(producer)
                elif value is not None and value.is_initializer():
                    tables.append(value)
        remove_dead(dead)
        for value in tables:
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                remove_initializer(value)
