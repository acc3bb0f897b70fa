"""Take out nodes that do nothing: ``Identity(x) -> x``."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass

__all__ = ["DropIdentities"]


class DropIdentities(GraphPass):
    """Let readers of an Identity read what it reads."""

    name: ClassVar[str] = "drop_identities"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Always: no value changes."""
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """``Identity(x) -> x`` in the main graph, but for outputs of the model."""
        notes = []
        for node in list(model.graph):
            if node.op_type != "Identity" or not is_default_domain(node.domain):
                continue
            source, output = node.inputs[0], node.outputs[0]
            if source is None or output.is_graph_output():
                continue
            output.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)
            notes.append(f"{node.name} did nothing")
        return Change(len(notes), tuple(notes))
