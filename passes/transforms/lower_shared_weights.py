"""Find the weights that a model was trained to share, and store them as they were trained.

There are two ways to them. Where a graph looks its weights up in a memory, as the exporters of
torch write it, the memory is there, and `shared_lookups` tells the map. Where weights were
multiplied out, the graph holds dense weights that repeat the entries of a memory.
`onnxcomp.models.export` does that, and leaves a note of memories and layers in the model's
metadata; with it the memory is found again, and every weight is compared with its
expansion bit by bit before anything is replaced. A weight that was changed since stays dense, with
all others of its memory.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.multiplied_out import FoundLayer, FoundMemory, find_memories
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.transforms.recover_memory import recover
from onnxcomp.passes.transforms.sharing_note import KEY, Layer, Memory, read_note
from onnxcomp.passes.transforms.trained_memories import SharedLookups, mark_trained
from onnxcomp.passes.weight import WeightSite

__all__ = ["SharedWeights"]

log = logging.getLogger(__name__)

# Deviation of a new memory's entries in `models.shared_layers`, and how exact ratios of sizes are.
_STD, _NEAR = 0.04, 1e-4


class SharedWeights(GraphPass):
    """Store weights that were trained to share as they were trained."""

    name: ClassVar[str] = "shared_weights"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Where weights may be stored by hashing, or shared ones are asked for."""
        return settings.detect_sharing or bool({"auto", "hash"} & set(settings.method))

    def run(self, model: ir.Model, context: Context) -> Change:
        """``MatMul(x, W) -> HashMatMul(x, memory, ...)`` for weights whose map is known."""
        memories = read_note(model)
        settings: Settings = context.settings
        weights = SharedLookups(model, freeze_inputs=settings.freeze_inputs)
        # Looking for weights that were multiplied out reads them all.
        search = settings.detect_sharing or "hash" in settings.method
        if not memories and not weights.found and not search:
            return Change(0, ())
        found = find_sites(model, min_size=0, include=settings.include, exclude=settings.exclude)
        sites = list(found.sites)
        placements, notes = weights.placements(sites)
        for memory in memories:
            placed = recover(model, memory, _free(sites, placements))
            if placed is None:
                text = f"a memory of {memory.slots} slots: its weights were changed"
                notes.append(f"{text}: they are treated as dense weights")
            placements += placed or []
        if search:
            placements += _searched(model, _free(sites, placements))
        model.metadata_props.pop(KEY, None)
        if placements:
            rewrite(model, placements, portable=settings.portable)
            mark_trained(model)
        weights.remove_unused()
        for note in notes:
            log.warning("%s", note)
        return Change(len(placements), tuple(notes))


def _free(sites: Sequence[WeightSite], placements: Sequence[Placement]) -> list[WeightSite]:
    taken = {placement.site.name for placement in placements}
    return [site for site in sites if site.name not in taken and site.dtype == "float32"]


def _searched(model: ir.Model, sites: Sequence[WeightSite]) -> list[Placement]:
    """Weights of which nothing tells that they share a memory."""
    placements: list[Placement] = []
    sites = [_as_trained(site) for site in sites]
    for found in find_memories((site.name, read_weight(model, site)) for site in sites):
        for memory in _guesses(found):
            placed = recover(model, memory, _free(sites, placements))
            if placed is not None:
                placements += placed
                break
    return placements


def _as_trained(site: WeightSite) -> WeightSite:
    """The weight the way round in which torch has it.

    Fused operators, such as ONNX Runtime's Attention, multiply by a matrix as MatMul does, but are
    no products that we know, which would say so.
    """
    foreign = any("." in use.op_type.rpartition("::")[0] for use in site.uses)
    if not foreign or len(site.shape) != 2 or site.kinds & {"matmul", "gather"}:
        return site
    return dataclasses.replace(
        site, rows=site.length, length=site.rows, transposed=not site.transposed
    )


def _guesses(found: FoundMemory) -> Iterator[Memory]:
    """Memories with the scales that `share` gives to layers, else without any."""
    for layers in (found.layers, found.layers[: found.certain]):
        for first in (*_scales(layers[0]), 1.0):
            scales = [_scale(layer, first) for layer in layers]
            if None in scales:
                continue
            made = [
                Layer(layer.geometry.rows, layer.geometry.length, layer.base, scale)
                for layer, scale in zip(layers, scales, strict=True)
                if scale is not None
            ]
            yield Memory(found.slots, found.seed, tuple(made), found.map)


def _scales(layer: FoundLayer) -> tuple[float, float]:
    """What `share` multiplies the entries of a product or convolution, and of a table by."""
    return 1.0 / math.sqrt(3.0 * layer.geometry.length) / _STD, 1.0 / _STD


def _scale(layer: FoundLayer, first: float) -> float | None:
    """The scale of a layer beside the first one's; None where its entries have another size."""
    known = (1.0,) if first == 1.0 else _scales(layer)
    near = (scale for scale in known if not abs(scale / first / layer.ratio - 1.0) > _NEAR)
    scale = next(near, None)
    return None if scale is None else float(np.float32(scale))
