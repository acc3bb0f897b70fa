"""Calibration inputs: whether a plan has a use for them, and how they are used."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import CalibratedEncoding, Codec
from onnxcomp.passes.config.values import CalibrationMode
from onnxcomp.passes.gradients.output_moments import output_moments
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, Feed, Stats, WeightSite

__all__ = [
    "Codecs",
    "Samples",
    "calibration_of",
    "curvature_for",
    "load_samples",
    "usable",
    "warn_of_uncalibrated_factors",
]

log = logging.getLogger(__name__)

# Codecs of weights that share something with others, with that, by name of the weight.
Codecs = Mapping[str, Codec]

# Inputs that the fidelity gate runs when there is calibration data.
_VERIFICATION_FEEDS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """Calibration inputs and how they are used.

    Attributes:
        feeds: Inputs by name.
        sequential: Whether weights are observed behind the compressed earlier ones.
        tune: Passes over them that tune scales for the outputs.
    """

    feeds: Sequence[Feed]
    sequential: bool = True
    tune: int = 0

    @property
    def verification_feeds(self) -> list[Feed]:
        """A few inputs to compare models on, held-out ones where there are any."""
        return list(self.feeds[HELD_OUT - 1 :: HELD_OUT] or self.feeds)[:_VERIFICATION_FEEDS]


def load_samples(
    source: Callable[[], Sequence[Feed] | None],
    mode: CalibrationMode,
    sites: Sequence[WeightSite],
    plan: Plan,
    *,
    tune: int = 0,
) -> Samples | None:
    """Calibration inputs for the encoders; None where they are of no use.

    Args:
        source: Gives the inputs in small batches, or None.
        mode: How they are used.
        sites: The model's weights.
        plan: Decisions for them.
        tune: Passes over the inputs that tune scales for the outputs.

    Raises:
        UsageError: A file cannot be read, or a name, shape or type does not fit the model.
    """
    if mode == "off" or not _uses_samples(sites, plan):
        return None
    feeds = source()
    return None if feeds is None else Samples(feeds, mode == "sequential", tune)


def warn_of_uncalibrated_factors(plan: Plan) -> None:
    """Warn where weights get factors without inputs to fit them to, which loses the most."""
    count = sum(CODECS[choice.codec].ranks is not None for choice in plan)
    if count:
        log.warning(
            "no calibration data: the factors of %d weight%s approximate the weights alone, "
            "not their products; with --data they lose less",
            count,
            "s" if count > 1 else "",
        )


def calibration_of(
    site: WeightSite, choice: Choice, codec: Codec | None = None
) -> CalibratedEncoding | None:
    """How a weight is encoded for its inputs, by its codec or a given one; None where it cannot."""
    found = (CODECS[choice.codec] if codec is None else codec).calibration
    return found if found is not None and found.suits(site, choice.params) else None


def curvature_for(
    model: ir.Model,
    work: Mapping[WeightSite, Choice],
    samples: Samples,
    folder: Path | None = None,
) -> dict[str, Array]:
    """How the loss of the outputs curves by the products of weights that are encoded for that.

    Args:
        model: The canonical model; only read.
        work: Weights, and what the plan says about them.
        samples: Calibration inputs.
        folder: Where temporary files lie.
    """
    found = {site: calibration_of(site, choice) for site, choice in work.items()}
    weighed = [site for site, own in found.items() if own is not None and own.outputs]
    return output_moments(model, weighed, samples.feeds, folder=folder)


def _uses_samples(sites: Sequence[WeightSite], plan: Plan) -> bool:
    """Whether any weight of a plan can be calibrated."""
    return any(calibration_of(site, plan[site.name]) for site in sites if not plan[site.name].kept)


def usable(stats: Stats, calibration: CalibratedEncoding | None) -> Stats:
    """The statistics without what the encoder does not aim at."""
    if calibration is None or not calibration.anchored:
        stats = stats.without_reference()
    if calibration is None or not calibration.outputs:
        stats = dataclasses.replace(stats, outputs=None)
    return stats
