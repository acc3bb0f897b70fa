"""Pruning as passes that run before weights are looked for.

What they do is imported when one of them runs: few models are pruned, and it is a lot.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass

__all__ = ["Prune", "PruneChange", "PruneExperts", "PruneLayers"]


@dataclasses.dataclass(frozen=True, slots=True)
class PruneChange(Change):
    """What pruning changed.

    Attributes:
        report: Groups, fits and costs.
    """

    report: PruneReport = dataclasses.field(kw_only=True)


class Prune(GraphPass):
    """Take out channels, neurons and heads, and fit what stays to the calibration data."""

    name: ClassVar[str] = "prune"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Where a ratio or a target for FLOPs is given."""
        return settings.prune_ratio is not None or settings.target_flops is not None

    def run(self, model: ir.Model, context: Context) -> PruneChange:
        """``W1 (n, k), W2 (m, n) -> W1[K], W2'[:, K]``: see `pruning`.

        Raises:
            UsageError: A search is asked for and there are no calibration inputs.
            ModelError: The model does not run on them.
        """
        from onnxcomp.passes.transforms.prune.options import PruneOptions
        from onnxcomp.passes.transforms.prune.pruning import prune

        settings, feeds = context.settings, context.feeds() or ()
        if settings.prune_search and not feeds:
            raise UsageError(
                "divisions of a budget are compared by what the outputs lose, and there are no "
                "inputs to see it on",
                hint="give --data, or leave --prune-search out",
            )
        options = PruneOptions(
            ratio=settings.prune_ratio,
            target_flops=settings.target_flops,
            score=settings.prune_score or "obs",
            search=settings.prune_search or 0,
            caches=bool(settings.prune_caches),
            freeze_inputs=settings.freeze_inputs,
            include=settings.include,
            exclude=settings.exclude,
        )
        report = prune(model, options, feeds=feeds)
        return PruneChange(len(report.groups), tuple(_notes(report)), report=report)


class PruneExperts(GraphPass):
    """Mixtures without the experts that the outputs miss least."""

    name: ClassVar[str] = "prune_experts"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Where a number or a share is given."""
        return settings.prune_experts is not None

    def run(self, model: ir.Model, context: Context) -> Change:
        """``W (e, ...) -> W[kept]``: see `experts`."""
        from onnxcomp.passes.transforms.prune.experts import prune_experts

        return prune_experts(model, context)


class PruneLayers(GraphPass):
    """Residual branches that the outputs miss least go."""

    name: ClassVar[str] = "prune_layers"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)

    def wanted(self, settings: Settings) -> bool:
        """Where a number is given."""
        return settings.prune_layers is not None

    def run(self, model: ir.Model, context: Context) -> Change:
        """``x + f(x) -> x``: see `layers`.

        Raises:
            UsageError: There are no calibration inputs.
            ModelError: The model does not run on them.
        """
        from onnxcomp.passes.transforms.prune.layers import prune_layers

        return prune_layers(model, context)


def _notes(report: PruneReport) -> list[str]:
    if not report.groups:
        return ["nothing was pruned"]
    found = [
        f"{group.name} keeps {group.after} of {group.before} {group.kind}"
        for group in report.groups
    ]
    return [*found, *(f"{n} changes from {old} to {new}" for n, old, new in report.inputs)]
