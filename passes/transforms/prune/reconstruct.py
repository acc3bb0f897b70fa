"""What makes up for pruned channels: fits of one layer after the other, then tuning of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import FitReport, SearchReport, TuningReport
from onnxcomp.passes.gradients.weight_gradients import Part
from onnxcomp.passes.ir.model import copy_model
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import Consumer, handed_on
from onnxcomp.passes.transforms.prune.cost import measure
from onnxcomp.passes.transforms.prune.decide import Decision
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.trials import best_trial
from onnxcomp.passes.transforms.prune.tuning import Effort, tune
from onnxcomp.passes.weight import Feed

__all__ = ["Reconstruction", "fit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Reconstruction:
    """A model whose weights were fitted, before channels are taken out.

    Attributes:
        decision: What goes.
        fits: What became of products.
        norms: What became of normalisations.
        reference: The dense model.
        values: What products that lose columns make; see `handed_on`.
        effort: How much tuning is worth its time; None for no tuning.
        searched: What other divisions of the budget were worth; None where none was tried.
    """

    decision: Decision
    fits: tuple[FitReport, ...] = ()
    norms: tuple[FitReport, ...] = ()
    reference: ir.Model | None = None
    values: Mapping[str, Part] = dataclasses.field(default_factory=dict)
    effort: Effort | None = None
    searched: SearchReport | None = None

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
    decisions: Sequence[Decision],
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None = None,
) -> Reconstruction:
    """Fit what is left of a model to calibration data, in place.

    Where there are several ways to choose what goes, all are tried, and the one is kept whose
    outputs lose least on inputs that fits set aside.

    Args:
        analysis: Of the model, whose initializers are replaced.
        consumers: Its products.
        decisions: Ways to choose what goes.
        options: How it is pruned.
        feeds: Calibration data; without any, nothing is fitted.
        folder: Where pieces of the model are written.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    if not feeds or options.compensate == "none" or not decisions[0].gone.any():
        return Reconstruction(decisions[0])
    reference, effort = None, None
    if options.tunes:
        flops = measure(analysis.model, analysis.seen).flops
        effort = Effort.within_reach(feeds, flops, analysis.seen.elements)
        reference = copy_model(analysis.model)
    best, searched = best_trial(analysis, consumers, decisions, options, feeds, folder)
    for value, tensor in best.changed.items():
        value.const_value = tensor
    values = handed_on(analysis, consumers, best.decision.gone)
    return Reconstruction(best.decision, *best.reports, reference, values, effort, searched)
