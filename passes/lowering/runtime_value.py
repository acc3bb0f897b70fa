"""A value that is always 1, and that no tool can know before the model runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.manifest import shared_name
from onnxcomp.passes.ir.traversal import Names, default_opset, new_initializer
from onnxcomp.passes.lowering.builder import attribute
from onnxcomp.passes.weight import Attribute

__all__ = ["FrontNodes", "runtime_one"]

# Element types whose values can be cast to bool.
_NUMBERS = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.UINT8,
        ir.DataType.BOOL,
    }
)


class FrontNodes:
    """Makes nodes that every graph of the model sees; `place` puts them in front of all others.

    Args:
        model: The model.
        names: Names taken in it.
        notes: Metadata of each node.
    """

    def __init__(self, model: ir.Model, names: Names, notes: Mapping[str, str]) -> None:
        self._model = model
        self._names = names
        self._notes = dict(notes)
        self._nodes: list[ir.Node] = []

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Attribute | ir.Attr] | None = None,
    ) -> ir.Value:
        """Make a node with one output and return the output."""
        made = self.inner_node(op_type, inputs, attributes)
        self._nodes.append(made)
        return made.outputs[0]

    def inner_node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Attribute | ir.Attr] | None = None,
    ) -> ir.Node:
        """Make a node with one output, for a subgraph; it is placed nowhere."""
        name = self._names.node(shared_name(op_type))
        made = ir.Node(
            "",
            op_type,
            inputs,
            [
                value if isinstance(value, ir.Attr) else attribute(key, value)
                for key, value in (attributes or {}).items()
            ],
            name=name,
            metadata_props=dict(self._notes),
        )
        made.outputs[0].name = self._names.value(name)
        return made

    def ints(self, *values: int) -> ir.Value:
        """A small int64 initializer, made once in a model."""
        name = shared_name("ints." + "x".join(map(str, values)))
        known = self._model.graph.initializers.get(name)
        if known is not None:
            return known
        return new_initializer(self._model, self._names.value(name), np.array(values, np.int64))

    def place(self, behind: str | None = None) -> None:
        """Put what was made at the start of the main graph, in the order it was made.

        Args:
            behind: A key of metadata: nodes with it are left in front.
        """
        graph = self._model.graph
        earlier = [node for node in graph if behind is not None and behind in node.metadata_props]
        if self._nodes and earlier:
            graph.insert_after(earlier[-1], self._nodes)
        elif self._nodes:
            graph.insert_before(graph[0], self._nodes)
        self._nodes = []


def runtime_one(model: ir.Model, front: FrontNodes) -> ir.Value | None:
    """An int64 ``(1,)`` that is 1 at every run: max(bool(an element of an input), 1).

    Of an input whose shape is known, the first element is read, else its number of elements: a
    known shape is folded to a constant, and an unknown one may have no element.

    Args:
        model: The model, of opset 8 or later.
        front: Makes the nodes.

    Returns:
        The value; None where no input will do.
    """
    opset = default_opset(model) or 0
    for value in model.graph.inputs:
        if value.is_initializer() or value.dtype not in _NUMBERS or opset < 8:
            continue
        flag = front.node("Cast", [_element(value, front, opset)], {"to": int(ir.DataType.BOOL)})
        number = front.node("Cast", [flag], {"to": int(ir.DataType.FLOAT)})
        one = front.node("Cast", [front.ints(1)], {"to": int(ir.DataType.FLOAT)})
        return front.node(
            "Cast", [front.node("Max", [number, one])], {"to": int(ir.DataType.INT64)}
        )
    return None


def _element(value: ir.Value, front: FrontNodes, opset: int) -> ir.Value:
    """One number, ``(1,)``, that follows from what an input is fed."""
    shape = value.shape
    known = shape is not None and all(isinstance(size, int) and size > 0 for size in shape)
    if not known:
        return front.node("Reshape", [front.node("Size", [value]), front.ints(1)])
    assert shape is not None
    if not len(shape):
        return front.node("Reshape", [value, front.ints(1)])
    zeros, ones = [0] * len(shape), [1] * len(shape)
    if opset >= 10:
        corner = front.node("Slice", [value, front.ints(*zeros), front.ints(*ones)])
    else:
        corner = front.node("Slice", [value], {"starts": zeros, "ends": ones})
    return front.node("Reshape", [corner, front.ints(1)])
