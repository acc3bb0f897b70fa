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

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.traversal import (
    LISTING_IR,
    default_opset,
    is_default_domain,
    remove_dead,
    remove_initializer,
    replace_value,
)
from onnxcomp.passes.transforms.index_runs import IndexedWeight, RunWriter
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass

__all__ = ["SHAPING", "IndexedWeights", "constant_of", "remove_chain", "shaped"]

Array = npt.NDArray[Any]

# Operators that move or shape values and take what else they need as constants.
SHAPING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")


@dataclasses.dataclass(frozen=True, slots=True)
class _Lookup:
    """What is known at one value on the way from the look-up to the weight."""

    index: Array
    sign: Array | None
    factors: tuple[np.float32, ...]


class IndexedWeights(GraphPass):
    """Replace tables of indices by runs."""

    name: ClassVar[str] = "indexed_weights"

    def wanted(self, settings: Settings) -> bool:
        """Where weights may be stored in another way."""
        return bool({"auto", "hash"} & set(settings.method))

    def run(self, model: ir.Model, context: Context) -> Change:
        """``Gather(memory, index) -> Gather(memory, starts + 0..r-1)`` where that is smaller."""
        opset = default_opset(model)
        if opset is None or opset < 9:
            return Change(0, ())
        writer = RunWriter(model, opset)
        least = context.settings.min_size
        notes = []
        for value, weight in _weights(model):
            if weight.index.nbytes >= least and writer.nbytes(weight) < weight.index.nbytes:
                _replace(value, weight, writer)
                notes.append(f"{weight.name}: indices are stored by runs")
        return Change(len(notes), tuple(notes))


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, IndexedWeight]]:
    """Values and weights that are looked up in a vector by constant indices."""
    listed = set() if model.ir_version < LISTING_IR else set(model.graph.inputs)
    for node in list(model.graph):
        if node.op_type not in ("Gather", "GatherND") or not is_default_domain(node.domain):
            continue
        if len(node.inputs) != 2:
            continue
        memory, given = node.inputs
        values = None if memory is None or memory in listed else constant_of(memory)
        index = None if given is None or given in listed else constant_of(given)
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
        yield _followed(node.outputs[0], memory, _Lookup(index, None, ()), listed)


def _followed(
    value: ir.Value, memory: ir.Value, look_up: _Lookup, listed: set[ir.Value]
) -> tuple[ir.Value, IndexedWeight]:
    """Follow a value through shapes, signs and scales, as far as nobody else reads it."""
    while True:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            break
        node = uses[0].node
        further = _step(node, value, look_up, listed)
        if further is None:
            break
        value, look_up = node.outputs[0], further
    negative = None if look_up.sign is None else look_up.sign < 0
    name = value.name or "weight"
    return value, IndexedWeight(name, memory, look_up.index, negative, look_up.factors)


def _step(
    node: ir.Node, value: ir.Value, look_up: _Lookup, listed: set[ir.Value]
) -> _Lookup | None:
    """What is known behind a node; None where it does more than move and scale."""
    if not is_default_domain(node.domain):
        return None
    if node.op_type == "Mul":
        other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
        constant = None if other is None or other in listed else constant_of(other)
        return None if constant is None else _multiplied(look_up, constant)
    if node.op_type not in SHAPING or node.inputs[0] is not value:
        return None
    index = shaped(node, look_up.index)
    if index is None:
        return None
    sign = None if look_up.sign is None else shaped(node, look_up.sign)
    return _Lookup(index, sign, look_up.factors)


def _multiplied(look_up: _Lookup, constant: Array) -> _Lookup | None:
    """Behind a product with signs, or with one number."""
    if constant.dtype != np.float32:
        return None
    shape = look_up.index.shape
    if constant.size == 1 and constant.ndim <= look_up.index.ndim:
        return dataclasses.replace(
            look_up, factors=(*look_up.factors, np.float32(constant.flat[0]))
        )
    if np.abs(constant).min() != 1 or np.abs(constant).max() != 1:
        return None
    if np.broadcast_shapes(shape, constant.shape) != shape:
        return None
    sign = np.broadcast_to(constant, shape)
    return dataclasses.replace(look_up, sign=sign if look_up.sign is None else look_up.sign * sign)


def shaped(node: ir.Node, array: Array) -> Array | None:
    """A node that moves values, applied to an array; None where its constants are unknown."""
    extra = [None if value is None else constant_of(value) for value in node.inputs[1:]]
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
        zeros = node.attributes.get_int("allowzero", 0) != 0 and bool(arguments)
        if not arguments or (zeros and 0 in arguments[0]):
            return None
        target = [array.shape[i] if size == 0 else size for i, size in enumerate(arguments[0])]
        return array.reshape(target)
    if node.op_type == "Unsqueeze":
        return None if axes is None else np.expand_dims(array, tuple(axes))
    return array.squeeze(None if axes is None else tuple(axes))


def constant_of(value: ir.Value) -> Array | None:
    """The array of an initializer or Constant, also behind shaping nodes; None for others."""
    if value.const_value is not None and value.is_initializer():
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    if node is None or not is_default_domain(node.domain):
        return None
    if node.op_type == "Constant" and "value" in node.attributes:
        return np.asarray(node.attributes["value"].as_tensor().numpy())
    if node.op_type in SHAPING and node.inputs[0] is not None:
        inner = constant_of(node.inputs[0])
        return None if inner is None else shaped(node, inner)
    return None


def _replace(value: ir.Value, weight: IndexedWeight, writer: RunWriter) -> None:
    """Put runs in the place of a table."""
    producer = value.producer()
    assert producer is not None
    replace_value(value, writer.write(weight, producer))
    remove_chain(producer)


def remove_chain(last: ir.Node, *, listed: bool = False) -> None:
    """Remove the nodes and tables that made the weight before.

    Args:
        last: The node that made it.
        listed: Whether tables that are graph inputs as well may go.
    """
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
        bound = value.is_graph_output() or (value.is_graph_input() and not listed)
        if not value.uses() and not bound:
            remove_initializer(value)
