"""Structured pruning of a model: smaller weights in the same graph, no operator of our own.

``W1 (n, k), W2 (m, n) -> W1[K] (|K|, k), W2'[:, K] (m, |K|)`` for the channels K that stay, with
W2' fitted to calibration data. Visits the main graph; what subgraphs read keeps its channels.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.values import SCORES, PruneScore
from onnxcomp.passes.transforms.prune.axes import Analysis, analyse
from onnxcomp.passes.transforms.prune.choose import Numerical, by_obs, by_rank, removed
from onnxcomp.passes.transforms.prune.compensate import Sums
from onnxcomp.passes.transforms.prune.consumers import Consumer, find_consumers
from onnxcomp.passes.transforms.prune.cost import Ledger, measure
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.fits import make_up
from onnxcomp.passes.transforms.prune.groups import Group, Groups, find_groups
from onnxcomp.passes.transforms.prune.observe import moments
from onnxcomp.passes.transforms.prune.prepare import prepare, tidy
from onnxcomp.passes.transforms.prune.probe import probe
from onnxcomp.passes.transforms.prune.qk_products import meeting_steps
from onnxcomp.passes.transforms.prune.report import FitReport, GroupReport, PruneReport
from onnxcomp.passes.transforms.prune.rewrite import remove, take
from onnxcomp.passes.transforms.prune.select import Step
from onnxcomp.passes.weight import Feed

__all__ = ["PruneOptions", "prune"]

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class PruneOptions:
    """How a model is pruned.

    Attributes:
        ratio: Share of the parameters of the layers that can shrink that is to go.
        target_flops: Share of the model's FLOPs that is to stay; instead of `ratio`.
        score: What decides which channels go.
        allocation: "knapsack" for one budget over all layers, "uniform" for the same share of
            each; "auto" is what goes with the score.
        compensate: "fit" to fit what stays, "bias" for biases only, "none".
        numerical: How the score of this name is read.
        least: Share of each group that always stays.
        round_to: Groups of 64 channels or more lose this many at a time.
        caches: Whether inputs and outputs that hold a cache may shrink.
        freeze_inputs: Whether initializers that are also inputs may shrink.
        include: Regular expressions; when given, only groups with a matching weight shrink.
        exclude: Regular expressions of weights that keep their shape.
    """

    ratio: float | None = None
    target_flops: float | None = None
    score: PruneScore = "obs"
    allocation: Literal["auto", "knapsack", "uniform"] = "auto"
    compensate: Literal["fit", "bias", "none"] = "fit"
    numerical: Numerical = Numerical()  # noqa: RUF009
    least: float = 0.1
    round_to: int = 8
    caches: bool = True
    freeze_inputs: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()

    def check(self) -> None:
        """Raise `UsageError` for values out of range."""
        if (self.ratio is None) == (self.target_flops is None):
            raise UsageError(
                "pruning needs either a ratio or a target for FLOPs",
                hint="give --prune-ratio 0.3 or --target-flops 0.7",
            )
        for name in ("ratio", "target_flops"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise UsageError(f"{name} is {value}", hint="it is a share between 0 and 1")
        if self.score not in SCORES:
            raise UsageError(
                f"there is no score {self.score!r}", hint=f"one of {', '.join(SCORES)}"
            )

    @property
    def share(self) -> float:
        """Share that is to go."""
        return self.ratio if self.ratio is not None else 1.0 - (self.target_flops or 0.0)

    @property
    def unit(self) -> str:
        """What the share is of."""
        return "parameters" if self.ratio is not None else "flops"


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
    prepare(model, biases=bool(feeds) and options.compensate == "bias")
    inputs = probe_feeds(model, feeds[0] if feeds else None)
    analysis = analyse(model, inputs, freeze_inputs=options.freeze_inputs, caches=options.caches)
    groups = _allowed(find_groups(analysis), options)
    before = measure(model, analysis.seen)
    ledger = Ledger(analysis, groups, options.unit)
    consumers = find_consumers(analysis)
    steps = _choose(analysis, groups, consumers, ledger, options, feeds, folder)
    classes = removed(steps)
    fits: tuple[FitReport, ...] = ()
    norms: tuple[FitReport, ...] = ()
    if feeds and options.compensate != "none" and classes:
        biases_only = options.compensate == "bias"
        fits, norms = make_up(
            analysis, consumers, ledger.gone, feeds, folder, biases_only=biases_only
        )
    shapes = _declared(model)
    remove(analysis, classes)
    tidy(model)
    changed = tuple(
        (name, shapes[name], text)
        for name, text in _declared(model).items()
        if shapes[name] != text
    )
    after = measure(model, probe(model, [_shrunk(analysis, inputs[0], classes)]))
    return PruneReport(
        asked=options.share,
        reached=ledger.removed,
        unit=options.unit,
        score=options.score if feeds else "magnitude",
        calibrated=bool(feeds),
        before=before,
        after=after,
        groups=_group_reports(groups, steps),
        fits=fits,
        norms=norms,
        inputs=changed,
        kept=groups.kept,
    )


def _allowed(groups: Groups, options: PruneOptions) -> Groups:
    """Groups whose weights the patterns let change."""

    def wanted(group: Group) -> bool:
        def matches(patterns: Sequence[str]) -> bool:
            return any(re.search(p, name) for p in patterns for name in group.weights)

        return (not options.include or matches(options.include)) and not matches(options.exclude)

    return dataclasses.replace(groups, groups=tuple(g for g in groups.groups if wanted(g)))


def _choose(
    analysis: Analysis,
    groups: Groups,
    consumers: Sequence[Consumer],
    ledger: Ledger,
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None,
) -> list[Step]:
    common = {"least": options.least, "round_to": options.round_to}
    needed = _touched(consumers, groups)
    share = options.share
    if options.score == "obs" and options.allocation != "uniform":
        seen = moments(analysis, needed, feeds, folder) if feeds else _unknown(needed)
        more: list[list[Step]] = []
        if feeds:
            more = meeting_steps(
                analysis, groups.groups, consumers, ledger, feeds, folder, **common  # type: ignore[arg-type]
            )  # fmt: skip
        return by_obs(groups.groups, needed, seen, ledger, share, more, **common)  # type: ignore[arg-type]
    found: dict[str, Sums] = {}
    if feeds and options.score != "magnitude":
        found = {consumer.name: sums for consumer, sums in moments(analysis, needed, feeds, folder)}
    uniform = options.allocation == "uniform" or (
        options.allocation == "auto" and options.score in ("wanda", "magnitude")
    )
    score: PruneScore = options.score if feeds else "magnitude"
    return by_rank(
        analysis, groups.groups, needed, found, ledger, share, score, options.numerical,
        uniform=uniform, least=options.least, round_to=options.round_to,
    )  # fmt: skip


def _unknown(consumers: Sequence[Consumer]) -> list[tuple[Consumer, Sums]]:
    """Moments where nothing is known: all inputs alike and independent."""
    found = []
    for consumer in consumers:
        sums = Sums(len(consumer.classes) * consumer.block, 0)
        sums.gram = np.eye(len(sums.gram))
        found.append((consumer, sums))
    return found


def _touched(consumers: Sequence[Consumer], groups: Groups) -> list[Consumer]:
    """Products that read channels of some group."""
    own = {c for g in groups.groups for slot in g.slots for candidate in slot for c in candidate}
    return [consumer for consumer in consumers if own & set(consumer.classes.tolist())]


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


def _group_reports(groups: Groups, steps: Sequence[Step]) -> tuple[GroupReport, ...]:
    gone = removed(steps)
    found = []
    for group in groups.groups:
        alive = [sum(not candidate <= gone for candidate in slot) for slot in group.slots]
        touched = any(step.group is group for step in steps)
        if touched:
            after = max(alive)
            found.append(GroupReport(group.name, group.kind, group.size, after, group.weights))
    return tuple(found)
