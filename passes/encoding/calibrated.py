"""Encode weights for the inputs that they see, and judge by inputs that were set aside.

Weights are encoded in the order of their use, each for what the model behind the compressed
earlier ones feeds it. Where plain encoding does as well on held-out inputs, it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import Offset, offset_of
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.statistics import Calibration
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.moments import HeldOut, mean_shift
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.journal import Journal, Walk
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Samples, calibration_of, curvature_for, usable
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, Shift, Stats, WeightSite

__all__ = ["Plain", "Samples", "encode_calibrated"]

log = logging.getLogger(__name__)

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
        encoded = _better(weight, own, plain(site), offsets[site.name], jobs)
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


def _better(
    weight: Array, stats: Stats, plain: EncodedWeight, offset: Offset | None, jobs: int
) -> EncodedWeight:
    """The form of a weight, calibrated or plain, that does best on held-out inputs.

    Where its products have an offset of their own, their means are kept by that.
    """
    site, choice = plain.site, plain.choice
    codec, calibration = CODECS[choice.codec], calibration_of(site, choice)
    if plain.payload is None:
        return plain
    fit = _Fit(weight, stats, offset)
    before = fit.of(codec.decode(site, plain.payload))
    if before is None:
        return dataclasses.replace(plain, note="not calibrated: too few inputs to keep some back")
    shifted = dataclasses.replace(plain, output_error=before.error, shift=before.shift)
    if calibration is None or stats.gram.ndim > 2:
        return shifted
    try:
        payload = calibration.encode(site, weight, choice.params, stats, threads=jobs)
    except ModelError as error:
        return dataclasses.replace(shifted, note=f"not calibrated: {error.message}")
    decoded = codec.decode(site, payload)
    after = fit.of(decoded)
    if after is None or not after.error < before.error:
        found = float("nan") if after is None else after.error
        note = f"held-out output error {found:.4g}, plainly encoded {before.error:.4g}"
        note = f"not calibrated: {note}"
        log.info("%s: %s", site.name, note)
        return dataclasses.replace(shifted, note=note)
    found, own = after.error, weight_error(weight, decoded)
    log.info("%s: held-out output error %.4g, plainly encoded %.4g", site.name, found, before.error)
    return EncodedWeight(site, choice, payload, own, output_error=found, shift=after.shift)


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """How well a form of a weight does.

    Attributes:
        error: Relative error of its products on held-out inputs.
        shift: What was added to their offset; None where that is not better.
    """

    error: float
    shift: Shift | None = None


class _Fit:
    """Judges forms of one weight, each with the shift of its offset that keeps means.

    Args:
        weight: ``(rows, length)``.
        stats: Moments of its inputs.
        offset: The constant that is added to its products; None where there is none.
    """

    def __init__(self, weight: Array, stats: Stats, offset: Offset | None) -> None:
        self._weight, self._stats, self._offset = weight, stats, offset
        self._judge = HeldOut(weight, stats)

    def of(self, decoded: Array) -> _Found | None:
        """Of one form; None where no inputs were held out."""
        error = self._judge.error(decoded)
        if error is None or self._offset is None:
            return None if error is None else _Found(error)
        change = mean_shift(self._weight, decoded, self._stats)
        moved = None if change is None else self._judge.error(decoded, change)
        if change is None or moved is None or not moved < error:
            return _Found(error)
        return _Found(moved, self._offset.shift(change))
