"""What is known about a model before its plan is made: from inputs, and from this machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.dataset import SampleSource
from onnxcomp.passes.calibration.perturbation import made_up_inputs
from onnxcomp.passes.calibration.sensitivity import measure_sensitivities, spread
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.latency.model import Timing, measure_timing
from onnxcomp.passes.planning.rank_goals import has_goal
from onnxcomp.passes.planning.sensitivity_prior import sensitivity_prior
from onnxcomp.passes.weight import Feed

__all__ = ["Measurements", "blended", "measure"]

# How far a measured sensitivity is drawn to the prior, in logarithms. With four models of
# speech, images and text, planned on one half of real inputs and judged on the other at a fifth and
# an eighth of the bytes, 0.3 was never worse than 0 and up to a quarter better. Where two parts of
# the inputs disagree more than that, it is as much as they do.
_DOUBT = 0.3


# Inputs whose second moments a plan is made on; encoders use all that are given.
_FEEDS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Measurements:
    """What a plan is made on, besides the weights.

    Attributes:
        prior: How much each weight is taken to matter without any, see `sensitivity_prior`.
        feeds: Real inputs in small batches; None where there are none.
        calibrated: Whether weights will be encoded for these inputs.
        sensitivities: Loss of the outputs over the noise power of each weight, as plans use it;
            empty where nothing is known. Where an error has to be kept, it is their noise power.
        scale: The same over the square of a relative change of each weight's scale.
        measured: Noise power of the outputs over that of each weight, of the weights it was
            measured of.
        noise_scale: The same over the square of a relative change of each weight's scale.
        chance: How much of the differences between sensitivities is chance, 0 to 1.
        timing: What settings cost in time; None where that does not matter.
        by_loss: Whether sensitivities are those of the loss.
    """

    prior: Mapping[str, float]
    feeds: Sequence[Feed] | None = None
    calibrated: bool = False
    sensitivities: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    noise_scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    chance: float = 0.0
    timing: Timing | None = None
    by_loss: bool = False


def blended(
    prior: Mapping[str, float], measured: Mapping[str, float], doubt: float = _DOUBT
) -> dict[str, float]:
    """Measured sensitivities, shrunk towards the prior; the prior where nothing was measured.

    A few inputs do not show all of a model: a branch that none of them takes is not free.

    Args:
        prior: What is expected of all weights, up to a factor, by name.
        measured: Numbers by name; weights may be missing.
        doubt: How far, from 0 to 1; at 1 only the scale is taken from the measurements.
    """
    logs = [math.log(measured[name] / own) for name, own in prior.items() if name in measured]
    if not logs:
        return {}
    scale = math.exp(sum(logs) / len(logs))
    return {
        name: scale * own
        if name not in measured
        else (scale * own) ** doubt * measured[name] ** (1 - doubt)
        for name, own in prior.items()
    }


def measure(
    prepared: Prepared,
    settings: Settings,
    samples: SampleSource,
    *,
    calibrated: bool,
    mixed: bool = False,
) -> Measurements:
    """Look at a model with inputs, as far as a plan can make use of it.

    Where a plan has to keep an error and there are no real inputs, made-up ones tell how large
    errors of the outputs will be, but not which weights matter.

    Args:
        prepared: The model and its weights; only read.
        settings: What is asked for.
        samples: Gives real inputs, where there are any.
        calibrated: Whether weights will be encoded for these inputs.
        mixed: Whether settings differ from weight to weight although no target is set.
    """
    prior = sensitivity_prior(prepared.sites)
    found = _errors(prepared, settings, samples, prior, calibrated=calibrated, mixed=mixed)
    if not settings.timed:
        return found
    feeds = samples.whole()
    timing = measure_timing(prepared.model, prepared.sites, feeds, target=settings.target)
    return dataclasses.replace(found, timing=timing)


def _errors(
    prepared: Prepared,
    settings: Settings,
    samples: SampleSource,
    prior: Mapping[str, float],
    *,
    calibrated: bool,
    mixed: bool,
) -> Measurements:
    """What inputs tell about errors."""
    mixed = mixed or settings.ratio is not None or settings.target_size is not None
    if not mixed and settings.max_error is None:
        if not any(has_goal(policy) for policy in prepared.policies.values()):
            return Measurements(prior)
        found = samples()
        return Measurements(prior, None if found is None else spread(found, _FEEDS), calibrated)
    real = samples()
    if real is not None:
        told = measure_sensitivities(prepared.model, prepared.sites, real)
        aim = told if settings.max_error is not None or told.loss is None else told.loss
        chance = aim.chance(prior)
        return Measurements(
            prior,
            spread(real, _FEEDS),
            calibrated,
            blended(prior, aim.noise, max(_DOUBT, chance)),
            aim.scale,
            told.noise,
            told.scale,
            chance,
            by_loss=aim is told.loss,
        )
    if settings.max_error is None:
        return Measurements(prior)
    return Measurements(prior, sensitivities=_scaled(prepared, settings, prior))


def _scaled(prepared: Prepared, settings: Settings, prior: Mapping[str, float]) -> dict[str, float]:
    """The prior, in the scale of errors of the outputs for made-up inputs."""
    made_up = made_up_inputs(prepared.model, seed=settings.seed)
    measured = measure_sensitivities(prepared.model, prepared.sites, made_up).noise
    total = sum(prior.values())
    fallback = {name: own / total for name, own in prior.items()}
    return blended(prior, measured, doubt=1.0) or fallback
