"""Inputs for a model: made up sensibly, or read from the user's files (`load_inputs`)."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.signature import InputSpec, expected, fits, read_signature
from onnxcomp.runtime.stored_inputs import Data, load_inputs

__all__ = ["LARGE", "Data", "Feed", "load_inputs", "synthesize_inputs"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]
PathLike = str | os.PathLike[str]

SAMPLE_RATE = 16000

# Elements of one sample above which fewer are better.
LARGE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes for free dimensions, by what they seem to mean."""

    batch: int
    steps: int  # positions of a sequence
    space: int  # pixels of one side
    wave: int  # samples of a waveform
    past: int  # positions in a cache


# Tried in this order until the model accepts one.
ATTEMPTS = (
    Sizes(2, 16, 224, 512, 4),
    Sizes(1, 16, 224, 512, 4),
    Sizes(1, 16, 64, 16000, 0),
    Sizes(2, 1, 64, 576, 4),
    Sizes(1, 1, 320, 1024, 4),
    Sizes(1, 1, 640, 4096, 0),
    Sizes(1, 128, 256, 48000, 0),
    Sizes(1, 100, 512, 400, 0),
    Sizes(1, 3000, 32, 1, 0),
)

_BATCH = frozenset({"batch", "batchsize", "bs", "b", "n"})
_SPACE = frozenset({"height", "width", "h", "w", "rows", "cols", "columns"})
_STEPS = frozenset({"seq", "sequence", "length", "len", "time", "t", "frames", "tokens", "steps"})


def _words(name: str) -> list[str]:
    """Words of a name in lower case: ``pastSeq_len0`` -> past, seq, len."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[a-z]+", spaced.lower())


class _Dimensions:
    """Sizes of the free dimensions of one attempt; a name has one size everywhere."""

    def __init__(self, sizes: Sizes, known: Mapping[str, int]) -> None:
        self.sizes = sizes
        self._known = dict(known)

    def shape(self, spec: InputSpec) -> tuple[int, ...]:
        """Shape of an input."""
        return tuple(
            dim if isinstance(dim, int) else self._size(spec, axis, dim)
            for axis, dim in enumerate(spec.dims)
        )

    def _size(self, spec: InputSpec, axis: int, name: str | None) -> int:
        if name is None:
            return self._guess(spec, axis, [])
        if name not in self._known:
            parts = name.split("+")
            if len(parts) > 1:  # "past_sequence_length + 1"
                self._known[name] = sum(self._part(spec, axis, part.strip()) for part in parts)
            else:
                self._known[name] = self._guess(spec, axis, _words(name))
        return self._known[name]

    def _part(self, spec: InputSpec, axis: int, text: str) -> int:
        return int(text) if text.isdigit() else self._size(spec, axis, text)

    def _guess(self, spec: InputSpec, axis: int, words: Sequence[str]) -> int:
        sizes, found = self.sizes, set(words)
        if "past" in found or "cache" in found:
            return sizes.past
        if "total" in found:
            return sizes.past + sizes.steps
        if found & _BATCH or _is_batch_of_state(spec, axis):
            return sizes.batch
        if found & _SPACE or axis in _spatial_axes(spec):
            return sizes.space
        waveform = spec.dtype.kind == "f" and axis == len(spec.dims) - 1 and _is_waveform(spec)
        if waveform and axis > 0:
            return sizes.wave
        if found & _STEPS or axis > 0:
            return sizes.steps
        return sizes.batch


def _spatial_axes(spec: InputSpec) -> tuple[int, ...]:
    """Axes of height and width, where one of the others has a few channels."""
    if len(spec.dims) != 4:
        return ()
    if isinstance(spec.dims[1], int) and spec.dims[1] <= 4:
        return (2, 3)
    if isinstance(spec.dims[3], int) and spec.dims[3] <= 4:
        return (1, 2)
    return (2, 3) if isinstance(spec.dims[1], int) and not _is_cache(spec) else ()


def _is_batch_of_state(spec: InputSpec, axis: int) -> bool:
    """(layers, batch, units) of a recurrent network."""
    first = spec.dims[0]
    return axis == 1 and len(spec.dims) == 3 and isinstance(first, int) and first > 1


def _is_waveform(spec: InputSpec) -> bool:
    """(batch, samples) or (batch, 1, samples)."""
    return len(spec.dims) <= 2 or (len(spec.dims) == 3 and spec.dims[1] == 1)


def _is_cache(spec: InputSpec) -> bool:
    return bool({"past", "cache", "key", "value", "state"} & set(_words(spec.name)))


def _integers(spec: InputSpec, shape: tuple[int, ...], sizes: Sizes, rng: Any) -> Array:
    """Whole numbers that mean something: positions, lengths, rates, indices."""
    words = set(_words(spec.name))
    least = min(spec.bound or 8, int(np.iinfo(spec.dtype).max))
    if "mask" in words:
        return np.ones(shape, spec.dtype)
    if "position" in words or "positions" in words:
        count = shape[-1] if shape else 1
        positions = (sizes.past + np.arange(count)) % (spec.bound or 2**31)
        return np.broadcast_to(positions.reshape(shape[-1:]), shape).astype(spec.dtype)
    if "segment" in words or {"token", "type"} <= words:
        return np.zeros(shape, spec.dtype)
    if words & {"sr", "rate", "samplerate"} and len(shape) <= 1:
        return np.full(shape, SAMPLE_RATE, spec.dtype)
    if words & {"length", "lengths", "len", "lens"} and len(shape) <= 1 and spec.bound is None:
        return np.full(shape, sizes.steps, spec.dtype)
    if spec.bound is None and spec.dtype == np.uint8:  # pixels or bytes
        least = 256
    if shape == () and spec.bound is None:
        return np.ones(shape, spec.dtype)
    return np.asarray(rng.integers(0, max(least, 1), shape), spec.dtype)


def _values(spec: InputSpec, shape: tuple[int, ...], sizes: Sizes, rng: Any) -> Array:
    kind = spec.dtype.kind
    if kind == "O":
        return np.full(shape, "a small text", object)
    if kind == "b":  # optimum's use_cache_branch says whether the cache holds anything
        return np.full(shape, "cache" not in _words(spec.name) or sizes.past > 0)
    if kind in "iu":
        return _integers(spec, shape, sizes, rng)
    if kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape), spec.dtype)
    if "mask" in _words(spec.name):
        return np.ones(shape, spec.dtype)
    return np.asarray(rng.standard_normal(shape), np.float32).astype(spec.dtype)


def _feeds(
    specs: Sequence[InputSpec], dimensions: _Dimensions, seed: int, samples: int
) -> list[Feed]:
    shapes = {spec.name: dimensions.shape(spec) for spec in specs}
    return [
        {
            spec.name: _values(
                spec,
                shapes[spec.name],
                dimensions.sizes,
                np.random.default_rng([seed, sample, number]),
            )
            for number, spec in enumerate(specs)
        }
        for sample in range(samples)
    ]


def _fixed(
    specs: Sequence[InputSpec], shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[InputSpec, ...], dict[str, int]]:
    """Specs with the user's shapes in them, and the sizes they give to named dimensions."""
    unknown = sorted(set(shapes) - {spec.name for spec in specs})
    if unknown:
        raise UsageError(f"the model has no input {unknown[0]!r}", hint=expected(specs))
    sizes: dict[str, int] = {}
    result = []
    for spec in specs:
        if spec.name in shapes:
            dims = tuple(int(size) for size in shapes[spec.name])
            if not fits(spec, dims):
                raise UsageError(
                    f"input {spec.name!r} is {spec.text}: it cannot have the shape {list(dims)}"
                )
            for name, size in zip(spec.dims, dims, strict=True):
                if isinstance(name, str) and sizes.setdefault(name, size) != size:
                    raise UsageError(
                        f"dimension {name!r} is given two sizes: {sizes[name]} and {size}"
                    )
            spec = dataclasses.replace(spec, dims=dims)
        result.append(spec)
    return tuple(result), sizes


