"""What makes up for pruned channels: fits of one layer after the other, then tuning of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import FitReport, TuningReport
from onnxcomp.passes.gradients.weight_gradients import Part
from onnxcomp.passes.ir.model import copy_model
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import Consumer, handed_on
from onnxcomp.passes.transforms.prune.cost import measure
from onnxcomp.passes.transforms.prune.fits import make_up
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.tuning import Effort, tune
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Reconstruction", "fit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Reconstruction:
    """A model whose weights were fitted, before channels are taken out.

    Attributes:
        fits: What became of products.
        norms: What became of normalisations.
        reference: The dense model.
        values: What products that lose columns make; see `handed_on`.
        effort: How much tuning is worth its time; None for no tuning.
    """

    fits: tuple[FitReport, ...] = ()
    norms: tuple[FitReport, ...] = ()
    reference: ir.Model | None = None
    values: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    effort: Effort | None = None

    def tune(
        self,
        model: ir.Model,
        options: PruneOptions,
        feeds: Sequence[Feed],
        folder: Path | None = None,
    ) -> TuningReport | None:
        """Tune the model, in place, without its channels; it has to accept the same inputs."""
        if self.effort is None or self.reference is None:
            return None
        return tune(
            model,
            self.reference,
            feeds,
            self.values,
            self.effort,
            exclude=options.exclude,
            folder=folder,
        )


def fit(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    gone: Array,
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None = None,
) -> Reconstruction:
    """Fit what is left of a model to calibration data, in place.

    Args:
        analysis: Of the model, whose initializers are replaced.
        consumers: Its products.
        gone: Which classes go.
        options: How it is pruned.
        feeds: Calibration data; without any, nothing is fitted.
        folder: Where pieces of the model are written.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    if not feeds or options.compensate == "none" or not gone.any():
        return Reconstruction()
    reference, effort = None, None
    if options.tunes:
        flops = measure(analysis.model, analysis.seen).flops
        effort = Effort.within_reach(feeds, flops, analysis.seen.elements)
        reference = copy_model(analysis.model)
    values = handed_on(analysis, consumers, gone)
    biases_only = options.compensate == "bias"
    fits, norms = make_up(analysis, consumers, gone, feeds, folder, biases_only=biases_only)
    return Reconstruction(fits, norms, reference, values, effort)
