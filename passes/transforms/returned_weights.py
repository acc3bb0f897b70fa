"""Give a branch that returns a weight a node that returns it.

``then_branch { return W } -> then_branch { return Identity(W) }`` for initializers of If, Loop and
Scan bodies, so that the weight has a use and can be stored in codes. What a body calls its outputs
is seen by nobody but the node that holds it. The outputs of the main graph are left alone: their
values are what callers get. Visits subgraphs only.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import is_matrix
from onnxcomp.passes.ir.traversal import Names, scopes
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass

__all__ = ["ReturnedWeights"]


class ReturnedWeights(GraphPass):
    """An Identity between a weight of a body and the output it is."""

    name: ClassVar[str] = "returned_weights"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Always."""
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place."""
        names = Names(model)
        notes = []
        for scope in scopes(model):
            if scope.parent is None:
                continue
            for index, value in enumerate(scope.graph.outputs):
                tensor = value.const_value
                if tensor is None or not value.is_initializer() or value.is_graph_input():
                    continue
                if is_matrix(tensor) and tensor.nbytes >= context.settings.min_size:
                    scope.graph.outputs[index] = _returned(scope.graph, value, names)
                    notes.append(f"{value.name}: returned by a node")
        return Change(len(notes), tuple(notes))


def _returned(graph: ir.Graph, value: ir.Value, names: Names) -> ir.Value:
    """The output of a node at the end of a body that gives a value back."""
    node = ir.Node("", "Identity", [value], name=names.node(f"{value.name}/Identity"))
    output = node.outputs[0]
    output.name = names.value(f"{value.name}/returned")
    output.type, output.shape = value.type, value.shape
    graph.append(node)
    return output
