"""One weight, encoded by its values alone, or taken from the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import stored_matrix
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.encoding.bases import bound_codecs, shares
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight, decoding_error
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Samples
from onnxcomp.passes.ir.tensors import not_finite
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["ValueEncoder", "encode_by_values", "encode_matrix"]

# A weight whose measured error is this many times the codec's expectation is not one the codec is
# made for (values beyond the range of its scales, say): it stays dense.
_UNUSUAL = 2.0


class ValueEncoder:
    """Encodes the weights of a plan by their values, with what they share.

    Args:
        model: The canonical model; only read.
        work: Weights to encode.
        choices: Decisions for them, by name.
        cache: Payloads of earlier runs.
        jobs: Threads of the encoders.
        samples: Calibration inputs, for what is shared; None to look at values alone.
        folder: Where temporary files lie.

    Attributes:
        codecs: Of weights that share something.
        alone: Whether none does; if not, nothing is cached.
        cache: Payloads of earlier runs; None where nothing is cached.
    """

    def __init__(
        self,
        model: ir.Model,
        work: Sequence[WeightSite],
        choices: Mapping[str, Choice],
        *,
        cache: PayloadCache | None,
        jobs: int,
        samples: Samples | None = None,
        folder: Path | None = None,
    ) -> None:
        self._model, self._choices, self._jobs = model, choices, jobs
        self._compare = samples is None
        self.codecs = bound_codecs(model, work, choices, samples, folder)
        self.alone = not any(map(shares, choices.values()))
        self.cache = cache if self.alone else None

    def __call__(self, site: WeightSite) -> EncodedWeight:
        """One weight with its payload and measured error, or dense with the reason."""
        return encode_by_values(
            self._model,
            site,
            self._choices[site.name],
            self.cache,
            self._jobs,
            compare=self._compare,
            codec=self.codecs.get(site.name),
        )


def _measured(
    site: WeightSite,
    weight: Array,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    codec: Codec,
) -> tuple[Payload, float]:
    """The payload, and the relative error of what it decodes to."""
    key, payload, error = "", None, None
    if cache is not None:
        key = cache.key(site, weight, codec, choice.params)
        payload, error = cache.measured(key, site, codec, choice.params)
    if payload is not None and error is not None:
        return payload, error
    if payload is None:
        payload = codec.encode(site, weight, choice.params, threads=jobs)
    error = decoding_error(weight, codec, site, payload)
    if cache is not None:
        cache.put(key, payload, error)
    return payload, error


def encode_by_values(
    model: ir.Model,
    site: WeightSite,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    *,
    compare: bool = True,
    codec: Codec | None = None,
) -> EncodedWeight:
    """A weight of a model with its payload and measured error, or dense with the reason."""
    read = functools.partial(stored_matrix, model, site)
    return encode_matrix(read, site, choice, cache, jobs, compare=compare, codec=codec)


def encode_matrix(
    read: Callable[[], Array],
    site: WeightSite,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    *,
    compare: bool = True,
    codec: Codec | None = None,
) -> EncodedWeight:
    """The same for a weight from anywhere.

    Args:
        read: Gives its canonical matrix ``(rows, length)``, in any floating-point type.
        site: The weight.
        choice: What the plan says about it.
        cache: Payloads of earlier runs.
        jobs: Threads of the encoder.
        compare: Whether codecs that have a baseline are compared with it.
        codec: The codec of the choice with what it shares with others; None for the codec alone.
    """
    own = CODECS[choice.codec] if codec is None else codec
    encoded = _encoded(read(), site, choice, cache, jobs, own)
    if not compare:
        return encoded
    return with_fallback(encoded, lambda: _single(read()), threads=jobs)


def _single(weight: Array) -> Array:
    return weight.astype(np.float32, copy=False)


def _encoded(
    weight: Array,
    site: WeightSite,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    codec: Codec,
) -> EncodedWeight:
    reason = not_finite(weight)
    if reason:
        return EncodedWeight(site, choice, None, reason=reason)
    if not CODECS[choice.codec].encodes_stored:
        weight = _single(weight)
    try:
        payload, measured = _measured(site, weight, choice, cache, jobs, codec)
    except ModelError as error:
        return EncodedWeight(site, choice, None, reason=error.message)
    usual = codec.predict(site, choice.params)
    if codec.measure is not None and choice.error is not None:
        usual = choice.error
    # Of a basis that others share too it is not known what is usual for one weight.
    if codec.bases is None and not measured <= _UNUSUAL * usual:
        reason = f"{choice.codec} has relative error {measured:.3g}, {usual:.3g} is usual"
        return EncodedWeight(site, choice, None, reason=reason)
    return EncodedWeight(site, choice, payload, measured)
