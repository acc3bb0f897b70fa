"""Leave out copies between an expanded weight and the form it is used in.

``Reshape(Slice(Flatten(x)))`` becomes ``Reshape(x)`` where the Slice cuts nothing, and so does
``Reshape(Reshape(x))``. ONNX Runtime would fold every one of them to a tensor of its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.manifest import KEY, WEIGHT_KEY
from onnxcomp.passes.ir.traversal import remove_dead

__all__ = ["join_shapes"]

_NO_END = np.iinfo(np.int64).max


def join_shapes(weight: ir.Value) -> None:
    """Shorten the way from a body's result to what reads it, in place.

    Args:
        weight: The result of an inlined body that expands a weight.
    """
    last = _only_reshape(weight)
    while last is not None:
        source = last.inputs[0]
        producer = None if source is None else source.producer()
        if source is None or producer is None or len(source.uses()) > 1:
            break
        if not _keeps_order(producer):
            break
        last.replace_input_with(0, producer.inputs[0])
        remove_dead([producer])


def _only_reshape(weight: ir.Value) -> ir.Node | None:
    """The last of a chain of Reshapes that alone read a value; None where there is none."""
    found: ir.Node | None = None
    value = weight
    while not value.is_graph_output():
        readers = [node for node, _ in value.uses()]
        if len(readers) != 1 or readers[0].op_type != "Reshape":
            break
        if KEY not in readers[0].metadata_props:
            break
        found = readers[0]
        value = found.outputs[0]
        if WEIGHT_KEY in found.metadata_props:
            break
    return found


def _keeps_order(node: ir.Node) -> bool:
    """Whether a node of ours changes nothing but the shape."""
    if KEY not in node.metadata_props or WEIGHT_KEY in node.metadata_props:
        return False
    if node.op_type == "Slice":
        ends = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] else None
        return ends is not None and bool(np.all(ends.numpy() == _NO_END))
    return node.op_type in ("Flatten", "Reshape")
