"""Arguments to export a language model of transformers with: one step with a filled cache."""

from __future__ import annotations

import inspect
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.models.caches import is_cache
from onnxcomp.models.torch_calls import for_inference, import_torch

__all__ = ["decoder_example"]

# Parameters of `forward` that take a cache, newest name first.
_CACHES = ("cache", "past_key_values")


def decoder_example(
    model: Any, *, batch: int = 2, length: int = 3, past: int = 4
) -> dict[str, Any]:
    """Arguments of `export` for a decoder with a key-value cache.

    ``export(model, (), "decoder.onnx", **decoder_example(model), bits=4)`` writes a decoder with
    the inputs ``input_ids``, ``attention_mask``, ``position_ids`` where the model takes them, and
    ``past_key_values.0.key`` and so on, which returns ``logits`` and ``present.0.key`` and so on.
    Numbers of samples, of tokens and of positions in the cache are free; without a cache yet, its
    tensors have no positions.

    Args:
        model: A language model of transformers, without an encoder.
        batch: Samples of the example.
        length: Tokens of the step.
        past: Positions in the cache.

    Returns:
        The arguments ``kwargs``, ``dynamic_shapes`` and ``checks``: two more steps, of other sizes.

    Raises:
        UsageError: The model has no cache of keys and values alone.
    """
    first, *others = [
        _step(model, *sizes)
        for sizes in ((batch, length, past), (1, length + past, 0), (batch + 1, 1, length + past))
    ]
    free: dict[str, Any] = {
        "input_ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "length"},
    }
    shapes = {name: free.get(name) for name in first if name != "use_cache"}
    return {"kwargs": first, "dynamic_shapes": shapes, "checks": others}


def _step(model: Any, batch: int, length: int, past: int) -> dict[str, Any]:
    """Keyword arguments of one step with tokens at random."""
    torch = import_torch()
    parameters = inspect.signature(model.forward).parameters
    tokens = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, tokens, (batch, past + length))
    # A cache without positions has the shapes of one with a position.
    with for_inference(model):
        found = model(input_ids=ids[:, : max(past, 1)], use_cache=True)
    cache = next((value for value in found.values() if is_cache(value)), None)
    name = next((name for name in _CACHES if name in parameters), None)
    if cache is None or name is None:
        raise UsageError(
            f"{type(model).__name__} has no cache of keys and values",
            hint="export it without one: kwargs={'input_ids': ids, 'use_cache': False}",
        )
    if not past:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    positions = torch.arange(past, past + length).expand(batch, length)
    given = {
        "input_ids": ids[:, past:],
        "attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
        "position_ids": positions,
    }
    return {
        **{key: given[key] for key in given if key in parameters},
        name: cache,
        "use_cache": True,
    }
