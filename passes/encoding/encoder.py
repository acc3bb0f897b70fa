"""Encoding the weights of a plan, one at a time.

Threads work inside one weight, never on two of them: memory is bounded by the largest weight, and
the bytes do not depend on the number of threads. Payloads of large models are written to an
unnamed temporary file and mapped back, so that memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.blas_threads import on_one_blas_thread
from onnxcomp.passes.config.options import Progress
from onnxcomp.passes.encoding.by_values import ValueEncoder
from onnxcomp.passes.encoding.calibrated import Plain, Samples, Workers, encode_calibrated
from onnxcomp.passes.encoding.dense_fallback import warn_of_losses
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.kept_means import encode_with_means
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.tuning import tune
from onnxcomp.passes.lowering.rewrite import precision_attributes
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["SPILL_BYTES", "Workers", "encode"]

log = logging.getLogger(__name__)

# Planned payload bytes above which payloads go to a temporary file.
SPILL_BYTES = 1 << 25

_ALIGNMENT = 64


# First byte, shape and type of a tensor in the file.
_Place = tuple[int, tuple[int, ...], "np.dtype[np.generic]"]


class _Spill:
    """An unnamed temporary file that takes tensors and maps them back, all at once at the end."""

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives on in maps
        self._places: dict[str, dict[str, _Place]] = {}
        self._end = 0

    def emptied(self, encoded: EncodedWeight) -> EncodedWeight:
        """A weight without its tensors, which are in the file."""
        payload = encoded.payload
        if payload is None:
            return encoded
        self._places[encoded.site.name] = {k: self._stored(t) for k, t in payload.tensors.items()}
        return dataclasses.replace(encoded, payload=dataclasses.replace(payload, tensors={}))

    def _stored(self, array: Array) -> _Place:
        self._end += -self._end % _ALIGNMENT
        self._file.seek(self._end)
        self._file.write(np.ascontiguousarray(array).data)
        place = (self._end, array.shape, array.dtype)
        self._end += array.nbytes
        return place

    def arrays(self) -> dict[str, dict[str, Array]]:
        """The tensors of all weights, read-only, in one map; the file goes away with them."""
        self._file.flush()
        mapped: Array = np.empty(0, np.uint8)
        if self._end:
            mapped = np.memmap(self._file, np.uint8, mode="r", shape=(self._end,))
        self._file.close()
        return {
            name: {key: _view(mapped, *place) for key, place in places.items()}
            for name, places in self._places.items()
        }

    def left(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file where an error ends the work."""
        if kind is not None:
            self._file.close()


def _view(mapped: Array, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.asarray(mapped[offset : offset + count]).view(dtype).reshape(shape)


def encode(
    model: ir.Model,
    sites: Sequence[WeightSite],
    plan: Plan,
    *,
    jobs: int = 1,
    cache: PayloadCache | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    samples: Samples | None = None,
    workers: Workers | None = None,
) -> list[EncodedWeight]:
    """Encode every site the plan does not keep; the result is in the order of `sites`.

    Args:
        model: The model, canonicalised; it is only read.
        sites: Its sites.
        plan: A settled plan with one choice for each site.
        jobs: Threads of the encoders.
        cache: Payloads of earlier runs.
        progress: Called before each weight and after the last one.
        folder: Where the temporary file lives; None for the system's place.
        samples: Calibration inputs; None to encode plainly.
        workers: Encode weights; None to do so here.

    Raises:
        ModelError: The model does not run on the calibration inputs, or gives NaN.
    """
    work = [site for site in sites if not plan[site.name].kept]
    choices = {site.name: plan[site.name] for site in work}
    values = ValueEncoder(
        model, work, choices, cache=cache, jobs=jobs, samples=samples, folder=folder
    )
    total = sum(site.nbytes for site in work)
    large = sum(plan[site.name].bytes or 0 for site in work) > SPILL_BYTES
    # What workers give is mapped from files, each of which counts as an open one.
    spill = _Spill(folder) if large or workers is not None else None
    done = 0
    found: dict[str, EncodedWeight] = {}

    def plain(site: WeightSite) -> EncodedWeight:
        if progress is not None:
            progress(done, total, site.name)
        return values(site)

    def tell(waiting: int, at: str) -> None:
        if progress is not None:
            progress(done + waiting, total, at)

    with contextlib.ExitStack() as stack:
        if spill is not None:
            stack.push(spill.left)
        encoder: Plain = plain
        if not values.alone:
            workers = None  # what weights share is found here
        if workers is not None and samples is None:
            work = sorted(work, key=lambda site: -site.size)  # no large one is left in the end
            ahead = workers.encoding(model, work, plan, cache=cache, progress=progress)
            encoder = stack.enter_context(ahead)
        if samples is None:
            seed = plan.settings.seed
            results = encode_with_means(model, work, encoder, seed=seed, folder=folder)
        else:
            results = on_one_blas_thread(
                encode_calibrated(
                    model, work, plan, samples, encoder, cache=values.cache, codecs=values.codecs,
                    jobs=jobs, folder=folder, workers=workers, progress=tell,
                )
            )  # fmt: skip
        for encoded in results:
            if spill is not None:  # in this name: the payload must not outlive the next weight's
                encoded = spill.emptied(encoded)
            found[encoded.site.name] = encoded
            done += encoded.site.nbytes
    if progress is not None:
        progress(done, total, "")
    weights = _finished(sites, plan, found, spill)
    if not plan.settings.distill:  # which makes the loss smaller, and says what is left
        warn_of_losses(weights)
    return weights if samples is None else _tuned(model, weights, samples, folder)


def _tuned(
    model: ir.Model, weights: list[EncodedWeight], samples: Samples, folder: Path | None
) -> list[EncodedWeight]:
    """The weights with their scales tuned for the outputs, where that is asked for and helps."""
    if not samples.tune:
        return weights
    try:
        found = tune(model, weights, samples.feeds, samples.tune, folder=folder)
    except ModelError as error:
        log.info("scales are not tuned: %s", error.message)
        return weights
    return weights if found is None else found.weights


def _finished(
    sites: Sequence[WeightSite],
    plan: Plan,
    found: Mapping[str, EncodedWeight],
    spill: _Spill | None,
) -> list[EncodedWeight]:
    """All weights, with their tensors where they were spilled, and with attributes of the run."""
    extra = precision_attributes(plan.settings.precision)
    arrays = {} if spill is None else spill.arrays()
    weights = []
    for site in sites:
        encoded = found.get(site.name)
        if encoded is None:
            encoded = EncodedWeight(site, plan[site.name], None, reason=plan[site.name].reason)
        elif encoded.payload is not None:
            payload = encoded.payload
            tensors = arrays.get(site.name, payload.tensors)
            payload = dataclasses.replace(
                payload, tensors=tensors, attributes={**payload.attributes, **extra}
            )
            encoded = dataclasses.replace(encoded, payload=payload)
        weights.append(encoded)
    return weights
