"""Place the weights of a compressed model in another model, as they are stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import ManifestEntry
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.lowering.expand import stored_payload
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.weight import DOMAIN, WeightSite

__all__ = ["place_stored", "runs_alone", "stored_placement"]


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
    placements = [stored_placement(by_name[n], record, values) for n, record in records.items()]
    if placements:
        lower(model, placements, portable=runs_alone(compressed))


def runs_alone(compressed: ir.Model) -> bool:
    """Whether a compressed model needs no operator library, as its definitions are inside it."""
    calls = any(node.domain == DOMAIN for node in compressed.graph.all_nodes())
    return bool(compressed.functions) or not calls


def stored_placement(
    site: WeightSite, record: ManifestEntry, values: Mapping[str, ir.Value]
) -> Placement:
    """One weight as a compressed model stores it.

    Args:
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
    return Placement(site, codec, payload, mode, params)  # type: ignore[arg-type]
