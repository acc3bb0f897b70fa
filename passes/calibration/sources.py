"""Where the inputs of a weight's products are: values of the model, and how vectors lie in them.

Visits the main graph; weights used in subgraphs have no statistics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.passes.analysis.einsum_products import einsum_product
from onnxcomp.passes.calibration.im2col import Patches, windows
from onnxcomp.passes.calibration.residual_streams import stream_of
from onnxcomp.passes.weight import Use, WeightSite

__all__ = ["Source", "sources_of", "stream_source", "unobservable", "value_names"]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where input vectors come from.

    Attributes:
        value: Name of the value.
        kind: "rows" where the last axis holds a vector, "columns" where the one before it does,
            "patches" for convolutions, "indices" for look-ups, "stream" for what the product is
            added to.
        patches: Of a convolution.
        normalised: Whether the sum with a stream is normalised next.
        groups: Of a convolution.
    """

    value: str
    kind: str
    patches: Patches | None = None
    normalised: bool = False
    groups: int = 1


def _source(
    node: ir.Node, use: Use, site: WeightSite, convolutions: bool, grouped: bool
) -> Source | str:
    """Where a use reads its vectors, or why that is not known."""
    if use.need == "gather":
        indices = node.inputs[1]
        assert indices is not None
        return Source(indices.name or "", "indices")
    if use.need in ("experts", "batch"):  # moments of what all of its matrices meet
        other = node.inputs[1 - use.input_index]
        assert other is not None
        summed = einsum_product(node, use.input_index)
        if summed is not None and summed.summed != len(summed.perm) - 1:
            return "what is multiplied is not along the last axis of the other operand"
        columns = summed is None and use.input_index == 0
        return Source(other.name or "", "columns" if columns else "rows")
    x = node.inputs[0]
    if use.need == "matmul" and x is not None:
        flipped = node.op_type == "Gemm" and node.attributes.get_int("transA", False)
        return Source(x.name or "", "columns" if flipped else "rows")
    if use.op_type == "Conv" and use.input_index == 1 and not use.path and x is not None:
        if not convolutions:
            return "statistics of convolutions were not asked for"
        cut = windows(node, site.shape[2:])
        groups = node.attributes.get_int("group", 1)
        if cut is None or (groups != 1 and not grouped):
            return "convolution in groups, or with automatic padding"
        return Source(x.name or "", "patches", cut, groups=groups)
    return f"{use.op_type} does not multiply its input with the weight"


def sources_of(
    model: ir.Model, site: WeightSite, convolutions: bool, grouped: bool = False
) -> tuple[tuple[Source, ...], str]:
    """Sources of all uses that can be observed, and a reason where there is no product."""
    nodes = {node.name: node for node in model.graph}
    found: list[Source] = []
    reasons: list[str] = []
    for use in site.uses:
        if use.node not in nodes:
            reasons.append("used inside a subgraph")
            continue
        source = _source(nodes[use.node], use, site, convolutions, grouped)
        if isinstance(source, str):
            reasons.append(source)
        elif source not in found:
            found.append(source)
    if all(source.kind == "indices" for source in found):
        return tuple(found), "; ".join(dict.fromkeys(reasons)) or "only rows are looked up"
    return tuple(found), ""


def unobservable(model: ir.Model, site: WeightSite, *, convolutions: bool = True) -> str:
    """Why the inputs of a site's products cannot be observed; empty when they can."""
    return sources_of(model, site, convolutions)[1]


def stream_source(
    model: ir.Model, site: WeightSite, sources: Sequence[Source]
) -> tuple[Source, ...]:
    """The stream that the only product of a weight is added to."""
    if len(sources) != 1 or sources[0].kind not in ("rows", "patches") or sources[0].groups > 1:
        return ()
    if site.experts > 1:
        return ()
    stream = stream_of(model, site)
    if stream is None:
        return ()
    normalised = stream.normalised and sources[0].kind == "rows"
    return (Source(stream.value, "stream", sources[0].patches, normalised),)


def value_names(sources: Sequence[Source]) -> list[str]:
    """The values that vectors are read from, each once."""
    return list(dict.fromkeys(source.value for source in sources))
