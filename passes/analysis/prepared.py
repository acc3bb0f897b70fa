"""A model that is ready for planning: canonical, with its weights found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.analysis.weight_sites import SkippedWeight
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.ir.files import Source
from onnxcomp.passes.weight import WeightSite

__all__ = ["Prepared"]


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A canonical model and its weights.

    Attributes:
        model: The model, canonicalised in place.
        path: Its file; None for a model that was given in memory.
        source: Name, bytes and hash of the input.
        sites: Weights a codec may be asked about.
        policies: What is asked of each weight, by its name.
        skipped: Other tensors, with reasons.
        pruned: What pruning took out; None without pruning.
    """

    model: ir.Model
    path: Path | None
    source: Source
    sites: tuple[WeightSite, ...]
    policies: Mapping[str, Policy]
    skipped: tuple[SkippedWeight, ...]
    pruned: PruneReport | None = None

    @property
    def has_new_inputs(self) -> bool:
        """Whether pruning has changed shapes of inputs."""
        return self.pruned is not None and bool(self.pruned.inputs)
