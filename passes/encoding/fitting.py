"""Encode one weight for the inputs that it sees; the plain form where that does as well."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.held_out import HeldOut
from onnxcomp.passes.codecs.moments import mean_shift
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.samples import calibration_of, usable
from onnxcomp.passes.weight import Array, Shift, Stats

__all__ = ["fitted"]

log = logging.getLogger(__name__)


def fitted(
    read: Callable[[], Array],
    plain: EncodedWeight,
    stats: Stats,
    offset: Offset | None,
    *,
    codec: Codec | None = None,
    threads: int = 1,
) -> EncodedWeight:
    """A weight encoded for its inputs, or plainly, whatever does best on held-out inputs.

    Args:
        read: Gives its canonical matrix ``(rows, length)``.
        plain: The weight encoded by its values.
        stats: Moments of its inputs, or those of a weight that reads the same ones.
        offset: The constant that is added to its products; None where there is none.
        codec: The codec of the choice with what it shares with others; None for the codec alone.
        threads: Threads of the encoder.
    """
    site, choice = plain.site, plain.choice
    codec = CODECS[choice.codec] if codec is None else codec
    last = stats.last and codec.fallback is None  # which is encoded for them as well
    own = usable(dataclasses.replace(stats, site=site, last=last), calibration_of(site, choice))
    encoded = _better(read(), own, plain, codec, offset, threads)
    return with_fallback(encoded, read, own, threads=threads)


def _better(
    weight: Array,
    stats: Stats,
    plain: EncodedWeight,
    codec: Codec,
    offset: Offset | None,
    jobs: int,
) -> EncodedWeight:
    """The form of a weight, calibrated or plain, that does best on held-out inputs.

    Where its products have an offset of their own, their means are kept by that.
    """
    site, choice = plain.site, plain.choice
    calibration = calibration_of(site, choice, codec)
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
