"""Tune encoded weights for the outputs of the whole model: scales of codes, and thin factors.

Codes are found weight by weight, for the products next to them. What is left to choose with all of
them known are the scales: few numbers that change no code, no size and no layout. Factors that
products read as they are can be moved as a whole. Both go against the gradient of the distance
between the outputs of the compressed model and the dense one (Adam: Kingma and Ba, arXiv
1412.6980), in steps relative to themselves. Inputs that were set aside decide whether the result is
kept.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.filed_values import filed, let_go
from onnxcomp.passes.calibration.perturbation import stored_form
from onnxcomp.passes.calibration.statistics import HELD_OUT, split_batches
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Payload, Scaling
from onnxcomp.passes.encoding.encoded import EncodedWeight, weight_error
from onnxcomp.passes.encoding.scale_gradients import Groups, ScaleGradients, stored_tensors
from onnxcomp.passes.ir.manifest import own_name, shared_name
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.weight import Array, Feed, WeightSite
from onnxcomp.runtime.activity import activity

__all__ = ["Tuned", "tune"]

log = logging.getLogger(__name__)

# The first and largest step, relative to a scale, and how much of their past the two running means
# of Adam keep.
RATE, _MEMORY = 2e-3, (0.9, 0.95)

# The first and largest step of a factor's elements, relative to their root mean square. In a small
# language model at half of its weights 1.5e-3 and 3e-3 do equally well, and 1e-2 does harm.
FACTOR_RATE = 2e-3

# Elements of the largest input up to which samples run together.
_PIECE = 256

# Pieces that one pass takes at most, evenly from all inputs.
_MOST = 64

# Bytes of initializers above which a model is not tuned: it is in memory twice.
_LARGEST = 1 << 30

# Bytes of factors from which on they, their gradients and the steps' running means lie in files.
_HELD = 1 << 26


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


class _Adam:
    """The steps of numbers on their way.

    Args:
        mean: Zeros, which become the running mean of gradients.
        square: Zeros, which become that of their squares.
    """

    def __init__(self, mean: Array, square: Array) -> None:
        self._mean, self._square = mean, square

    def move(self, gradient: Array, rate: float, number: int) -> Array:
        """What to add for a gradient, the number of the step being counted from 1."""
        first, second = _MEMORY
        self._mean *= first
        self._mean += (1 - first) * gradient
        self._square *= second
        self._square += (1 - second) * np.square(gradient)
        root = np.sqrt(self._square / (1 - second**number))
        step = np.asarray(-rate * (self._mean / (1 - first**number)) / (root + 1e-12))
        let_go(self._mean)
        let_go(self._square)
        return step


class _Scales:
    """The scales of one weight on their way.

    Attributes:
        groups: How they are shared.
        value: The decoded weight as it is stored, float32, changed in place.
    """

    def __init__(self, encoded: EncodedWeight, scaling: Scaling) -> None:
        site, payload = encoded.site, encoded.payload
        assert payload is not None
        self._encoded, self._scaling = encoded, scaling
        decoded = CODECS[encoded.choice.codec].decode(site, payload)
        self.value = stored_form(site, decoded).copy()
        self._start = scaling.read(site, payload).astype(np.float64)
        self.groups = Groups(site, scaling.width(site, payload), self._start.shape[1])
        # Logarithms of factors.
        shape = self._start.shape
        self._way, self._adam = np.zeros(shape), _Adam(np.zeros(shape), np.zeros(shape))

    def step(self, gradient: Array, part: float, number: int) -> None:
        """One step of Adam.

        Args:
            gradient: By logarithms of scales, ``(rows, groups)``.
            part: Size of the step, relative to the first one.
            number: Number of the step, counted from 1.
        """
        move = self._adam.move(gradient, RATE * part, number)
        self._way += move
        self._multiply(np.exp(move).astype(np.float32))

    def _multiply(self, factors: Array) -> None:
        site = self.groups.site
        columns = np.repeat(factors, self.groups.width, axis=1)[:, : site.length]
        self.value *= site.stored_form(columns)

    def payload(self) -> Payload:
        """What is stored with the scales as they are now."""
        encoded = self._encoded
        assert encoded.payload is not None
        scales = self._start * np.exp(self._way)
        return self._scaling.replace(encoded.site, encoded.payload, scales)


class _Tensor:
    """A stored tensor on its way; several weights may read it.

    Args:
        array: The tensor as it is stored.
        kept: Gives the place of an array that is only read and changed in steps.

    Attributes:
        value: The tensor as it is now, float32, changed in place.
        gradient: Room for its gradient.
    """

    def __init__(self, array: Array, kept: Callable[[Array], Array]) -> None:
        self.value = kept(np.array(array, np.float32))
        self._size = float(np.sqrt(np.mean(np.square(self.value, dtype=np.float64))))
        zeros = np.zeros(array.shape, np.float32)
        self.gradient = kept(zeros.copy())
        self._adam = _Adam(kept(zeros.copy()), kept(zeros.copy()))

    def step(self, gradient: Array, part: float, number: int) -> None:
        """One step of Adam, as large as a part of the tensor's root mean square."""
        self.value += self._adam.move(gradient, FACTOR_RATE * part * self._size, number)
        let_go(self.value)
        let_go(gradient)


