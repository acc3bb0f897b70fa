"""Which channels go: the way from options and calibration data to steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxcomp.passes.analysis.prune_report import GroupReport
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.choose import Choice, by_obs, by_rank
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.groups import Groups
from onnxcomp.passes.transforms.prune.measured import measuring
from onnxcomp.passes.transforms.prune.observe import moments
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.qk_products import qk_steps
from onnxcomp.passes.transforms.prune.select import Step, group_reports, merge, removed
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Decision", "Division", "decide"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Division:
    """A budget that can be divided between layers in other ways.

    Attributes:
        sequences: All steps of each cluster of groups, in the order in which they go.
        groups: What may go.
        ledger: Knows what is saved; nothing goes, before and after.
        share: What is to be saved.
    """

    sequences: Sequence[Sequence[Step]]
    groups: Groups
    ledger: Ledger
    share: float

    def decision(self, scales: Sequence[float]) -> Decision:
        """What goes where the losses of each sequence count so many times what they did."""
        scaled = [
            [dataclasses.replace(step, loss=scale * step.loss) for step in steps]
            for steps, scale in zip(self.sequences, scales, strict=True)
        ]
        steps = merge(scaled, self.ledger, self.share, trim=True)
        self.ledger.clear()
        return _decision(steps, self.groups, self.ledger, self)

    def spent(self, decision: Decision) -> list[float]:
        """What a decision takes from each sequence."""
        return [
            sum(step.cost for step in steps if step.classes <= decision.classes)
            for steps in self.sequences
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What goes.

    Attributes:
        steps: In the order in which they were taken.
        classes: The classes of atoms that they take.
        groups: Groups that lose something.
        gone: The same classes as ``gone[class]``.
        division: The budget it comes from; None where it was not divided.
    """

    steps: tuple[Step, ...]
    classes: frozenset[int]
    groups: tuple[GroupReport, ...]
    gone: Array
    division: Division | None = None


def decide(
    analysis: Analysis,
    groups: Groups,
    consumers: Sequence[Consumer],
    ledger: Ledger,
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None,
) -> tuple[Decision, ...]:
    """Choose the channels that go.

    Args:
        analysis: Of the model.
        groups: What may go.
        consumers: The products of the model.
        ledger: Knows what is saved; afterwards nothing goes.
        options: How much, and by what score.
        feeds: Calibration data; without any, weights alone decide.
        folder: Where pieces of the model are written for ONNX Runtime.

    Returns:
        One way or several ones; what is expected to do best comes first.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    found: dict[frozenset[int], Decision] = {}
    for choice in _ways(analysis, groups, consumers, ledger, options, feeds, folder):
        division = None
        if choice.sequences:
            division = Division(choice.sequences, groups, ledger, options.share)
        own = _decision(choice.steps, groups, ledger, division)
        found.setdefault(own.classes, own)
    ledger.clear()
    return tuple(found.values())


def _decision(
    steps: Sequence[Step], groups: Groups, ledger: Ledger, division: Division | None
) -> Decision:
    classes = removed(steps)
    gone = np.zeros_like(ledger.gone)
    gone[list(classes)] = True
    return Decision(tuple(steps), classes, group_reports(groups, steps), gone, division)


def _ways(
    analysis: Analysis,
    groups: Groups,
    consumers: Sequence[Consumer],
    ledger: Ledger,
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None,
) -> list[Choice]:
    common = {"least": options.least, "round_to": options.round_to}
    needed = _touched(consumers, groups)
    share = options.share
    if options.score == "obs" and options.allocation != "uniform":
        seen = (
            moments(analysis, needed, feeds, folder, centred=True)
            if feeds
            else ((consumer, None) for consumer in needed)
        )
        more: list[list[Step]] = []
        if feeds:
            more = qk_steps(
                analysis, groups.groups, consumers, ledger, feeds, folder, **common  # type: ignore[arg-type]
            )  # fmt: skip
        limits = (options.least, options.round_to)
        with measuring(
            analysis, groups, needed, feeds, folder, limits, wanted=options.measure
        ) as measured:
            return by_obs(groups.groups, needed, seen, ledger, share, more, measured, **common)  # type: ignore[arg-type]
    observed = needed if feeds and options.score != "magnitude" else []
    found = {consumer.name: sums for consumer, sums in moments(analysis, observed, feeds, folder)}
    uniform = options.allocation == "uniform" or (
        options.allocation == "auto" and options.score in ("wanda", "magnitude")
    )
    score = options.used_score(calibrated=bool(feeds))
    steps = by_rank(
        analysis, groups.groups, needed, found, ledger, share, score, options.numerical,
        uniform=uniform, least=options.least, round_to=options.round_to,
    )  # fmt: skip
    return [Choice(steps)]


def _touched(consumers: Sequence[Consumer], groups: Groups) -> list[Consumer]:
    """Products that read channels of some group."""
    own = {c for g in groups.groups for slot in g.slots for candidate in slot for c in candidate}
    return [consumer for consumer in consumers if own & set(consumer.classes.tolist())]
