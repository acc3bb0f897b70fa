"""Compute the logits of the last positions only.

``MatMul(x, W) -> logits`` becomes ``MatMul(Slice(x, last positions), W) -> logits``, whatever
operator multiplies, also where a bias, a scale or a conversion stands behind the product.
Generation reads the last position alone, and the head of a small model is a fifth of a prompt's
work. The output has fewer positions then, so it is done on request only. Visits the main graph.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.ir.traversal import Names, default_opset, is_default_domain, new_initializer
from onnxcomp.passes.weight import DOMAIN

__all__ = ["keep_last_logits", "logits_of"]

# Operators that treat every element alone, and those that do so where the other input is constant.
_ALONE = frozenset({"Cast", "Identity", "Neg", "Sigmoid", "Tanh"})
_WITH_CONSTANT = frozenset({"Add", "Div", "Mul", "Sub"})

# Domain -> products, whose first input holds a position in each row.
_PRODUCTS = {
    "": frozenset({"MatMul"}),
    "com.microsoft": frozenset({"FusedMatMul", "MatMulBnb4", "MatMulNBits"}),
}
# Operators that treat every position alone where they work along the last of the three axes.
_ALONG = frozenset({"Softmax", "LogSoftmax"})
_LAST_AXIS = (-1, 2)
_AXIS_LAST = 13  # the opset from which that is the axis where none is given

_END = np.iinfo(np.int64).max
_SLICE = 10  # the opset from which Slice takes its bounds as inputs
_HINT = "it is for decoders, whose logits are (batch, length, vocabulary) and come from a product"


def keep_last_logits(model: ir.Model, count: int) -> None:
    """Change a model in place so that it returns the logits of its last positions.

    Args:
        model: A decoder.
        count: How many positions.

    Raises:
        UsageError: It has no logits that come from a product over positions.
    """
    logits = logits_of(model)
    *between, head = _down_to_product(logits, default_opset(model) or 0)
    names, x = Names(model), head.inputs[0]
    assert x is not None
    bounds = [
        new_initializer(model, names.value(f"logits_to_keep/{name}"), np.array([at], np.int64))
        for name, at in (("starts", -count), ("ends", _END), ("axes", -2))
    ]
    node = ir.Node("", "Slice", [x, *bounds], name=names.node("logits_to_keep"))
    last = node.outputs[0]
    last.name, last.type = names.value(f"{x.name}/last"), x.type
    model.graph.insert_before(head, node)
    head.replace_input_with(0, last)
    for inner in (head, *between):
        if inner.outputs[0] is not logits:
            inner.outputs[0].shape = None
    assert logits.shape is not None
    batch, _, vocabulary = logits.shape.dims
    logits.shape = ir.Shape([batch, 1 if count == 1 else None, vocabulary])


def logits_of(model: ir.Model) -> ir.Value:
    """The output with the logits: the one of that name, else the first.

    Raises:
        UsageError: It has other axes.
    """
    opset = default_opset(model)
    outputs = {value.name: value for value in model.graph.outputs}
    found = outputs.get("logits") or next(iter(outputs.values()))
    if found.shape is None or len(found.shape) != 3 or opset is None or opset < _SLICE:
        raise UsageError(
            f"logits_to_keep: output {found.name!r} is {found.shape or 'of an unknown shape'} in "
            f"opset {opset}",
            hint=_HINT,
        )
    return found


def _down_to_product(logits: ir.Value, opset: int) -> list[ir.Node]:
    """Nodes from the output down to the product that makes the logits, which comes last."""
    found: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        found.append(node)
        if _is_product(node):
            return [*found[:-1], *_chain(node)]
        value = _passed_on(node, opset)
    kind = found[-1].op_type if found else "nothing"
    raise UsageError(
        f"logits_to_keep: {kind} gives {logits.name!r}, and no product of positions", hint=_HINT
    )


def _chain(node: ir.Node) -> Iterator[ir.Node]:
    """A product, and those it alone reads, as low-rank factors are."""
    yield node
    x = node.inputs[0]
    inner = None if x is None else x.producer()
    if x is not None and inner is not None and _is_product(inner) and len(x.uses()) == 1:
        yield from _chain(inner)


def _is_product(node: ir.Node) -> bool:
    domain = "" if is_default_domain(node.domain) else node.domain
    ours = domain == DOMAIN and node.op_type.endswith("MatMul")
    x = node.inputs[0] if node.inputs else None
    known = ours or node.op_type in _PRODUCTS.get(domain, ())
    known = known and not node.attributes.get_int("transA", 0)
    return known and x is not None and x.const_value is None


def _passed_on(node: ir.Node, opset: int) -> ir.Value | None:
    """The input whose positions are those of the output; None where that is not known."""
    if not is_default_domain(node.domain):
        return None
    if node.op_type in _ALONE or (node.op_type in _ALONG and _along_last(node, opset)):
        return node.inputs[0]
    moving = [value for value in node.inputs if value is not None and value.const_value is None]
    if node.op_type not in _WITH_CONSTANT or len(moving) != 1:
        return None
    fixed = [value for value in node.inputs if value is not None and value.const_value is not None]
    alike = all(value.shape is not None and set(value.shape.dims[:-1]) <= {1} for value in fixed)
    return moving[0] if alike else None


def _along_last(node: ir.Node, opset: int) -> bool:
    axis = node.attributes.get_int("axis", -1 if opset >= _AXIS_LAST else 1)
    return axis in _LAST_AXIS