def tune(
    model: ir.Model,
    weights: Sequence[EncodedWeight],
    feeds: Sequence[Feed],
    passes: int,
    *,
    folder: Path | None = None,
) -> Tuned | None:
    """Tune scales and factors for a model's outputs.

    Args:
        model: The canonical dense model; only read.
        weights: All weights as they are encoded.
        feeds: Calibration inputs by name.
        passes: How often all inputs are gone through.
        folder: Where temporary files lie.

    Returns:
        The weights; None where no weight has scales or factors to tune, the model is too large, or
        inputs are too few to set some aside.

    Raises:
        ModelError: There is no gradient of some operator, or the model does not run.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size > _LARGEST:
        return None
    scales, factored = _all_scales(weights), _all_factored(weights)
    if not scales and not factored:
        return None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        groups = [part.groups for part in scales.values()]
        shifts = [encoded.shift for encoded in weights if encoded.shift is not None]
        fixed = _decoded(weights, {*scales, *factored})
        run = ScaleGradients(model, fixed, groups, Path(place), shifts, list(factored.values()))
        used, held = _pieces(feeds, run)
        if not held:
            return None
        stored = _tensors(list(factored.values()), Path(place))
        moving: dict[str, _Scales | _Tensor] = {**scales, **stored}
        before = _loss(run, held, moving)
        _descend(run, used, moving, passes)
        after = _loss(run, held, moving)
    log.info("tuned: held-out loss %.4g, before %.4g", after, before)
    if not after < before:
        return Tuned(list(weights), before, after)
    payloads = {name: part.payload() for name, part in scales.items()}
    payloads |= {name: _changed(own, moving) for name, own in factored.items()}
    return Tuned([_with(model, e, payloads.get(e.site.name)) for e in weights], before, after)


def _with(model: ir.Model, encoded: EncodedWeight, payload: Payload | None) -> EncodedWeight:
    """A weight with another payload, if there is one; errors of its products are not known then."""
    if payload is None:
        return encoded
    decoded = CODECS[encoded.choice.codec].decode(encoded.site, payload)
    error = weight_error(read_weight(model, encoded.site), decoded)
    return dataclasses.replace(encoded, payload=payload, error=error, output_error=None)


def _tunable(encoded: EncodedWeight) -> bool:
    """Whether it is a float32 weight of the main graph that does not stay as it is."""
    site = encoded.site
    return not (encoded.payload is None or site.scope or site.dtype != "float32" or site.wide)


def _all_scales(weights: Sequence[EncodedWeight]) -> dict[str, _Scales]:
    """The scales of weights, by name, where their codecs have some."""
    result: dict[str, _Scales] = {}
    for encoded in filter(_tunable, weights):
        scaling = CODECS[encoded.choice.codec].scaling
        if scaling is not None and scaling.suits(encoded.site, encoded.choice.params):
            result[encoded.site.name] = _Scales(encoded, scaling)
    return result


def _all_factored(weights: Sequence[EncodedWeight]) -> dict[str, Placement]:
    """Weights whose stored tensors can be trained, by name; offsets are not moved for them."""
    found = (own.placement for own in weights if _tunable(own))
    return {
        own.site.name: dataclasses.replace(own, shift=None)
        for own in found
        if own is not None and own.codec.trainable
    }


def _decoded(
    weights: Sequence[EncodedWeight], moving: Collection[str]
) -> list[tuple[WeightSite, Array]]:
    """The encoded weights that stay as they are, decoded."""
    return [
        (encoded.site, CODECS[encoded.choice.codec].decode(encoded.site, encoded.payload))
        for encoded in weights
        if encoded.payload is not None and encoded.site.name not in moving
    ]


def _tensors(factored: Sequence[Placement], folder: Path) -> dict[str, _Tensor]:
    """What weights are stored in, by name of the initializer; in files where it is much."""
    found: dict[str, Array] = {}
    for placement in factored:
        found |= stored_tensors(placement)
    large = 4 * sum(array.size for array in found.values()) > _HELD

    def kept(array: Array) -> Array:
        return filed(array, folder) if large else array

    return {name: _Tensor(array, kept) for name, array in found.items()}


def _changed(placement: Placement, moving: Mapping[str, _Scales | _Tensor]) -> Payload:
    """The payload with its tensors as they are now."""
    payload, name = placement.payload, placement.site.name
    own = {key: moving[own_name(name, key)].value for key in payload.tensors}
    shared = {key: moving[shared_name(key)].value for key in payload.shared}
    return dataclasses.replace(payload, tensors=own, shared=shared)


def _pieces(feeds: Sequence[Feed], run: ScaleGradients) -> tuple[list[Feed], list[Feed]]:
    """Small inputs to tune with, and those set aside."""
    sizes = (array.size // max(1, len(array)) for array in feeds[0].values() if array.ndim)
    pieces = split_batches(feeds, run.dims, most=max(1, _PIECE // max((1, *sizes))))
    pieces = pieces[:: -(-len(pieces) // _MOST)]
    used = [piece for number, piece in enumerate(pieces) if number % HELD_OUT != HELD_OUT - 1]
    return used, pieces[HELD_OUT - 1 :: HELD_OUT]


def _values(moving: Mapping[str, _Scales | _Tensor]) -> dict[str, Array]:
    return {name: part.value for name, part in moving.items()}


def _room(moving: Mapping[str, _Scales | _Tensor]) -> dict[str, Array]:
    return {name: part.gradient for name, part in moving.items() if isinstance(part, _Tensor)}


def _loss(
    run: ScaleGradients, feeds: Sequence[Feed], moving: Mapping[str, _Scales | _Tensor]
) -> float:
    """Mean loss over inputs."""
    return float(np.mean([run(feed, _values(moving), _room(moving))[0] for feed in feeds]))


def _descend(
    run: ScaleGradients,
    feeds: Sequence[Feed],
    moving: Mapping[str, _Scales | _Tensor],
    passes: int,
) -> None:
    """Adam with steps that fall along a cosine, one for each input."""
    rng = np.random.default_rng(0)
    steps, number = passes * len(feeds), 0
    for _ in range(passes):
        for index in rng.permutation(len(feeds)):
            part = 0.5 * (1.0 + math.cos(math.pi * number / steps))
            activity("tuning", number, steps, "inputs")
            number += 1
            _, gradients = run(feeds[index], _values(moving), _room(moving))
            for name, gradient in gradients.items():
                if np.isfinite(gradient).all():
                    moving[name].step(gradient, part, number)
