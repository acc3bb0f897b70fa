"""What plans of one size are compared by: a rehearsal on real inputs, or on words made up."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.calibration.perturbation import made_up_inputs
from onnxcomp.passes.calibration.sensitivity import small_pieces, spread
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.run import Run
from onnxcomp.passes.driver.state import Subject
from onnxcomp.passes.encoding.calibrated import Samples
from onnxcomp.passes.encoding.rehearsal import Rehearsal
from onnxcomp.passes.planning.contest import Referee
from onnxcomp.passes.weight import Feed

__all__ = ["referee_of"]

log = logging.getLogger(__name__)

# Inputs that plans are compared on: the most, the fewest, and the elements of all together between.
_FEEDS, _FEWEST, _ELEMENTS = 128, 8, 1 << 22

# Weights of models above which plans are not tried: they take minutes to encode and to run.
_LARGEST = 1 << 29

# By what part of the loss with equal bits a plan has to be better where inputs are made up.
_MARGIN = 0.1

# The same where codes are not those that will be written: calibration gains more in layers, and
# less in tables, than is expected of it. SmolLM2 at 75.4 MB was estimated at 0.059 with a mixed
# plan and 0.067 with one bit more for its table; calibrated they lose 0.052 and 0.043.
_ESTIMATED = 0.2

# Of so many inputs every fourth one is kept back from trial codes, to judge them by.
_ENOUGH, _QUARTER = 8, 4

# How many inputs are made up, of words.
_MADE_UP = 16
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)

# The same of numbers that are looked up: words are few and take long.
_WORDS, _PIECE = 1 << 11, 1 << 8


def referee_of(
    prepared: Prepared, settings: Settings, subject: Subject, run: Run
) -> Referee | None:
    """How plans of a size are compared; None where there is no size, or time matters too."""
    if (settings.ratio is None and settings.target_size is None) or settings.timed:
        return None
    real = subject.samples()
    if sum(site.size for site in prepared.sites) > _LARGEST:
        return None if real is not None else Referee()
    if real is not None:
        judged, fitted = _halves(real) if run.calibrates else (real, real)
        pieces = small_pieces(prepared.model, judged, _PIECE)
        samples = Samples(fitted, run.calibration == "sequential") if run.calibrates else None
        rehearsal = Rehearsal(
            prepared, settings, _some(pieces), all_feeds=pieces, samples=samples, jobs=run.jobs
        )
        estimated = rehearsal.estimates
        margin = _ESTIMATED if estimated else 0.0
        return Referee(rehearsal, margin, estimated=estimated, longer=rehearsal.longer)
    words = _made_up_words(prepared, settings.seed)
    if words is None:
        return Referee()
    return Referee(Rehearsal(prepared, settings, words, jobs=run.jobs), _MARGIN)


def _halves(feeds: Sequence[Feed]) -> tuple[list[Feed], list[Feed]]:
    """Inputs to judge by and others to fit to: a quarter and the rest, where there are enough."""
    if len(feeds) < _ENOUGH:
        return list(feeds), list(feeds)
    judged = list(feeds[_QUARTER - 1 :: _QUARTER])
    return judged, [f for n, f in enumerate(feeds) if n % _QUARTER != _QUARTER - 1]


def _some(feeds: Sequence[Feed]) -> list[Feed]:
    """Some of the real inputs, from all over them."""
    size = max(1, max(array.size for array in feeds[0].values()))
    words = any(array.dtype.kind in "iu" and array.ndim > 1 for array in feeds[0].values())
    most = (_WORDS if words else _ELEMENTS) // size
    return spread(feeds, min(_FEEDS, max(_FEWEST, most)))


def _made_up_words(prepared: Prepared, seed: int) -> list[Feed] | None:
    """Inputs made up for a model that looks words up; None for others, and where it refuses them.

    Layers behind a table work on words at random about as hard as on others. What networks for
    pictures and sound do on noise says little: of SqueezeNet's plans with 2 bits, the one that is
    better on made-up pictures is worse on real ones.
    """
    tables = any(use.need == "gather" for site in prepared.sites for use in site.uses)
    inputs = [value for value in prepared.model.graph.inputs if not value.is_initializer()]
    if not tables or not any(value.dtype in _INTEGERS for value in inputs):
        return None
    try:
        return made_up_inputs(prepared.model, seed=seed, samples=_MADE_UP)
    except CompressionError as error:
        log.info("no inputs are made up: %s", error.message)
        return None
