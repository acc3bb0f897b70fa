"""Ways to choose what goes, tried: the model is fitted to each, and the outputs decide.

Losses of single layers say little of what is left of them once all layers behind are fitted. So the
budget is divided in more than one way, and the better model is kept.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.prune_report import FitReport, SearchReport
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.consumers import Consumer
from onnxcomp.passes.transforms.prune.decide import Decision
from onnxcomp.passes.transforms.prune.fits import make_up
from onnxcomp.passes.transforms.prune.observe import masked_members
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.transforms.prune.qk_products import silenced
from onnxcomp.passes.transforms.prune.search import search
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Trial", "best_trial"]

log = logging.getLogger(__name__)

# Inputs on which ways are compared, at most.
_INPUTS = 32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """One way, and what fits make of the model without those channels.

    Attributes:
        decision: What goes.
        reports: What became of products and of normalisations.
        changed: Initializers and what they become.
    """

    decision: Decision
    reports: tuple[tuple[FitReport, ...], tuple[FitReport, ...]]
    changed: Mapping[ir.Value, ir.TensorProtocol]


def best_trial(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    decisions: Sequence[Decision],
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None = None,
) -> tuple[Trial, SearchReport | None]:
    """Fit the model to each decision, and keep the one whose outputs lose least.

    Other divisions of its budget are tried from there, as many as options say.

    Args:
        analysis: Of the model, which is as before in the end.
        consumers: Its products.
        decisions: Ways to choose what goes; one alone is not compared.
        options: How it is pruned.
        feeds: Calibration data. Outputs are compared on all of it, as those inputs that fits set
            aside are few; where some fit has few vectors to go by, on these alone.
        folder: Where pieces of the model are written.

    Returns:
        The best trial, and what the search for it found; None where there was no search.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    trials = [_trial(analysis, consumers, own, options, feeds, folder) for own in decisions]
    if len(trials) == 1 and not options.search:
        return trials[0], None
    apart = any(fit.few for trial in trials for fit in trial.reports[0])
    losses = _losses(analysis, trials, feeds, folder, apart=apart)
    best = min(trials, key=losses.__getitem__)
    if not options.search:
        return best, None

    def attempt(decision: Decision) -> tuple[Trial, float]:
        own = _trial(analysis, consumers, decision, options, feeds, folder)
        return own, _losses(analysis, [own], feeds, folder, apart=apart)[own]

    return search(best.decision, best, losses[best], attempt, options.search)


def _trial(
    analysis: Analysis,
    consumers: Sequence[Consumer],
    decision: Decision,
    options: PruneOptions,
    feeds: Sequence[Feed],
    folder: Path | None,
) -> Trial:
    """Fit the model to one decision; it is as before when this returns."""
    dense = {value: value.const_value for value in analysis.model.graph.initializers.values()}
    reports = make_up(
        analysis,
        consumers,
        decision.gone,
        feeds,
        folder,
        biases_only=options.compensate == "bias",
        behind=options.behind,
    )
    changed = {}
    for value, tensor in dense.items():
        if value.const_value is not tensor and value.const_value is not None:
            changed[value] = value.const_value
            value.const_value = tensor
    return Trial(decision, reports, changed)


def _losses(
    analysis: Analysis,
    trials: Sequence[Trial],
    feeds: Sequence[Feed],
    folder: Path | None,
    *,
    apart: bool,
) -> dict[Trial, float]:
    """What the outputs lose in each trial."""
    changed = [_weights(analysis, trial) for trial in trials]
    names = {name for weights in changed for name in weights}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        loss = OutputLoss(analysis.model, sorted(names), feeds, _INPUTS, Path(place), apart=False)
        found = {trial: loss(own) for trial, own in zip(trials, changed, strict=True)}
    log.info("losses of outputs by the ways to choose: %s", list(found.values()))
    return found


def _weights(analysis: Analysis, trial: Trial) -> dict[str, Array]:
    """All weights that differ from the model's, with zeros where channels go."""
    own = {value.name or "": tensor.numpy() for value, tensor in trial.changed.items()}
    gone = trial.decision.gone
    return silenced(analysis, gone, masked_members(analysis, gone, set(own)) | own)
