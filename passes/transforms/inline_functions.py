"""Put the bodies of functions that hold weights in the place of their calls.

``f(x)`` with ``f(x) = MatMul(x, Constant())`` becomes ``MatMul(x, Constant())``. ONNX Runtime does
the same when it loads a model, so nothing is computed otherwise; but a function has no
initializers, and its weights could not be compressed where they are. Visits the main graph, all
subgraphs and function bodies. Functions without weights stay, and so do those whose body cannot be
moved: another version of an operator set, subgraphs as attributes, results that are no node's,
inputs that a call leaves out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxcomp.passes.ir.traversal import Names, is_default_domain
from onnxcomp.passes.weight import DOMAIN

__all__ = ["inlinable", "inline_functions"]

Identifier = tuple[str, str, str]
Calls = dict[Identifier, list[ir.Node]]


def inline_functions(
    model: ir.Model, names: Names, has_weights: Callable[[ir.Node], bool]
) -> Iterator[str]:
    """Inline every function that holds weights or calls one that does, where that is possible.

    Args:
        model: The model; changed in place.
        names: Names taken in the model; those of inlined values are added.
        has_weights: Whether a node of a body holds a weight.

    Yields:
        A note for each function.
    """
    chosen = inlinable(model, has_weights)
    if not chosen:
        return
    for identifier in chosen:
        _rename(model.functions[identifier], names)
    InlinePass(lambda function: function.identifier() in chosen)(model)
    for domain, name, _ in chosen:
        yield f"function {domain}::{name} was inlined"


def inlinable(model: ir.Model, has_weights: Callable[[ir.Node], bool]) -> list[Identifier]:
    """Functions that hold weights and can be inlined, in the order of the model."""
    calls = _calls(model)
    if not calls or _recursive(model):
        return []
    movable = [key for key in model.functions if _movable(model, key, calls.get(key, []))]
    wanted = {key for key in movable if any(map(has_weights, model.functions[key].all_nodes()))}
    grown = True
    while grown:
        outer = {key for key in movable if wanted & _callees(model.functions[key])}
        grown = not outer <= wanted
        wanted |= outer
    return [key for key in movable if key in wanted]


def _calls(model: ir.Model) -> Calls:
    """The calls of every function, wherever they are."""
    found: Calls = defaultdict(list)
    bodies = [model.graph, *(function.graph for function in model.functions.values())]
    for body in bodies:
        for node in body.all_nodes():
            if node.op_identifier() in model.functions:
                found[node.op_identifier()].append(node)
    return found


def _callees(function: ir.Function) -> set[Identifier]:
    return {node.op_identifier() for node in function.all_nodes()}


def _recursive(model: ir.Model) -> bool:
    """Whether a function calls itself, directly or by others; no runtime accepts that."""
    pending = {key: _callees(body) & set(model.functions) for key, body in model.functions.items()}
    while True:
        done = [key for key, callees in pending.items() if not callees & pending.keys()]
        if not done:
            return bool(pending)
        for key in done:
            del pending[key]


def _movable(model: ir.Model, key: Identifier, calls: list[ir.Node]) -> bool:
    """Whether the body means the same in the place of all its calls."""
    function = model.functions[key]
    imports = model.graph.opset_imports
    versions = {("" if is_default_domain(d) else d): v for d, v in imports.items()}
    same = all(
        versions.get("" if is_default_domain(domain) else domain, version) == version
        for domain, version in function.opset_imports.items()
    )
    outputs = list(function.outputs)
    made = len(set(outputs)) == len(outputs) and all(
        value.producer() is not None and value.producer() in function for value in outputs
    )
    return (
        key[0] != DOMAIN
        and bool(calls)
        and same
        and made
        and all(_plain(call, function) for call in calls)
    )


def _plain(call: ir.Node, function: ir.Function) -> bool:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return (
        len(call.inputs) == len(function.inputs)
        and None not in call.inputs
        and len(call.outputs) == len(function.outputs)
        and all(value.name for value in call.outputs)
        and not any(attribute.type in graphs for attribute in call.attributes.values())
        and not any(attribute.type in graphs for attribute in function.attributes.values())
    )


def _rename(function: ir.Function, names: Names) -> None:
    """Give the nodes and values of a body names that the model does not have."""
    prefix = f"{function.domain}::{function.name}/"
    for node in function.all_nodes():
        node.name = names.node(f"{prefix}{node.name or node.op_type}")
        for value in node.outputs:
            if value.name:
                value.name = names.value(f"{prefix}{value.name}")
