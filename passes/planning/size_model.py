"""Exact bytes of an output before anything is encoded.

The model is rewritten with payloads that have the right shapes and types but no memory behind them,
and its serialised size is taken: names, nodes, functions, alignment and all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Codec, LoadMemory, Payload
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import output_size
from onnxcomp.passes.lowering.last_logits import keep_last_logits
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.part_products import passes_of
from onnxcomp.passes.lowering.rewrite import Placement, precision_attributes
from onnxcomp.passes.lowering.row_parts import divided, largest_part
from onnxcomp.passes.lowering.stages import loading_peak
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Kind, WeightSite

__all__ = ["planned_size", "portable_load_bytes", "virtual_payload"]


def virtual_payload(site: WeightSite, choice: Choice, precision: str = "exact") -> Payload:
    """A payload with the layout of the choice; its own tensors read as zeros and take no memory."""
    codec: Codec = CODECS[choice.codec]
    layout = codec.layout(site, choice.params)
    return Payload(
        {name: np.broadcast_to(np.zeros((), t.dtype), t.shape) for name, t in layout.items()},
        codec.shared(site, choice.params),
        {**codec.attributes(site, choice.params), **precision_attributes(precision)},
    )


def planned_size(
    model: ir.Model,
    sites: Iterable[WeightSite],
    choices: Sequence[Choice],
    settings: Settings,
    *,
    name: str = "out.onnx",
) -> int:
    """Bytes of all files of the output if these choices are applied to a copy of the model.

    Args:
        model: The model, canonicalised; it is not changed.
        sites: Its sites.
        choices: One for each site, in the same order.
        settings: Arithmetic, portable bodies and external data of the output.
        name: File name of the output; external data refers to it.
    """
    copy = model.clone()
    placements = [
        _placement(site, choice, settings.precision)
        for site, choice in zip(sites, choices, strict=True)
        if not choice.kept
    ]
    lower(copy, placements, portable=settings.portable, functions=settings.functions)
    if settings.logits_to_keep is not None:
        keep_last_logits(copy, settings.logits_to_keep)
    return output_size(copy, external_data=settings.external_data, name=name)


def portable_load_bytes(sites: Iterable[WeightSite], choices: Sequence[Choice]) -> int:
    """Memory that a session without the operator library takes at its peak to load the output.

    Intermediate results of a piece of the model stay until ONNX Runtime has folded all of it, see
    `lowering.stages`. What a session of any model takes (tens of megabytes) is not in it.
    """
    stored = [pair for pair in zip(sites, choices, strict=True) if not pair[1].kept]
    largest = largest_part([site for site, _ in stored])
    products: list[LoadMemory] = []
    needs: list[LoadMemory] = []
    for site, choice in stored:
        codec = CODECS[choice.codec]
        for kind in _expanded(site, choice):
            need = codec.load_memory(site, choice.params, kind)
            special = kind == "matmul" and codec.special is not None
            found = products if special else needs
            found += divided(need, site, codec, kind, largest)
    passes = passes_of(products, sum(need.kept for need in needs))
    return loading_peak([*(dataclasses.replace(n, passes=passes) for n in products), *needs])


def _expanded(site: WeightSite, choice: Choice) -> list[Kind]:
    """What is expanded on its own: every fused use, and the dense weight once for all others."""
    fusable = CODECS[choice.codec].kinds(site) if choice.mode in ("auto", "fused") else frozenset()
    kinds: list[Kind] = [
        use.need for use in site.uses if use.need != "dense" and use.need in fusable
    ]
    return kinds if len(kinds) == len(site.uses) else [*kinds, "weight"]


def _placement(site: WeightSite, choice: Choice, precision: str) -> Placement:
    payload = virtual_payload(site, choice, precision)
    return Placement(site, CODECS[choice.codec], payload, choice.mode, choice.params)
