"""Outputs of decoders that hold keys and values for the next call."""

from __future__ import annotations

import re

import onnx_ir as ir

from onnxcomp.passes.ir.model import copy_model

__all__ = ["is_cache", "without_caches"]

_WORDS = frozenset(("past", "present", "cache"))


def is_cache(value: ir.Value) -> bool:
    """Whether an output is named as exporters name caches: ``present.0.key``."""
    flat = value.shape is not None and len(value.shape) < 3
    return not flat and not _WORDS.isdisjoint(re.findall(r"[a-z]+", (value.name or "").lower()))


def without_caches(model: ir.Model) -> ir.Model:
    """The model without the outputs that are caches, if it has others.

    A decoder returns two of them for each layer beside its logits. What they lose shows in the
    logits as well, by as much as it matters: products with the weights of keys and values would
    count many times over.

    Returns:
        A copy; the model itself where there is nothing to leave out.
    """
    kept = [number for number, value in enumerate(model.graph.outputs) if not is_cache(value)]
    if not kept or len(kept) == len(model.graph.outputs):
        return model
    copy = copy_model(model)
    outputs = [copy.graph.outputs[number] for number in kept]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(outputs)
    return copy
