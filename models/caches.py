"""Key-value caches of transformers as plain tensors, by the names that runtimes of decoders expect.

A cache is an object that exporters do not look into. Here it is the list of its tensors,
``past_key_values.0.key`` to ``past_key_values.N.value`` on the way in and ``present.0.key`` to
``present.N.value`` on the way out; that of an encoder-decoder model has ``0.decoder.key`` and
``0.encoder.key``. Caches are known by their attributes: transformers need not be installed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from onnxcomp.errors import UsageError

__all__ = ["PAST", "PRESENT", "SOURCE_AXIS", "filled", "is_cache", "tensors_of"]

# What the names of a cache's tensors start with: as argument, and as result.
PAST, PRESENT = "past_key_values", "present"

# Parts of a cache with two, by attribute.
_PARTS = {"decoder": "self_attention_cache", "encoder": "cross_attention_cache"}

# The axis of positions, and the two tensors of a layer by attribute.
SOURCE_AXIS = 2
_TENSORS = {"key": "keys", "value": "values"}

# Layers of these classes hold every position, so that tensors are all there is to them.
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers, of whatever kind."""
    parts = all(hasattr(value, attribute) for attribute in _PARTS.values())
    return hasattr(value, "get_seq_length") and (parts or hasattr(value, "layers"))


def tensors_of(cache: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths and tensors of a cache, layer by layer: ``(0, "key")`` or ``(0, "decoder", "key")``.

    Raises:
        UsageError: It is empty, or it is of a kind that is more than its tensors.
    """
    parts = {name: getattr(cache, a) for name, a in _PARTS.items() if hasattr(cache, a)}
    found = {name: _layers(part) for name, part in (parts or {"": cache}).items()}
    for index in range(max(map(len, found.values()))):
        for name, layers in found.items():
            for key, attribute in _TENSORS.items():
                path = (index, name, key) if name else (index, key)
                yield path, getattr(layers[index], attribute)


def _layers(cache: Any) -> Sequence[Any]:
    layers = list(cache.layers)
    other = next((layer for layer in layers if type(layer).__name__ not in _GROWING), None)
    if other is not None:
        raise UsageError(
            f"a cache with layers {type(other).__name__} is more than its keys and values",
            hint="give a DynamicCache, or kwargs={'use_cache': False, ...} for a model without one",
        )
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise UsageError(
            f"the {type(cache).__name__} is empty: shapes of its tensors are not known",
            hint="run the model on a token with it first, or take decoder_example(model)",
        )
    return layers


def filled(cache: Any, tensors: Iterator[Any]) -> Any:
    """A cache like the given one that holds other tensors, in the order of `tensors_of`."""
    paths = [path for path, _ in tensors_of(cache)]
    found = {path: next(tensors) for path in paths}
    parts = [name for name, attribute in _PARTS.items() if hasattr(cache, attribute)]
    if not parts:
        return _with_layers(cache, [[found[path] for path in paths if path[0] == i]
                                    for i in range(len(cache.layers))])  # fmt: skip
    result = copy.copy(cache)
    for name in parts:
        part = getattr(cache, _PARTS[name])
        pairs = [
            [found[path] for path in paths if path[:2] == (i, name)]
            for i in range(len(part.layers))
        ]
        setattr(result, _PARTS[name], _with_layers(part, pairs))
    # Keys and values of the encoder are there: nothing is computed for them again.
    result.is_updated = dict.fromkeys(range(len(cache.cross_attention_cache.layers)), True)
    return result


def _with_layers(cache: Any, pairs: Sequence[Sequence[Any]]) -> Any:
    """A copy of a cache, of layers that keep all positions: masks say which are seen."""
    growing = sys.modules[type(cache).__module__].DynamicLayer
    result = copy.copy(cache)
    result.layers = []
    for keys, values in pairs:
        layer = growing()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        result.layers.append(layer)
    return result
