"""The canonical form as a table of predicates, and what of a model a pass must leave alone.

The pass manager holds both against the model after every pass: predicates that a pass before has
ensured, and the bodies of subgraphs and functions that a pass says it does not visit.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeAlias

import onnx_ir as ir

from onnxcomp.passes.ir.tensors import WEIGHT_TYPES, is_matrix
from onnxcomp.passes.ir.traversal import LISTING_IR, Scope, is_default_domain, scopes, subgraphs
from onnxcomp.passes.transforms.inline_functions import inlinable

__all__ = [
    "CANONICAL_FORM",
    "SHARED_BYTES",
    "Bodies",
    "Body",
    "constant_weight",
    "function_bodies",
    "holds_weight",
    "liftable",
    "subgraph_bodies",
]

# Smaller equal tensors are not worth a shared name, nor is a function that holds them inlined.
SHARED_BYTES = 1024


def constant_weight(node: ir.Node) -> ir.TensorProtocol | None:
    """The matrix a Constant node holds, if it is one."""
    if node.op_type != "Constant" or not is_default_domain(node.domain):
        return None
    attribute = node.attributes.get("value")
    if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    tensor = attribute.as_tensor()
    return tensor if tensor.dtype in WEIGHT_TYPES and is_matrix(tensor) else None


def holds_weight(node: ir.Node) -> bool:
    """Whether a node is a constant weight that is worth inlining the function around it."""
    tensor = constant_weight(node)
    return tensor is not None and tensor.nbytes >= SHARED_BYTES


def liftable(model: ir.Model, scope: Scope) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    """Constant nodes of a scope whose weight can be an initializer, with the weight."""
    # Before IR 4 an initializer is an input too, which a subgraph cannot take on.
    if scope.parent is not None and model.ir_version < LISTING_IR:
        return
    for node in list(scope.graph):
        tensor = constant_weight(node)
        if tensor is not None and node.outputs[0].name and not node.outputs[0].is_graph_output():
            yield node, tensor


# --- predicates: what is wrong with a model, None where nothing is ---


def _node_names(model: ir.Model) -> str | None:
    taken: set[str] = set()
    for scope in scopes(model):
        for node in scope.graph:
            if not node.name:
                return f"a node {node.op_type} has no name"
            if node.name in taken:
                return f"two nodes are named {node.name!r}"
            taken.add(node.name)
    return None


def _initializer_names(model: ir.Model) -> str | None:
    taken: set[str] = set()
    for scope in scopes(model):
        for name in scope.graph.initializers:
            if name in taken:
                return f"two initializers are named {name!r}"
            taken.add(name)
    return None


def _weights_in_constants(model: ir.Model) -> str | None:
    for scope in scopes(model):
        for node, _ in liftable(model, scope):
            return f"the node {node.name!r} holds a weight"
    return None


def _weights_in_functions(model: ir.Model) -> str | None:
    for domain, name, _ in inlinable(model, holds_weight):
        return f"the function {domain}::{name} holds a weight"
    return None


# What `canonicalize` ensures, by name. Every pass behind it keeps it so.
CANONICAL_FORM: Mapping[str, Callable[[ir.Model], str | None]] = {
    "every node has a name of its own": _node_names,
    "every initializer has a name of its own": _initializer_names,
    "no weight is a Constant node": _weights_in_constants,
    "no weight is in a function that can be inlined": _weights_in_functions,
}


# --- bodies ---


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A graph as it was seen, but for the names of values it captures.

    Attributes:
        facts: Operators, names, and which inputs are given.
        objects: Nodes, their own values, attributes and tensors, kept so that none is forged.
    """

    facts: tuple[Hashable, ...]
    objects: tuple[object, ...]

    def same(self, other: Body) -> bool:
        """Whether two looks at a graph saw the same."""
        if self.facts != other.facts or len(self.objects) != len(other.objects):
            return False
        return all(map(operator.is_, self.objects, other.objects))


Bodies: TypeAlias = Mapping[object, Body]


def subgraph_bodies(model: ir.Model) -> Bodies:
    """The bodies of If, Loop and Scan, by their graphs."""
    return {scope.graph: _body(scope.graph) for scope in scopes(model) if scope.parent is not None}


def function_bodies(model: ir.Model) -> Bodies:
    """The bodies of model-local functions, by their identifiers, and the graphs inside."""
    found: dict[object, Body] = {}
    for key, function in model.functions.items():
        found[key] = _body(function)
        for node in function.all_nodes():
            found.update((graph, _body(graph)) for _, graph in subgraphs(node))
    return found


def _body(graph: ir.Graph | ir.Function) -> Body:
    facts: list[Hashable] = []
    objects: list[object] = [*graph.inputs]
    own = set(graph.inputs)
    for node in graph:
        own.update(node.outputs)
    for node in graph:
        facts += [node.op_identifier(), tuple(value is None for value in node.inputs)]
        objects += [node, *node.attributes.values(), *(v for v in node.inputs if v in own)]
    if isinstance(graph, ir.Graph):
        for name, value in graph.initializers.items():
            facts.append(name)
            objects += [value, value.const_value]
    objects += [value for value in graph.outputs if value in own]
    return Body(tuple(facts), tuple(objects))
