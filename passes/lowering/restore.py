"""Place the weights of a compressed model in another model, as they are stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import offset_of
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import ManifestEntry, read_manifest
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.lowering.expand import stored_payload
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.weight import DOMAIN, Shift, WeightSite

__all__ = [
    "check_match",
    "compressed_records",
    "place_stored",
    "runs_alone",
    "stored_placement",
]


def compressed_records(model: ir.Model) -> dict[str, ManifestEntry]:
    """What was done with each weight that is not stored as it was; empty for a dense model."""
    return {name: r for name, r in read_manifest(model).items() if r.recipe.codec != "dense"}


def check_match(
    records: Mapping[str, ManifestEntry], sites: Collection[WeightSite], hint: str
) -> None:
    """Check that compressed weights are weights of a dense model.

    Args:
        records: The compressed weights.
        sites: Weights of the dense model.
        hint: What to do where they are not.

    Raises:
        ModelError: A weight is not in the dense model, or has another shape there.
    """
    by_name = {site.name: site for site in sites}
    for name, record in records.items():
        if name not in by_name or by_name[name].shape != record.site.shape:
            raise ModelError(
                f"the compressed weight {name!r} does not match a weight of the original", hint=hint
            )


def place_stored(
    model: ir.Model,
    sites: Collection[WeightSite],
    compressed: ir.Model,
    records: Mapping[str, ManifestEntry],
) -> None:
    """``MatMul(x, W) -> HyperMatMul(x, codes, ...)`` with codes that another model has.

    Args:
        model: The dense model; it is changed in place.
        sites: Its weights.
        compressed: The model that stores some of them.
        records: What was done with each of those that are placed, by name.

    Raises:
        ModelError: A tensor is missing or damaged.
    """
    values = initializers(compressed)
    by_name = {site.name: site for site in sites}
    placements = [
        stored_placement(model, by_name[n], record, values) for n, record in records.items()
    ]
    if placements:
        lower(model, placements, portable=runs_alone(compressed))


def runs_alone(compressed: ir.Model) -> bool:
    """Whether a compressed model needs no operator library, as its definitions are inside it."""
    nodes = compressed.graph.all_nodes()
    calls = {node.op_identifier() for node in nodes if node.domain == DOMAIN}
    return calls <= set(compressed.functions)


def stored_placement(
    model: ir.Model, site: WeightSite, record: ManifestEntry, values: Mapping[str, ir.Value]
) -> Placement:
    """One weight as a compressed model stores it, with the offset of its products there.

    Args:
        model: The dense model.
        site: The weight in the dense model.
        record: What was done with it.
        values: Initializers of the compressed model by name.

    Raises:
        ModelError: A tensor is missing or damaged.
    """
    codec = CODECS[record.recipe.codec]
    params = typed_params(codec.params_type, record.recipe.params, codec.name)
    payload = stored_payload(record, values)
    mode = record.recipe.mode
    shift = _stored_shift(model, site, values)
    return Placement(site, codec, payload, mode, params, shift)  # type: ignore[arg-type]


def _stored_shift(
    model: ir.Model, site: WeightSite, values: Mapping[str, ir.Value]
) -> Shift | None:
    """How far a compressed model has moved the offset of a weight's products."""
    offset = offset_of(model, site)
    if offset is None or offset.name not in values:
        return None
    found, own = values[offset.name].const_value, model.graph.initializers[offset.name].const_value
    if found is None or own is None or tuple(found.shape) != tuple(own.shape):
        return None
    change = found.numpy().astype(np.float32) - own.numpy().astype(np.float32)
    return Shift(offset.name, change) if change.any() else None
