"""Encode weights for the inputs that they see, and judge by inputs that were set aside.

Weights are encoded in the order of their use, each for what the model behind the compressed
earlier ones feeds it. Where plain encoding does as well on held-out inputs, it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import offset_of
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.encoding.bases import Codecs
from onnxcomp.passes.encoding.better_form import better_form
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.journal import Journal, Walk
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Samples, calibration_of, curvature_for, usable
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["Plain", "Samples", "encode_calibrated"]

# Encodes a weight without calibration.
Plain = Callable[[WeightSite], EncodedWeight]


def encode_calibrated(
    model: ir.Model,
    work: Sequence[WeightSite],
    plan: Plan,
    samples: Samples,
    plain: Plain,
    *,
    cache: PayloadCache | None = None,
    codecs: Codecs | None = None,
    jobs: int = 1,
    folder: Path | None = None,
) -> Iterator[EncodedWeight]:
    """Encode weights, each once, in the order of their use; those not observed come first.

    Args:
        model: The canonical model; only read.
        work: Weights to encode.
        plan: Decisions for them.
        samples: Calibration inputs.
        plain: Encodes a weight without calibration.
        cache: Keeps what is finished, for a run that continues this one; None to keep nothing.
        codecs: Codecs of weights that share something, with that, by name.
        jobs: Threads of the encoders.
        folder: Where temporary files lie.

    Raises:
        ModelError: The model does not run, or inputs of a weight hold NaN or infinite values.
    """
    found = {site.name: calibration_of(site, plan[site.name]) for site in work}
    offsets = {site.name: offset_of(model, site) for site in work}
    able = [site for site in work if found[site.name] or offsets[site.name]]
    anchored = any(calibration.anchored for calibration in found.values() if calibration)
    reference = model if anchored and samples.sequential else None
    streams = any(calibration.streams for calibration in found.values() if calibration)
    tables = [site for site in able if samples.sequential and _looked_up(site)]
    calibration = Calibration(
        model,
        samples.feeds,
        [site for site in able if site not in tables],
        reference=reference,
        streams=streams,
        grouped=True,
        folder=folder,
        threads=jobs,
    )
    first = Calibration(model, samples.feeds, tables, folder=folder, threads=jobs)
    reasons = {**calibration.reasons, **first.reasons}
    observed = {site.name for site in able} - set(reasons)

    def alone(site: WeightSite) -> EncodedWeight:
        encoded = plain(site)
        note = reasons.get(site.name, "")
        encoded = dataclasses.replace(encoded, note=f"not calibrated: {note}" if note else "")
        return with_fallback(encoded, functools.partial(read_weight, model, site), threads=jobs)

    curvature = curvature_for(model, found, able, samples, folder)

    def fitted(site: WeightSite, stats: Stats) -> EncodedWeight:
        outputs = curvature.get(site.name)
        own = usable(dataclasses.replace(stats, site=site, outputs=outputs), found[site.name])
        weight = read_weight(model, site)
        codec = None if codecs is None else codecs.get(site.name)
        encoded = better_form(weight, own, plain(site), codec, offsets[site.name], jobs)
        read = functools.partial(read_weight, model, site)
        return with_fallback(encoded, read, own, threads=jobs)

    others = [site for site in work if site.name not in observed]
    groups = [*first.groups, *calibration.groups]
    order = [(site, plan[site.name]) for site in (*others, *itertools.chain(*groups))]
    names = [[site.name for site in group] for group in groups]
    facts = [names, samples.sequential, reference is not None, streams]
    journal = Journal(cache, model, samples.feeds, order, facts)
    walk = Walk(calibration, journal, sequential=samples.sequential)
    yield from walk.plainly(others, alone)
    # Look-ups of a table come before its products, and all weights between see what is stored: so
    # it is encoded first, for what the dense model feeds its products.
    yield from Walk(first, journal, sequential=False).fitted(fitted, walk)
    yield from walk.fitted(fitted)
    journal.close()


def _looked_up(site: WeightSite) -> bool:
    return any(use.need == "gather" for use in site.uses)
