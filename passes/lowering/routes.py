"""The way from the result of a weight's use back to its operand, as `expand` needs it.

A use that became several nodes is marked by the inputs that lead back: ``[1, 0]`` stands for the
first input of whatever makes the second input of the marked node.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.manifest import KEY
from onnxcomp.passes.ir.tensors import dtype_name

__all__ = ["dtype_at_use", "operand", "route"]


def route(result: ir.Value, x: ir.Value) -> list[int]:
    """Which inputs lead from a value back to `x`, through nodes that a codec asked for.

    Raises:
        ModelError: None do.
    """
    pending: list[tuple[ir.Value, list[int]]] = [(result, [])]
    seen = {result}
    while pending:
        value, way = pending.pop(0)
        if value is x:
            return way
        producer = value.producer()
        if producer is None or KEY not in producer.metadata_props:
            continue
        for index, source in enumerate(producer.inputs):
            if source is not None and source not in seen:
                seen.add(source)
                pending.append((source, [*way, index]))
    raise ModelError(f"the nodes made for {result.name!r} do not read {x.name!r}")


def operand(node: ir.Node, way: Sequence[int]) -> ir.Value:
    """The value that a route leads to; the inverse of `route`.

    Raises:
        ValueError: Nothing is connected there.
    """
    value: ir.Value | None = node.outputs[0]
    for index in way:
        producer = None if value is None else value.producer()
        value = None if producer is None else producer.inputs[index]
    if value is None:
        raise ValueError(f"nothing is connected to its inputs {list(way)}")
    return value


def dtype_at_use(path: Sequence[ir.Node], stored: str) -> str:
    """The element type of a weight behind the nodes on its way."""
    casts = [node.attributes["to"].as_int() for node in path if node.op_type == "Cast"]
    return dtype_name(ir.DataType(casts[-1])) if casts else stored
