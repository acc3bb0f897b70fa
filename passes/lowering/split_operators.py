"""Use the factors of a weight where it is neither multiplied with nor looked up.

``Conv(x, W) -> Conv(Conv(x, right), left)``: the window with fewer channels, then 1 x 1;
``ConvTranspose(x, W) -> ConvTranspose(Conv(x, left'), right)``: 1 x 1 first, since its weight has
the input channels in front; ``LSTM(x, W, R) -> LSTM(MatMul(x, right'), left, R)``, and the same for
GRU and RNN, whose recurrent weights stay. Called by `rewrite` for weights in the main graph and in
subgraphs, and by `expand` for the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.lowering.builder import GraphBuilder
from onnxcomp.passes.weight import Use, WeightSite

__all__ = ["SPLIT_KINDS", "has_place", "join", "split", "splits"]

_RECURRENT = ("LSTM", "GRU", "RNN")
_OPERATORS = ("Conv", "ConvTranspose", *_RECURRENT)

# How a use that was split is marked.
SPLIT_KINDS = ("conv", "transposed conv", "recurrent")

# Makes a node in front of another one: operator, inputs, attributes.
Before = Callable[[str, list[ir.Value | None], Sequence[ir.Attr]], ir.Value]


def has_place(site: WeightSite, use: Use) -> bool:
    """Whether a use may be split, as far as the site tells."""
    rows = site.shape[0]
    if use.op_type in _RECURRENT:
        rows = site.size // site.shape[-1]
    return (
        use.op_type in _OPERATORS
        and use.input_index == 1
        and not use.path
        and len(site.shape) > 2
        and not site.transposed
        and site.rows == rows
    )


def splits(node: ir.Node, use: Use, site: WeightSite) -> bool:
    """Whether a use can be split: no groups, and the weight is not its own input."""
    if not has_place(site, use) or not is_default_domain(node.domain):
        return False
    return node.attributes.get_int("group", 1) == 1 and node.inputs[0] is not node.inputs[1]


def split(
    builder: GraphBuilder, node: ir.Node, site: WeightSite, left: ir.Value, right: ir.Value
) -> tuple[str, ir.Value]:
    """Make the nodes that use two factors in the place of a weight.

    Args:
        builder: Makes nodes in front of the node.
        node: A node that `splits`.
        site: The weight.
        left: ``(rows, rank)``.
        right: ``(rank, length)``.

    Returns:
        The kind of the use, and the value that takes the place of the node's output; of a recurrent
        node, which stays, its own output.
    """
    if node.op_type in _RECURRENT:
        return "recurrent", _split_recurrent(builder, node, site, left, right)
    spatial = (1,) * (len(site.shape) - 2)
    x, bias = node.inputs[0], list(node.inputs[2:3])
    assert x is not None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    window = _shaped(builder, right, (-1, *site.shape[1:]))
    extra = [value for value in bias if value is not None]
    if node.op_type == "Conv":
        thin = builder.node("Conv", [x, window], attributes)
        points = _shaped(builder, left, (site.rows, -1, *spatial))
        return "conv", builder.node("Conv", [thin, points, *extra])
    turned = builder.node("Transpose", [left], {"perm": (1, 0)})
    thin = builder.node("Conv", [x, _shaped(builder, turned, (-1, site.rows, *spatial))])
    return "transposed conv", builder.node("ConvTranspose", [thin, window, *extra], attributes)


def _split_recurrent(
    builder: GraphBuilder, node: ir.Node, site: WeightSite, left: ir.Value, right: ir.Value
) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    turned = builder.node("Transpose", [right], {"perm": (1, 0)})
    node.replace_input_with(0, builder.node("MatMul", [x, turned]))
    node.replace_input_with(1, _shaped(builder, left, (*site.shape[:-1], -1)))
    return node.outputs[0]


def _shaped(builder: GraphBuilder, value: ir.Value, shape: Sequence[int]) -> ir.Value:
    dims = "x".join(map(str, shape))
    target = builder.constant(f"shape.{dims}", np.array(shape, np.int64))
    return builder.node("Reshape", [value, target])


def join(node: ir.Node, kind: str, x: ir.Value, weight: ir.Value, before: Before) -> ir.Value:
    """Undo `split`.

    Args:
        node: The last of the nodes that were made, or the recurrent node.
        kind: What `split` returned.
        x: The input of them all.
        weight: The dense weight in its stored form.
        before: Makes a node in front of `node`.

    Returns:
        The value that takes the place of the node's output.

    Raises:
        ValueError: The nodes are not what `split` makes.
    """
    if kind == "recurrent":
        if node.op_type not in _RECURRENT:
            raise ValueError(f"{node.op_type} is not recurrent")
        node.replace_input_with(0, x)
        node.replace_input_with(1, weight)
        return node.outputs[0]
    wanted = "Conv" if kind == "conv" else "ConvTranspose"
    owner = node if kind != "conv" or node.inputs[0] is None else node.inputs[0].producer()
    if node.op_type != wanted or owner is None or owner.op_type != wanted:
        raise ValueError(f"{node.op_type} is not a {kind}")
    inputs = [x, weight, *node.inputs[2:3]]
    return before(wanted, inputs, list(owner.attributes.values()))
