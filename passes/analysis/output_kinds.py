"""What a model's outputs are: distributions, logits of some, or values.

Distributions are compared by the divergence of Kullback and Leibler, values by their squared error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import onnx_ir as ir

from onnxcomp.passes.ir.traversal import is_default_domain

__all__ = ["OutputKind", "output_kinds"]

OutputKind = Literal["Softmax", "LogSoftmax", "logits", "values"]


def output_kinds(graph: ir.Graph, outputs: Iterable[ir.Value]) -> dict[ir.Value, OutputKind]:
    """The outputs by which a model is compared with another one, and how.

    Where some are distributions, these are all that counts.

    Args:
        graph: The main graph.
        outputs: Those of its outputs that could be compared; each is made by a node.
    """
    found = {value: _kind(graph, value) for value in outputs}
    told = [value for value, kind in found.items() if kind != "values"]
    return {value: found[value] for value in told or found}


def _kind(graph: ir.Graph, value: ir.Value) -> OutputKind:
    producer = value.producer()
    if producer is not None and producer.attributes.get_int("axis", -1) in (-1, 1):
        if producer.op_type == "Softmax":
            return "Softmax"
        if producer.op_type == "LogSoftmax":
            return "LogSoftmax"
    return "logits" if _is_logits(graph, value) else "values"


def _is_logits(graph: ir.Graph, value: ir.Value) -> bool:
    if "logit" in (value.name or "").lower():
        return True
    width = value.shape[-1] if value.shape is not None and len(value.shape) > 1 else None
    return isinstance(width, int) and width > 1 and _reads_table(graph, width)


def _reads_table(graph: ir.Graph, width: int) -> bool:
    """Whether the model looks up rows of a table of so many rows: its outputs are its words."""
    tables = (
        node.inputs[0]
        for node in graph
        if node.op_type == "Gather" and is_default_domain(node.domain)
    )
    return any(
        table is not None
        and table.is_initializer()
        and table.shape is not None
        and len(table.shape) == 2
        and table.shape[0] == width
        for table in tables
    )