def _attempts(
    specs: Sequence[InputSpec], known: Mapping[str, int], seed: int, samples: int
) -> Iterator[list[Feed]]:
    """Inputs of one set of sizes after the other, each set of shapes once, huge ones last."""
    choices: dict[tuple[tuple[int, ...], ...], Sizes] = {}
    for sizes in ATTEMPTS:
        dimensions = _Dimensions(sizes, known)
        choices.setdefault(tuple(dimensions.shape(spec) for spec in specs), sizes)
    for shapes in sorted(choices, key=lambda shapes: max(_elements(shapes), LARGE)):
        yield _feeds(specs, _Dimensions(choices[shapes], known), seed, samples)


def _elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes)


def _needs_trial(specs: Sequence[InputSpec]) -> bool:
    """Whether the model may fail on an assumption about its inputs."""
    return any(
        spec.dtype.kind != "f" or any(not isinstance(dim, int) for dim in spec.dims)
        for spec in specs
    )


def synthesize_inputs(
    model: PathLike,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    samples: int = 1,
    trial: Callable[[Feed], object] | None = None,
) -> list[Feed]:
    """Make inputs that the model accepts.

    Indices stay within the tables they look up, masks are ones, positions count up, lengths are
    above 1, everything else is normal noise. Dimensions of one name have one size. Where
    something had to be assumed, the first sample is run once; if it fails, other sizes are tried.

    Args:
        model: The model.
        shapes: Shapes of some inputs, by name; they also fix the dimensions they name.
        seed: Same seed, same inputs.
        samples: How many inputs, different in their values.
        trial: Runs the model on an input, or raises ModelError; None to open a session where
            needed.

    Raises:
        UsageError: `shapes` do not fit the model, or the model fails on everything.
        ModelError: The model cannot be read or loaded.
    """
    from onnxcomp.runtime.evaluate import run_session
    from onnxcomp.runtime.session import open_session

    specs, known = _fixed(read_signature(model), shapes or {})
    attempts = _attempts(specs, known, seed, samples)
    if not _needs_trial(specs):
        return next(attempts)
    if trial is None:
        trial = functools.partial(run_session, open_session(model, library=False))
    refusals: list[ModelError] = []
    for feeds in attempts:
        try:
            trial(feeds[0])
        except ModelError as error:
            refusals.append(error)
        else:
            return feeds
    raise UsageError(
        f"{os.fspath(model)} fails on all made-up inputs; first: {refusals[0].message}",
        hint=f"give shapes (--shape NAME:1,128) or inputs (--data); {expected(specs)}",
    )
