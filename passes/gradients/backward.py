"""Gradients of a model's values with respect to others: vector-Jacobian products, as nodes.

For a scalar ``L`` that depends on values ``y`` with known ``dL/dy`` (the seeds), the nodes between
are visited backwards. Each has a rule (`RULES`) that says, with nodes of its own, what ``dL/dx`` of
its inputs is when ``dL/dy`` of its outputs is known. Nodes that depend on nothing that is wanted
are not visited.

Differentiates the main graph: a value that reaches an output through a subgraph has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients import elementwise, products, reductions, shapes
from onnxcomp.passes.gradients.tape import Step, Tape
from onnxcomp.passes.ir.traversal import is_default_domain, subgraphs

__all__ = ["RULES", "STOPS", "backward", "missing_rules", "reached", "with_shapes"]

# The gradient of one input of a node.
Rule = Callable[[Step, int], ir.Value]

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **products.RULES,
    **reductions.RULES,
    **shapes.RULES,
}

# Operators whose outputs are constant almost everywhere, or no floating-point numbers.
STOPS = frozenset(
    (
        *("Shape", "Size", "ConstantOfShape", "EyeLike", "OneHot", "Range", "NonZero"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"),
        *("And", "Or", "Xor", "Not", "ArgMax", "ArgMin", "Floor", "Ceil", "Round", "Sign"),
        *("RandomNormalLike", "RandomUniformLike", "Bernoulli", "NonMaxSuppression"),
    )
)

# Inputs that say where or how: the rules never give them a gradient.
_SETTINGS: Mapping[str, frozenset[int]] = {
    "Clip": frozenset((1, 2)),
    "Expand": frozenset((1,)),
    "Gather": frozenset((1,)),
    "Pad": frozenset((1, 2, 3)),
    "Reshape": frozenset((1,)),
    "ReduceL2": frozenset((1,)),
    "ReduceMax": frozenset((1,)),
    "ReduceMean": frozenset((1,)),
    "ReduceMin": frozenset((1,)),
    "ReduceSum": frozenset((1,)),
    "Slice": frozenset((1, 2, 3, 4)),
    "Split": frozenset((1,)),
    "Squeeze": frozenset((1,)),
    "Unsqueeze": frozenset((1,)),
    "Where": frozenset((0,)),
}


def with_shapes(model: ir.Model) -> None:
    """Infer shapes in place, which spares sums over axes that are known not to be repeated."""
    common.ShapeInferencePass(data_prop=False)(model)


def _inputs(node: ir.Node) -> Iterable[tuple[int, ir.Value]]:
    """Inputs through which a node's outputs depend smoothly on others."""
    if node.op_type in STOPS and is_default_domain(node.domain):
        return
    settings = _SETTINGS.get(node.op_type, frozenset())
    for index, value in enumerate(node.inputs):
        if value is not None and index not in settings:
            yield index, value


def _stops(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        kind = ir.DataType(node.attributes.get_int("to", 0))
        return kind not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
    return False


def reached(graph: ir.Graph, wanted: Iterable[ir.Value]) -> set[ir.Value]:
    """The wanted values and all that depend smoothly on them; nodes are in topological order."""
    active = set(wanted)
    for node in graph:
        if not _stops(node) and any(value in active for _, value in _inputs(node)):
            active.update(node.outputs)
    return active


def missing_rules(
    graph: ir.Graph, seeds: Iterable[ir.Value], wanted: Iterable[ir.Value]
) -> frozenset[str]:
    """Operators between wanted values and seeds that have no rule."""
    active = reached(graph, wanted)
    needed = {value for value in seeds if value in active}
    found: set[str] = set()
    for node in reversed(list(graph)):
        if not any(output in needed for output in node.outputs):
            continue
        if any(True for _ in subgraphs(node)) or _rule(node) is None:
            found.add(f"{node.domain}.{node.op_type}" if node.domain else node.op_type)
        needed.update(value for _, value in _inputs(node) if value in active)
    return frozenset(found)


def _rule(node: ir.Node) -> Rule | None:
    known = is_default_domain(node.domain) or node.op_type == "SimplifiedLayerNormalization"
    return RULES.get(node.op_type) if known else None


def backward(
    tape: Tape, graph: ir.Graph, seeds: Mapping[ir.Value, ir.Value], wanted: Sequence[ir.Value]
) -> dict[ir.Value, ir.Value]:
    """Add the nodes that compute gradients.

    Args:
        tape: Takes the nodes.
        graph: The model's main graph, in topological order.
        seeds: By value the gradient of the scalar with respect to it.
        wanted: Values to find gradients of: inputs, initializers or results of nodes.

    Returns:
        The gradients of the wanted values, without those that no seed depends on.

    Raises:
        ModelError: An operator on the way has no rule.
    """
    nodes = list(graph)
    active = reached(graph, wanted)
    totals: dict[ir.Value, ir.Value] = dict(seeds)
    for node in reversed(nodes):
        gradients = [totals.get(output) for output in node.outputs]
        if all(gradient is None for gradient in gradients):
            continue
        inputs = [(index, value) for index, value in _inputs(node) if value in active]
        if not inputs or _stops(node):
            continue
        rule = _rule(node)
        if rule is None or any(True for _ in subgraphs(node)):
            raise ModelError(f"no gradient of operator {node.op_type} (node {node.name!r})")
        step = Step(tape, node, gradients)
        for index, value in inputs:
            found = rule(step, index)
            totals[value] = tape.add(totals[value], found) if value in totals else found
    return {value: totals[value] for value in wanted if value in totals}
