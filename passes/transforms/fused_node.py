"""Put plain nodes in the place of a fused one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from onnxcomp.passes.ir.traversal import Names, inherit_notes, new_initializer, replace_value

__all__ = ["FusedNode"]


class FusedNode:
    """Makes nodes in front of a fused one, and puts the last of them in its place."""

    def __init__(self, model: ir.Model, node: ir.Node, names: Names) -> None:
        self.node = node
        self._model = model
        self._names = names

    def add(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """The outputs of a new node."""
        label = f"{self.node.name}/{op_type}"
        made = ir.node(
            op_type, inputs, dict(attributes or {}), domain=domain, num_outputs=outputs,
            name=self._names.node(label),
        )  # fmt: skip
        for output in made.outputs:
            output.name = self._names.value(label)
            output.type = self.node.outputs[0].type
        assert self.node.graph is not None
        self.node.graph.insert_before(self.node, made)
        return list(made.outputs)

    def one(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """The output of a new node that has one."""
        return self.add(op_type, inputs, attributes)[0]

    def constant(self, name: str, array: Any) -> ir.Value:
        """A new initializer."""
        return new_initializer(self._model, self._names.value(f"{self.node.name}/{name}"), array)

    def input(self, index: int) -> ir.Value | None:
        """An input of the fused node; None where it is not given."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def replace(self, value: ir.Value) -> None:
        """Put a value in the place of the fused node."""
        producer = value.producer()
        assert producer is not None and self.node.graph is not None
        inherit_notes(self.node, producer)
        replace_value(self.node.outputs[0], value)
        self.node.graph.remove(self.node, safe=True)
