"""Tune the scales of encoded weights for the outputs of the whole model.

Codes are found weight by weight, for the products next to them. What is left to choose with all of
them known are the scales: few numbers that change no code, no size and no layout. They are moved
against the gradient of the distance between the outputs of the compressed model and the dense one
(Adam: Kingma and Ba, arXiv 1412.6980), in steps relative to themselves. Inputs that were set aside
decide whether the result is kept.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.perturbation import stored_form
from onnxcomp.passes.calibration.statistics import HELD_OUT, split_batches
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Scaling
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.scale_gradients import Groups, ScaleGradients
from onnxcomp.passes.weight import Array, Feed
from onnxcomp.runtime.activity import activity

__all__ = ["Tuned", "tune"]

log = logging.getLogger(__name__)

# The first and largest step, relative to a scale, and how much of their past the two running means
# of Adam keep.
RATE, _MEMORY = 2e-3, (0.9, 0.95)

# Elements of the largest input up to which samples run together.
_PIECE = 256

# Pieces that one pass takes at most, evenly from all inputs.
_MOST = 64

# Bytes of initializers above which a model is not tuned: it is in memory twice.
_LARGEST = 1 << 30


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning found.

    Attributes:
        weights: All weights, those with scales with other ones where that gained something.
        before: Loss on held-out inputs before.
        after: That with the scales found.
    """

    weights: list[EncodedWeight]
    before: float
    after: float


class _Scales:
    """The scales of one weight on their way.

    Attributes:
        groups: How they are shared.
        weight: The decoded weight as it is stored, float32, changed in place.
    """

    def __init__(self, encoded: EncodedWeight, scaling: Scaling) -> None:
        site, payload = encoded.site, encoded.payload
        assert payload is not None
        self._encoded, self._scaling = encoded, scaling
        decoded = CODECS[encoded.choice.codec].decode(site, payload)
        self.weight = stored_form(site, decoded).copy()
        self._start = scaling.read(site, payload).astype(np.float64)
        self.groups = Groups(site, scaling.width(site, payload), self._start.shape[1])
        # Logarithms of factors, and the running means of their gradients and of the squares.
        self._way, self._mean, self._square = (np.zeros(self._start.shape) for _ in range(3))

    def step(self, gradient: Array, rate: float, number: int) -> None:
        """One step of Adam, its number counted from 1.

        Args:
            gradient: By logarithms of scales, ``(rows, groups)``.
            rate: Size of the step, relative to the scales.
            number: Number of the step.
        """
        first, second = _MEMORY
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * np.square(gradient)
        root = np.sqrt(self._square / (1 - second**number))
        move = -rate * (self._mean / (1 - first**number)) / (root + 1e-12)
        self._way += move
        self._multiply(np.exp(move).astype(np.float32))

    def _multiply(self, factors: Array) -> None:
        site = self.groups.site
        columns = np.repeat(factors, self.groups.width, axis=1)[:, : site.length]
        self.weight *= site.stored_form(columns)

    def encoded(self, model: ir.Model) -> EncodedWeight:
        """The weight with the scales as they are now; errors of its products are not known."""
        encoded, site = self._encoded, self.groups.site
        assert encoded.payload is not None
        scales = self._start * np.exp(self._way)
        payload = self._scaling.replace(site, encoded.payload, scales)
        decoded = CODECS[encoded.choice.codec].decode(site, payload)
        error = weight_error(read_weight(model, site), decoded)
        return dataclasses.replace(encoded, payload=payload, error=error, output_error=None)


def tune(
    model: ir.Model,
    weights: Sequence[EncodedWeight],
    feeds: Sequence[Feed],
    passes: int,
    *,
    folder: Path | None = None,
) -> Tuned | None:
    """Tune scales for a model's outputs.

    Args:
        model: The canonical dense model; only read.
        weights: All weights as they are encoded.
        feeds: Calibration inputs by name.
        passes: How often all inputs are gone through.
        folder: Where temporary files lie.

    Returns:
        The weights; None where no weight has scales to tune, the model is too large, or inputs are
        too few to set some aside.

    Raises:
        ModelError: There is no gradient of some operator, or the model does not run.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    scales = {} if size > _LARGEST else _all_scales(weights)
    if not scales:
        return None
    fixed = [
        (encoded.site, CODECS[encoded.choice.codec].decode(encoded.site, encoded.payload))
        for encoded in weights
        if encoded.payload is not None and encoded.site.name not in scales
    ]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        groups = [part.groups for part in scales.values()]
        shifts = [encoded.shift for encoded in weights if encoded.shift is not None]
        run = ScaleGradients(model, fixed, groups, Path(place), shifts)
        used, held = _pieces(feeds, run)
        if not held:
            return None
        before = _loss(run, held, scales)
        _descend(run, used, scales, passes)
        after = _loss(run, held, scales)
    log.info("scales tuned: held-out loss %.4g, before %.4g", after, before)
    if not after < before:
        return Tuned(list(weights), before, after)
    names = [encoded.site.name for encoded in weights]
    found = {name: part.encoded(model) for name, part in scales.items()}
    results = [found.get(name, e) for name, e in zip(names, weights, strict=True)]
    return Tuned(results, before, after)


def _all_scales(weights: Sequence[EncodedWeight]) -> dict[str, _Scales]:
    """The scales of float32 weights of the main graph, by name, where their codecs have some."""
    result: dict[str, _Scales] = {}
    for encoded in weights:
        site = encoded.site
        if encoded.payload is None or site.scope or site.dtype != "float32" or site.wide:
            continue
        scaling = CODECS[encoded.choice.codec].scaling
        if scaling is not None and scaling.suits(site, encoded.choice.params):
            result[site.name] = _Scales(encoded, scaling)
    return result


def _pieces(feeds: Sequence[Feed], run: ScaleGradients) -> tuple[list[Feed], list[Feed]]:
    """Small inputs to tune with, and those set aside."""
    sizes = (array.size // max(1, len(array)) for array in feeds[0].values() if array.ndim)
    pieces = split_batches(feeds, run.dims, most=max(1, _PIECE // max((1, *sizes))))
    pieces = pieces[:: -(-len(pieces) // _MOST)]
    used = [piece for number, piece in enumerate(pieces) if number % HELD_OUT != HELD_OUT - 1]
    return used, pieces[HELD_OUT - 1 :: HELD_OUT]


def _stored(scales: Mapping[str, _Scales]) -> dict[str, Array]:
    return {name: part.weight for name, part in scales.items()}


def _loss(run: ScaleGradients, feeds: Sequence[Feed], scales: Mapping[str, _Scales]) -> float:
    """Mean loss over inputs."""
    return float(np.mean([run(feed, _stored(scales))[0] for feed in feeds]))


def _descend(
    run: ScaleGradients, feeds: Sequence[Feed], scales: Mapping[str, _Scales], passes: int
) -> None:
    """Adam with steps that fall along a cosine, one for each input."""
    rng = np.random.default_rng(0)
    steps, number = passes * len(feeds), 0
    for _ in range(passes):
        for index in rng.permutation(len(feeds)):
            rate = RATE * 0.5 * (1.0 + math.cos(math.pi * number / steps))
            activity("tuning scales", number, steps, "inputs")
            number += 1
            _, gradients = run(feeds[index], _stored(scales))
            for name, gradient in gradients.items():
                if np.isfinite(gradient).all():
                    scales[name].step(gradient, rate, number)
