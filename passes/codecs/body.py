"""Writes the body of a model-local function, node by node, in the opset of any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.weight import DOMAIN

__all__ = ["Body"]


class Body:
    """Collects the nodes of one function; every method returns the name of a value."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []

    def node(
        self,
        op_type: str,
        *inputs: str,
        domain: str = "",
        refs: dict[str, tuple[str, onnx.AttributeProto.AttributeType]] | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; `refs` maps attributes to (attribute of the function, its type)."""
        output = f"v{len(self.nodes)}"
        made = helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes)
        for name, (source, kind) in (refs or {}).items():
            made.attribute.append(onnx.AttributeProto(name=name, type=kind, ref_attr_name=source))
        self.nodes.append(made)
        return output

    def outputs(self, op_type: str, value: str, count: int) -> list[str]:
        """Add a node of one input with several outputs."""
        names = [f"v{len(self.nodes)}.{number}" for number in range(count)]
        self.nodes.append(helper.make_node(op_type, [value], names))
        return names

    def ints(self, *values: int) -> str:
        """An int64 constant; before opset 9 a Constant holds floats only.

        Exact up to 2^53, the integers of float64.
        """
        if self.opset >= 9:
            return self.node("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))
        floats = numpy_helper.from_array(np.array(values, np.float64))
        return self.node("Cast", self.node("Constant", value=floats), to=int(TensorProto.INT64))

    def cast(self, value: str, to: int) -> str:
        """Convert to the element type `to`."""
        return self.node("Cast", value, to=to)

    def crop(self, value: str, axes: Sequence[int], ends: str, attribute: str) -> str:
        """Cut `axes` at `ends`, a value that equals the function's attribute of that name."""
        if self.opset >= 10:
            starts = self.ints(*[0] * len(axes))
            return self.node("Slice", value, starts, ends, self.ints(*axes))
        refs = {"ends": (attribute, onnx.AttributeProto.INTS)}
        return self.node("Slice", value, refs=refs, starts=[0] * len(axes), axes=list(axes))

    def finish(
        self, name: str, inputs: Sequence[str], attributes: Sequence[str], *, calls: bool = False
    ) -> onnx.FunctionProto:
        """The function, with the last node's output as its own."""
        imports = [helper.make_opsetid("", self.opset)]
        if calls:
            imports.append(helper.make_opsetid(DOMAIN, 1))
        output = self.nodes[-1].output[0]
        return helper.make_function(
            DOMAIN, name, list(inputs), [output], self.nodes, imports, list(attributes)
        )
