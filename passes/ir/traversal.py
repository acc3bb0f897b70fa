"""Walk a model's graphs, find what is in them, and edit them without breaking what users see."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.ir.tensors import shape_of

__all__ = [
    "Names",
    "Scope",
    "add_initializer",
    "default_opset",
    "find_initializer",
    "inherit_notes",
    "initializers",
    "is_default_domain",
    "new_initializer",
    "remove_dead",
    "remove_initializer",
    "rename_initializer",
    "replace_value",
    "scopes",
    "subgraphs",
]

# What the keys of our own notes on nodes start with, see `manifest`.
_OWN = "onnxcomp"

# Before this IR version every initializer had to be listed as a graph input as well.
LISTING_IR = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Scope:
    """One graph of the model.

    Attributes:
        path: "" for the main graph, else the way to the subgraph: "If_3.then_branch/Loop_1.body".
        graph: The graph.
        parent: The scope around it.
    """

    path: str
    graph: ir.Graph
    parent: Scope | None = None

    def encloses(self, other: Scope) -> bool:
        """Whether `other` is this scope or lies inside it, so that it sees this scope's values."""
        scope: Scope | None = other
        while scope is not None and scope.graph is not self.graph:
            scope = scope.parent
        return scope is not None


def is_default_domain(domain: str) -> bool:
    """Whether a domain is the standard operator set."""
    return domain in ("", "ai.onnx")


def default_opset(model: ir.Model) -> int | None:
    """Version of the standard operator set the model imports; None when it imports none."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx"))


def subgraphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Attribute name and graph of every subgraph the node holds directly."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for index, graph in enumerate(attribute.as_graphs()):
                yield f"{name}[{index}]", graph


def _inside(scope: Scope) -> Iterator[Scope]:
    yield scope
    for node in scope.graph:
        for attribute, graph in subgraphs(node):
            path = f"{node.name or node.op_type}.{attribute}"
            prefix = f"{scope.path}/" if scope.path else ""
            yield from _inside(Scope(prefix + path, graph, scope))


def scopes(model: ir.Model) -> Iterator[Scope]:
    """The main graph and every subgraph, outer before inner. Function bodies are not visited."""
    yield from _inside(Scope("", model.graph))


def initializers(model: ir.Model) -> dict[str, ir.Value]:
    """Every initializer of the main graph and all subgraphs, by name."""
    return {
        name: value
        for scope in scopes(model)
        for name, value in scope.graph.initializers.items()
        if value.const_value is not None
    }


def find_initializer(model: ir.Model, name: str) -> ir.Value | None:
    """The initializer of a name, in whatever graph; None when there is none."""
    for scope in scopes(model):
        value = scope.graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            return value
    return None


class Names:
    """The names taken in a model, and new ones.

    Value names are unique over all graphs, so that a new value never hides another; node names
    likewise.
    """

    def __init__(self, model: ir.Model) -> None:
        self._values: set[str] = set()
        self._nodes: set[str] = set()
        for scope in scopes(model):
            values = [*scope.graph.inputs, *scope.graph.initializers.values()]
            for node in scope.graph:
                self._nodes.add(node.name or "")
                values += node.outputs
            self._values.update(value.name or "" for value in values)

    @staticmethod
    def _fresh(taken: set[str], wanted: str) -> str:
        name, count = wanted, 1
        while not name or name in taken:
            count += 1
            name = f"{wanted}_{count}"
        taken.add(name)
        return name

    def value(self, wanted: str) -> str:
        """A free name for a value: `wanted`, or `wanted` with a number."""
        return self._fresh(self._values, wanted)

    def node(self, wanted: str) -> str:
        """A free name for a node: `wanted`, or `wanted` with a number."""
        return self._fresh(self._nodes, wanted)


def add_initializer(model: ir.Model, value: ir.Value) -> None:
    """Add an initializer to the main graph; before IR 4 it becomes a listed input as well."""
    model.graph.register_initializer(value)
    if model.ir_version < LISTING_IR:
        model.graph.inputs.append(value)


def new_initializer(
    model: ir.Model, name: str, content: npt.NDArray[Any] | ir.TensorProtocol
) -> ir.Value:
    """Make an initializer of the main graph.

    Args:
        model: The model.
        name: A name that is free in it.
        content: An array, which is wrapped and not copied (it may be mapped from a file, or be
            virtual), or a tensor.

    Returns:
        Its value.
    """
    tensor = ir.Tensor(content, name=name) if isinstance(content, np.ndarray) else content
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(shape_of(tensor)),
        const_value=tensor,
    )
    add_initializer(model, value)
    return value


def remove_initializer(value: ir.Value) -> None:
    """Remove an initializer, and its listing as an input, from its graph."""
    graph = value.graph
    if graph is None or value.name is None:
        return
    if value.is_graph_input():
        graph.inputs.remove(value)
    graph.initializers.pop(value.name, None)


def rename_initializer(value: ir.Value, name: str) -> None:
    """Rename the value but not its tensor object, which may belong to the caller."""
    tensor, value.const_value = value.const_value, None
    value.name = name
    value.const_value = tensor


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Put `new` where `old` was read or returned; `new` takes over its name, type and notes."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = None
    new.name = name
    new.type = new.type or old.type
    new.shape = new.shape or old.shape
    new.doc_string = new.doc_string or old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)


def inherit_notes(old: ir.Node, new: ir.Node) -> None:
    """Give a node what users and exporters have noted on the one whose place it takes."""
    new.doc_string = new.doc_string or old.doc_string
    for key, note in old.metadata_props.items():
        if key.partition(".")[0] == _OWN:
            continue  # what we have noted is about the old node
        new.metadata_props.setdefault(key, note)


def remove_dead(nodes: Iterable[ir.Node]) -> int:
    """Remove those nodes none of whose outputs is read or returned, in the given order.

    Returns:
        How many were removed. Consumers must come before producers.
    """
    removed = 0
    for node in nodes:
        graph = node.graph
        used = any(output.uses() or output.is_graph_output() for output in node.outputs)
        if graph is not None and not used:
            graph.remove(node, safe=True)
            removed += 1
    return removed
