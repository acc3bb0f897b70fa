"""What another codec would make of the same bytes, and whether a weight had better stay dense.

Some codecs are for models that were trained for them; of other weights they make less than others
do. They name a rival and a limit: every weight they store is compared with the rival at as many
bytes, and stays dense where the error of its products is above the limit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.moments import held_out_error
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.encoding.encoded import Coded, weight_error
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, Stats, WeightSite

__all__ = ["judged"]

log = logging.getLogger(__name__)


def judged(
    site: WeightSite,
    read: Callable[[], Array],
    choice: Choice,
    coded: Coded,
    stats: Stats | None = None,
    *,
    threads: int = 1,
) -> Coded:
    """The coded weight with a word on its rival; the dense weight where the error is too large.

    Args:
        site: The weight.
        read: Gives its canonical matrix ``(rows, length)``; called only where there is a rival.
        choice: What the plan says about it.
        coded: What its codec made of it.
        stats: Inputs of its products; None to judge by the weight's own error.
        threads: Threads of the encoder.
    """
    fallback = CODECS[choice.codec].fallback
    if coded.payload is None or fallback is None:
        return coded
    error = coded.error if coded.output_error is None else coded.output_error
    said = f"{choice.codec} has error {error:.3g}"
    rival = CODECS[fallback.rival]
    params = _fitting(rival, site, coded.payload.nbytes)
    if params is not None:
        other = _error(rival, site, read(), params, stats, threads)
        size = rival.size(site, params)
        said += f", {rival.name} {other:.3g} in {size / coded.payload.nbytes:.2f} times the bytes"
    log.info("%s: %s", site.name, said)
    limit = fallback.limit(choice.params)
    if error > limit:
        return Coded(None, 0.0, f"{said}; {limit:g} is the limit")
    note = "; ".join(part for part in (coded.note, said) if part)
    return dataclasses.replace(coded, note=note)


def _fitting(rival: Codec, site: WeightSite, most: int) -> Params | None:
    """The rival's settings of most bytes within these, or else of fewest; None for no settings."""
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
    """What the rival's error is, on the same inputs; what it expects where it cannot encode."""
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
