"""One weight, encoded by its values alone, or taken from the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.encoding.dense_fallback import with_fallback
from onnxcomp.passes.encoding.encoded import EncodedWeight, release_pages, weight_error
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.tensors import not_finite
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["encode_by_values", "encode_matrix"]

# A weight whose measured error is this many times the codec's expectation is not one the codec is
# made for (values beyond the range of its scales, say): it stays dense.
_UNUSUAL = 2.0


def _payload(
    site: WeightSite, weight: Array, choice: Choice, cache: PayloadCache | None, jobs: int
) -> Payload:
    codec: Codec = CODECS[choice.codec]
    if cache is None:
        return codec.encode(site, weight, choice.params, threads=jobs)
    key = cache.key(site, weight, codec, choice.params)
    payload = cache.get(key, site, codec, choice.params)
    if payload is None:
        payload = codec.encode(site, weight, choice.params, threads=jobs)
        cache.put(key, payload)
    return payload


def encode_by_values(
    model: ir.Model,
    site: WeightSite,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    *,
    compare: bool = True,
) -> EncodedWeight:
    """A weight of a model with its payload and measured error, or dense with the reason."""
    read = functools.partial(read_weight, model, site)
    return encode_matrix(read, site, choice, cache, jobs, compare=compare)


def encode_matrix(
    read: Callable[[], Array],
    site: WeightSite,
    choice: Choice,
    cache: PayloadCache | None,
    jobs: int,
    *,
    compare: bool = True,
) -> EncodedWeight:
    """The same for a weight from anywhere.

    Args:
        read: Gives its canonical matrix ``(rows, length)``.
        site: The weight.
        choice: What the plan says about it.
        cache: Payloads of earlier runs.
        jobs: Threads of the encoder.
        compare: Whether codecs that have a baseline are compared with it.
    """
    encoded = _encoded(read(), site, choice, cache, jobs)
    return with_fallback(encoded, read, threads=jobs) if compare else encoded


def _encoded(
    weight: Array, site: WeightSite, choice: Choice, cache: PayloadCache | None, jobs: int
) -> EncodedWeight:
    reason = not_finite(weight)
    if reason:
        return EncodedWeight(site, choice, None, reason=reason)
    try:
        payload = _payload(site, weight, choice, cache, jobs)
    except ModelError as error:
        return EncodedWeight(site, choice, None, reason=error.message)
    # The weight and its decoded form are not held in full at the same time.
    release_pages(weight)
    codec = CODECS[choice.codec]
    measured = weight_error(weight, codec.decode(site, payload))
    usual = codec.predict(site, choice.params)
    if codec.measure is not None and choice.error is not None:
        usual = choice.error
    if not measured <= _UNUSUAL * usual:
        reason = f"{choice.codec} has relative error {measured:.3g}, {usual:.3g} is usual"
        return EncodedWeight(site, choice, None, reason=reason)
    return EncodedWeight(site, choice, payload, measured)
