"""Weights with what is known of their inputs, and of what the loss feels of their products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.sources import unobservable
from onnxcomp.passes.calibration.statistics import collect
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.gradients.output_moments import output_moments
from onnxcomp.passes.planning.measurements import Measurements
from onnxcomp.passes.weight import Array, Stats, WeightSite

__all__ = ["observed"]


def observed(prepared: Prepared, known: Measurements) -> Iterator[tuple[WeightSite, Stats | None]]:
    """All weights, each with the second moments of its inputs where they can be had.

    Args:
        prepared: The model and its weights; only read.
        known: Has the inputs.

    Raises:
        ModelError: The model does not run on the inputs, or gives NaN.
    """
    model, sites, feeds = prepared.model, prepared.sites, known.feeds
    able = [] if feeds is None else [site for site in sites if not unobservable(model, site)]
    names = {site.name for site in able}
    yield from ((site, None) for site in sites if site.name not in names)
    if not able or feeds is None:
        return
    curvature = _curvature(prepared, known)
    for stats in collect(model, feeds, able):
        # What is in files goes with the last who looks at it.
        outputs = curvature.pop(stats.site.name, None)
        yield stats.site, dataclasses.replace(stats, outputs=outputs)


def _curvature(prepared: Prepared, known: Measurements) -> dict[str, Array]:
    """How the loss curves by the products of weights, where a codec weighs their errors by it."""
    if known.feeds is None or not known.calibrated:
        return {}
    wanted = [site for site in prepared.sites if _all_weighed(prepared.policies[site.name].methods)]
    return output_moments(prepared.model, wanted, known.feeds)


def _all_weighed(methods: Sequence[str]) -> bool:
    """Whether some codec weighs errors by the loss, and all that measure products do."""
    codecs = [CODECS[name] for name in methods]
    weighed = [codec.calibration is not None and codec.calibration.outputs for codec in codecs]
    measured = [codec.measure is not None for codec in codecs]
    return any(weighed) and all(w for w, m in zip(weighed, measured, strict=True) if m)
