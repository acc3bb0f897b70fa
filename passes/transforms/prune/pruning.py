"""Structured pruning of a model: smaller weights in the same graph, no operator of our own.

``W1 (n, k), W2 (m, n) -> W1[K] (|K|, k), W2'[:, K] (m, |K|)`` for the channels K that stay, with
W2' fitted to calibration data. Visits the main graph; what subgraphs read keeps its channels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import find_consumers
from onnxcomp.passes.transforms.prune.cost import Ledger, measure
from onnxcomp.passes.transforms.prune.decide import decide
from onnxcomp.passes.transforms.prune.examine import examine
from onnxcomp.passes.transforms.prune.observed_shapes import observe_shapes
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.prepare import tidy
from onnxcomp.passes.transforms.prune.reconstruct import fit
from onnxcomp.passes.transforms.prune.shrink import remove, take
from onnxcomp.passes.weight import Feed

__all__ = ["prune"]


def prune(
    model: ir.Model,
    options: PruneOptions,
    *,
    feeds: Sequence[Feed] = (),
    folder: Path | None = None,
) -> PruneReport:
    """Take channels out of a model, in place.

    Args:
        model: A canonical model.
        options: What to take out.
        feeds: Calibration data; without any, weights alone decide, and nothing is fitted.
        folder: Where pieces of the model are written for ONNX Runtime.

    Returns:
        What was done; `PruneReport.met` is false where floors or the graph forbid the share.

    Raises:
        UsageError: An option is out of range.
        ModelError: ONNX Runtime cannot run the model.
    """
    options.check()
    examined = examine(
        model,
        feeds[0] if feeds else None,
        biases=bool(feeds) and options.compensate == "bias",
        freeze_inputs=options.freeze_inputs,
        caches=options.caches,
        include=options.include,
        exclude=options.exclude,
    )
    analysis, groups = examined.analysis, examined.groups
    before = measure(model, analysis.seen)
    ledger = Ledger(analysis, groups, options.unit)
    consumers = find_consumers(analysis)
    decisions = decide(analysis, groups, consumers, ledger, options, feeds, folder)
    made_up = fit(analysis, consumers, decisions, options, feeds, folder)
    classes = made_up.decision.classes
    ledger.remove(classes)
    shapes = _declared(model)
    remove(analysis, classes)
    tidy(model)
    changed = tuple(
        (name, shapes[name], text)
        for name, text in _declared(model).items()
        if shapes[name] != text
    )
    tuned = None if changed else made_up.tune(model, options, feeds, folder)
    after = measure(model, observe_shapes(model, [_shrunk(analysis, examined.feed, classes)]))
    return PruneReport(
        asked=options.share,
        reached=ledger.removed,
        unit=options.unit,
        score=options.used_score(calibrated=bool(feeds)),
        calibrated=bool(feeds),
        before=before,
        after=after,
        groups=made_up.decision.groups,
        fits=made_up.fits,
        norms=made_up.norms,
        inputs=changed,
        kept=groups.kept,
        tuned=tuned,
        searched=made_up.searched,
    )


def _shrunk(analysis: Analysis, feed: Feed, classes: Collection[int]) -> Feed:
    """Inputs of the model for what is left of it: caches lose positions."""
    gone = np.isin(analysis.relations.classes, list(classes))
    found = dict(feed)
    for member in analysis.members:
        name = member.value.name or ""
        if member.value.const_value is None and name in found:
            found[name] = take(found[name], member.axes, ~gone[member.atoms])
    return found


def _declared(model: ir.Model) -> dict[str, str]:
    """Shapes of inputs and outputs as text."""
    values = [v for v in model.graph.inputs if not v.is_initializer()] + list(model.graph.outputs)
    return {
        value.name or "": "[" + ", ".join(_size(dim) for dim in value.shape or ()) + "]"
        for value in values
    }


def _size(dim: object) -> str:
    return str(dim) if isinstance(dim, int) else str(getattr(dim, "value", dim) or "?")
