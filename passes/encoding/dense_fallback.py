"""Compare an encoded weight with another codec, and keep it dense where its error is too large.

Some codecs are for models that were trained for them and lose more than others of any other weight.
They have a `DenseFallback`: every weight is compared with a baseline codec at as many
bytes, and stays dense where the error of its products is above a limit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.held_out import held_out_error
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.weight import Array, Stats, WeightSite

__all__ = ["warn_of_losses", "with_fallback"]

log = logging.getLogger(__name__)


# Relative error up to which what a codec does to a weight is nothing to warn of.
_EXACT = 0.01


def warn_of_losses(encoded: Sequence[EncodedWeight]) -> None:
    """Warn of weights at a loss in codecs for models that are trained for them, once for each."""
    losses: dict[str, list[float]] = {}
    for item in encoded:
        if item.payload is None or CODECS[item.choice.codec].fallback is None:
            continue
        error = item.error if item.output_error is None else item.output_error
        if error > _EXACT:
            losses.setdefault(item.choice.codec, []).append(error)
    for name, errors in losses.items():
        fallback = CODECS[name].fallback
        decibels = -20.0 * math.log10(max(errors))
        log.warning(
            "%s loses up to %.0f %% (%.1f dB) of %d weight%s without training for it%s",
            name, 100 * max(errors), decibels, len(errors), "s"[: len(errors) != 1],
            f": {fallback.advice}" if fallback is not None and fallback.advice else "",
        )  # fmt: skip


def with_fallback(
    encoded: EncodedWeight,
    read: Callable[[], Array],
    stats: Stats | None = None,
    *,
    threads: int = 1,
) -> EncodedWeight:
    """The weight with a note on the baseline; the dense weight where its error is too large.

    Args:
        encoded: What its codec made of the weight.
        read: Gives its canonical matrix ``(rows, length)``; called only where there is a baseline.
        stats: Inputs of its products; None to judge by the weight's own error.
        threads: Threads of the encoder.
    """
    site, choice, payload = encoded.site, encoded.choice, encoded.payload
    fallback = CODECS[choice.codec].fallback
    if payload is None or fallback is None:
        return encoded
    error = encoded.error if encoded.output_error is None else encoded.output_error
    said = f"{choice.codec} has error {error:.3g}"
    rival = CODECS[fallback.rival]
    params = _fitting(rival, site, payload.nbytes)
    if params is not None:
        other = _error(rival, site, read(), params, stats, threads)
        size = rival.size(site, params)
        said += f", {rival.name} {other:.3g} in {size / payload.nbytes:.2f} times the bytes"
    log.info("%s: %s", site.name, said)
    limit = fallback.limit(choice.params)
    if error > limit:
        return encoded.dense(f"{said}; {limit:g} is the limit")
    note = "; ".join(part for part in (encoded.note, said) if part)
    return dataclasses.replace(encoded, note=note)


def _fitting(rival: Codec, site: WeightSite, most: int) -> Params | None:
    """The baseline's largest settings within these bytes, else its smallest; None for none."""
    found = list(rival.candidates(site))
    smaller = [params for params in found if rival.size(site, params) <= most]
    return next(iter(smaller), found[-1] if found else None)


def _error(
    rival: Codec,
    site: WeightSite,
    weight: Array,
    params: Params,
    stats: Stats | None,
    threads: int,
) -> float:
    """Error of the baseline on the same inputs; the expected one where it cannot encode."""
    try:
        if stats is None:
            payload = rival.encode(site, weight, params, threads=threads)
            return weight_error(weight, rival.decode(site, payload))
        calibration = rival.calibration
        if calibration is not None and calibration.suits(site, params):
            payload = calibration.encode(site, weight, params, stats, threads=threads)
        else:
            payload = rival.encode(site, weight, params, threads=threads)
    except ModelError:
        return rival.predict(site, params)
    found = held_out_error(weight, rival.decode(site, payload), stats)
    return rival.predict(site, params) if found is None else found
