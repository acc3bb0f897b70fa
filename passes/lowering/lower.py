"""Everything between payloads and the model that is written: the rewrite, and its definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import apply_shift
from onnxcomp.passes.config.values import Functions
from onnxcomp.passes.ir.manifest import (
    ManifestEntry,
    compressed_tensors,
    read_manifest,
    shared_name,
    write_manifest,
)
from onnxcomp.passes.ir.traversal import remove_initializer
from onnxcomp.passes.lowering.inline_bodies import inline_bodies, inline_expansions
from onnxcomp.passes.lowering.joined_weights import join_weights
from onnxcomp.passes.lowering.part_products import divide_products
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.lowering.row_parts import largest_part
from onnxcomp.passes.lowering.stages import stage_loading

__all__ = ["lower"]


def lower(
    model: ir.Model,
    placements: Sequence[Placement],
    *,
    portable: bool = True,
    functions: Functions = "local",
) -> None:
    """Put payloads in the place of weights, and definitions where they are asked for; in place.

    Args:
        model: The model the sites were found in.
        placements: At most one for each site; may be none.
        portable: Whether the model is to run without the operator library.
        functions: The form of the definitions.

    Raises:
        ModelError: A site is not in the model, or its definitions cannot be inlined.
    """
    staged = portable and functions == "local"
    for shift in (placement.shift for placement in placements if placement.shift is not None):
        apply_shift(model, shift)
    if placements:
        largest = largest_part([placement.site for placement in placements]) if staged else None
        rewrite(model, placements, portable=portable, largest=largest)
    if staged:
        divide_products(model, placements)
        stage_loading(model, placements)
        join_weights(model, placements)
        inline_expansions(model)
    elif portable:
        inline_bodies(model, foldable=functions == "inline")
    joined = {
        shared_name(key)
        for placement in placements
        if placement.codec.special is not None
        for key in placement.payload.shared
    }
    _drop_constants(model, joined)


def _drop_constants(model: ir.Model, joined: AbstractSet[str]) -> None:
    """Take constants of ours away that nobody reads: ONNX Runtime warns of each.

    Shapes are joined after nodes were made for them. What the manifest lists is read by that.

    Args:
        model: The model.
        joined: Names of what the manifest lists for codecs that join weights. Nodes that expand
            several weights do not cut each, and what is left unread is no part of decoding.
    """
    listed, dropped = compressed_tensors(model) - joined, set()
    for name, value in list(model.graph.initializers.items()):
        ours = name.startswith(shared_name("")) and name not in listed
        if ours and not value.uses() and not value.is_graph_output():
            remove_initializer(value)
            dropped.add(name)
    if dropped & joined:
        write_manifest(model, {k: _without(v, dropped) for k, v in read_manifest(model).items()})


def _without(entry: ManifestEntry, names: AbstractSet[str]) -> ManifestEntry:
    """An entry that does not list these shared tensors."""
    kept = [key for key in entry.recipe.shared if shared_name(key) not in names]
    return dataclasses.replace(entry, recipe=dataclasses.replace(entry.recipe, shared=kept))
