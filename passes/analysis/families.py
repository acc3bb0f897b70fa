"""Weights that belong together, since their products read the same value: queries, keys, values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.passes.weight import Family, WeightSite

__all__ = ["mark_families"]


def mark_families(model: ir.Model, sites: Sequence[WeightSite]) -> tuple[WeightSite, ...]:
    """The weights, each with the family that it belongs to.

    A weight with several uses, or with one in a subgraph, has none.

    Args:
        model: The canonical model.
        sites: Its weights.
    """
    nodes = {node.name: node for node in model.graph}
    found: dict[tuple[ir.Value, int, str], list[WeightSite]] = {}
    for site in sites:
        source = _source(nodes, site)
        if source is not None:
            found.setdefault((source, site.length, site.dtype), []).append(site)
    families: dict[str, Family] = {}
    for members in found.values():
        names = tuple(site.name for site in members)
        if len(members) > 1:
            family = Family(names[0], names, sum(site.rows for site in members))
            families.update(dict.fromkeys(names, family))
    return tuple(
        dataclasses.replace(site, family=families[site.name]) if site.name in families else site
        for site in sites
    )


def _source(nodes: Mapping[str | None, ir.Node], site: WeightSite) -> ir.Value | None:
    """What the only product of a weight reads; None where that is not the same vectors."""
    if len(site.uses) != 1 or site.uses[0].need != "matmul" or site.constant is not None:
        return None
    node = nodes.get(site.uses[0].node)
    if node is None or (node.op_type == "Gemm" and _flag(node, "transA")):
        return None
    return node.inputs[0]


def _flag(node: ir.Node, name: str) -> bool:
    found = node.attributes.get(name)
    return found is not None and bool(found.as_int())
