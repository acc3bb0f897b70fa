"""A decoder behind one interface, with a KV cache or without one.

Which input and output means what is read from their names, as exporters write them: ``input_ids``,
``attention_mask``, ``position_ids``, ``past_key_values.N.key`` and ``present.N.key``, ``logits``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.evaluate import cannot_run, to_array, to_runtime_value
from onnxcomp.runtime.language.roles import role_of, sized

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Cache", "Decoder", "Interface", "interface_of"]

Array = npt.NDArray[Any]

# ONNX Runtime's names of types, and numpy's.
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_HINT = (
    "a decoder takes input_ids, may take attention_mask, position_ids and past_key_values, and "
    "returns logits"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Cache:
    """One tensor of the KV cache.

    Attributes:
        past: Name of the input.
        present: Name of the output that is the next run's input.
        dtype: Element type.
        shape: Sizes; None for the batch, and for the positions so far, which come last.
    """

    past: str
    present: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def sized(self, batch: int, positions: int) -> tuple[int, ...]:
        """Shape for a batch and a number of positions."""
        return sized(self.shape, batch, positions)


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """The inputs and outputs of a decoder by what they mean; empty where there is none.

    Attributes:
        ids: Tokens ``(batch, length)``.
        mask: Ones ``(batch, positions so far + length)``.
        positions: Numbers of positions ``(batch, length)``.
        branch: Whether the cache holds anything, of decoders that are two models in one.
        caches: The KV cache; empty for a decoder that has none.
        logits: Scores of the next token ``(batch, length, vocabulary)``.
        types: Element types of the inputs by name.
    """

    ids: str
    mask: str
    positions: str
    branch: str
    caches: tuple[Cache, ...]
    logits: str
    types: Mapping[str, str]


def interface_of(session: onnxruntime.InferenceSession) -> Interface:
    """Read what the inputs and outputs of a session mean.

    Raises:
        ModelError: The model is no decoder: it has no tokens or logits, or asks for more.
    """
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    roles: dict[str, str] = {}
    pasts: list[str] = []
    for name, value in inputs.items():
        role = role_of(name, len(value.shape))
        if role == "cache":
            pasts.append(name)
        elif role and role not in roles:
            roles[role] = name
        else:
            raise ModelError(f"a decoder has no input like {name!r}", hint=_HINT)
    if "ids" not in roles:
        raise ModelError(f"none of the inputs {list(inputs)} takes tokens", hint=_HINT)
    logits = _logits(outputs)
    presents = _presents(pasts, [name for name in outputs if name != logits])
    caches = tuple(
        _cache(inputs[past], present) for past, present in zip(pasts, presents, strict=True)
    )
    return Interface(
        ids=roles["ids"],
        mask=roles.get("mask", ""),
        positions=roles.get("positions", ""),
        branch=roles.get("branch", ""),
        caches=caches,
        logits=logits,
        types={name: value.type for name, value in inputs.items()},
    )


def _logits(outputs: Mapping[str, Any]) -> str:
    """The output with the scores: the one of that name, else the only one of three axes."""
    if "logits" in outputs:
        return "logits"
    wide = [name for name, value in outputs.items() if len(value.shape) == 3]
    if len(wide) != 1:
        raise ModelError(f"none of the outputs {list(outputs)} is called logits", hint=_HINT)
    return wide[0]


def _presents(pasts: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """The output that follows each cache: the one of the same name, else the one of its place."""
    by_name = [re.sub(r"past(_key_values)?", "present", name, count=1) for name in pasts]
    if set(by_name) <= set(outputs):
        return by_name
    if len(outputs) < len(pasts):
        raise ModelError(
            f"the model takes {len(pasts)} caches and returns {len(outputs)}", hint=_HINT
        )
    return list(outputs[: len(pasts)])


def _cache(value: Any, present: str) -> Cache:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    if None not in shape or value.type not in _TYPES:
        raise ModelError(
            f"the cache {value.name!r} is {value.type} of the shape {list(value.shape)}",
            hint="export the model with a free number of positions in its cache",
        )
    return Cache(value.name, present, _dtype(value.type), shape)


def _dtype(kind: str) -> np.dtype[Any]:
    name = _TYPES.get(kind, "int64")
    if name == "bfloat16":
        import ml_dtypes

        name = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(name)
    return found


class Decoder:
    """Runs a decoder, and holds its KV cache from one call to the next.

    Args:
        session: A session of the model.

    Attributes:
        interface: Its inputs and outputs.
        position: How many positions the cache holds.

    Raises:
        ModelError: The model is no decoder.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.interface = interface_of(session)
        self._session = session
        self._device = "cuda" if "CUDA" in session.get_providers()[0] else "cpu"
        self.reset()

    def logits(self, tokens: Array) -> Array:
        """Scores after every token, without what came before; the cache is not kept.

        Args:
            tokens: Whole numbers ``(batch, length)``.

        Returns:
            The logits as the model gives them: ``(batch, length, vocabulary)``, or fewer positions
            where it keeps only the last ones.
        """
        self.reset(len(tokens))
        found = self.step(tokens, keep=False)
        self.reset(len(tokens))
        return found

    def reset(self, batch: int = 1) -> None:
        """Empty the cache."""
        self.position = 0
        self._caches: dict[str, Any] = {
            cache.past: to_runtime_value(np.zeros(cache.sized(batch, 0), cache.dtype))
            for cache in self.interface.caches
        }

    def fill(self, positions: int, seed: int = 0) -> None:
        """Put normal noise for that many positions into the cache, to time what comes after."""
        rng = np.random.default_rng(seed)
        self.position = positions
        self._caches = {
            cache.past: to_runtime_value(
                rng.standard_normal(cache.sized(1, positions), np.float32).astype(cache.dtype)
            )
            for cache in self.interface.caches
        }

    def step(self, tokens: Array, *, keep: bool = True) -> Array:
        """Scores after tokens that follow those in the cache.

        Caches stay values of ONNX Runtime, on the device that the model runs on: they are bound
        from one run to the next and never copied.

        Args:
            tokens: Whole numbers ``(batch, length)``.
            keep: Whether the cache is to hold these tokens afterwards.

        Raises:
            ModelError: ONNX Runtime refuses the input or fails.
        """
        form = self.interface
        if keep and not form.caches:
            raise UsageError("the model has no KV cache to continue from", hint=_HINT)
        binding = self._session.io_binding()
        for name, array in self._feed(np.asarray(tokens)).items():
            binding.bind_ortvalue_input(name, to_runtime_value(array))
        for name, value in self._caches.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output(form.logits, "cpu")
        for cache in form.caches if keep else ():
            binding.bind_output(cache.present, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the classes differ between versions and share no base
            raise cannot_run(error) from error
        found, *presents = binding.get_outputs()
        if keep:
            self._caches = {c.past: v for c, v in zip(form.caches, presents, strict=True)}
            self.position += tokens.shape[1]
        scores: Array = to_array(found)
        return scores

    def _feed(self, tokens: Array) -> dict[str, Array]:
        """Everything but the cache, in the types that the model takes."""
        form, (batch, length) = self.interface, tokens.shape
        total = self.position + length
        given = {
            form.ids: tokens,
            form.mask: np.ones((batch, total)),
            form.positions: np.tile(np.arange(self.position, total), (batch, 1)),
            form.branch: np.array([self.position > 0]),
        }
        return {n: a.astype(_dtype(form.types[n])) for n, a in given.items() if n}
