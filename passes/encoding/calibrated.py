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
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.statistics import HELD_OUT, Calibration
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.moments import HeldOut
from onnxcomp.passes.codecs.protocol import CalibratedEncoding
from onnxcomp.passes.config.values import CalibrationMode
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, Feed, Stats, WeightSite

__all__ = [
    "Samples",
    "encode_calibrated",
    "load_samples",
    "warn_of_uncalibrated_factors",
]

log = logging.getLogger(__name__)

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


# Encodes a weight without calibration.
Plain = Callable[[WeightSite], EncodedWeight]


def _calibration(site: WeightSite, choice: Choice) -> CalibratedEncoding | None:
    """How a weight is encoded for its inputs; None where it cannot be."""
    found = CODECS[choice.codec].calibration
    return found if found is not None and found.suits(site, choice.params) else None


def _uses_samples(sites: Sequence[WeightSite], plan: Plan) -> bool:
    """Whether any weight of a plan can be calibrated."""
    return any(_calibration(site, plan[site.name]) for site in sites if not plan[site.name].kept)


def encode_calibrated(
    model: ir.Model,
    work: Sequence[WeightSite],
    plan: Plan,
    samples: Samples,
    plain: Plain,
    *,
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
        jobs: Threads of the encoders.
        folder: Where temporary files lie.

    Raises:
        ModelError: The model does not run, or inputs of a weight hold NaN or infinite values.
    """
    found = {site.name: _calibration(site, plan[site.name]) for site in work}
    able = [site for site in work if found[site.name] is not None]
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
        folder=folder,
        threads=jobs,
    )
    first = Calibration(model, samples.feeds, tables, folder=folder, threads=jobs)
    reasons = {**calibration.reasons, **first.reasons}
    observed = {site.name for site in able} - set(reasons)

    def replace(encoded: EncodedWeight) -> None:
        if samples.sequential and encoded.payload is not None:
            codec = CODECS[encoded.choice.codec]
            calibration.replace(encoded.site, codec.decode(encoded.site, encoded.payload))

    for site in work:
        if site.name in observed:
            continue
        encoded = plain(site)
        note = reasons.get(site.name, "")
        encoded = dataclasses.replace(encoded, note=f"not calibrated: {note}" if note else "")
        read = functools.partial(read_weight, model, site)
        encoded = with_fallback(encoded, read, threads=jobs)
        yield encoded
        replace(encoded)
    # Look-ups of a table come before its products, and all weights between see what is stored: so
    # it is encoded first, for what the dense model feeds its products.
    for group, stats in itertools.chain(first, calibration):
        for site in group:
            own = _usable(dataclasses.replace(stats, site=site), found[site.name])
            weight = read_weight(model, site)
            encoded = _better(weight, own, plain(site), jobs)
            read = functools.partial(read_weight, model, site)
            encoded = with_fallback(encoded, read, own, threads=jobs)
            replace(encoded)
            yield encoded


def _looked_up(site: WeightSite) -> bool:
    return any(use.need == "gather" for use in site.uses)


def _usable(stats: Stats, calibration: CalibratedEncoding | None) -> Stats:
    """The statistics without what the encoder does not aim at."""
    if calibration is None or not calibration.anchored:
        stats = dataclasses.replace(stats, cross=None, held_cross=None, held_reference=None)
    if calibration is None or not calibration.streams:
        stats = dataclasses.replace(stats, missing=None, held_missing=None)
    return stats


def _better(weight: Array, stats: Stats, plain: EncodedWeight, jobs: int) -> EncodedWeight:
    """The calibrated form of a weight where it is better than the plain one."""
    site, choice = plain.site, plain.choice
    codec, calibration = CODECS[choice.codec], _calibration(site, choice)
    if plain.payload is None or calibration is None:
        return plain
    judge = HeldOut(weight, stats)
    before = judge.error(codec.decode(site, plain.payload))
    if before is None:
        return dataclasses.replace(plain, note="not calibrated: too few inputs to keep some back")
    try:
        payload = calibration.encode(site, weight, choice.params, stats, threads=jobs)
    except ModelError as error:
        note = f"not calibrated: {error.message}"
        return dataclasses.replace(plain, output_error=before, note=note)
    decoded = codec.decode(site, payload)
    after = judge.error(decoded)
    if after is None or not after < before:
        note = f"not calibrated: held-out output error {after:.4g}, plainly encoded {before:.4g}"
        log.info("%s: %s", site.name, note)
        return dataclasses.replace(plain, output_error=before, note=note)
    log.info("%s: held-out output error %.4g, plainly encoded %.4g", site.name, after, before)
    return EncodedWeight(site, choice, payload, weight_error(weight, decoded), output_error=after)
