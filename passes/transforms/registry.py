"""The graph passes in the order in which they run, those of other packages included."""

from __future__ import annotations

from onnxcomp.passes.transforms.canonicalize import Canonicalize
from onnxcomp.passes.transforms.dedup_index_tables import IndexedWeights
from onnxcomp.passes.transforms.dedup_values import RepeatedValues
from onnxcomp.passes.transforms.fold_linear_chains import LinearChains
from onnxcomp.passes.transforms.lower_shared_weights import SharedWeights
from onnxcomp.passes.transforms.pass_manager import GraphPass
from onnxcomp.passes.transforms.prune.graph_pass import Prune

__all__ = ["GRAPH_PASSES"]

GRAPH_PASSES: tuple[GraphPass, ...] = (
    IndexedWeights(),
    Canonicalize(),
    SharedWeights(),
    RepeatedValues(),
    LinearChains(),
    Prune(),
)
