"""Tensors that are constants and no trained weights: masks, grids, position tables, filter banks.

Codes of few bits do more harm to them than to weights: an anchor grid with an error of 10 % moves
boxes by pixels, a mask of -1000 leaks. They are recognised by what reads them and by what they
hold, and both have to fit, since a wrong guess costs bytes:

=============  ====================================================================================
role           content that makes it a constant
=============  ====================================================================================
rotary cache   anything: the operator says what it is
elementwise    few distinct values, a lattice, or sequences. Trained tensors here (learned
               positions, scales of channels) have about as many values as elements
look-up        integers, two values, or sequences; a table of embeddings is none of these
product        a selection (zeros and one other value, at most one in each row or column), one
               line again and again, sequences, windowed Fourier rows, wavelets, a square
               orthogonal matrix, or bands of a filter bank
=============  ====================================================================================

`constant_content` tells the contents. A look-up or a product reaches through Slice, Cast, Concat
and the like, and out of the branches of If, to what computes with it or to an output of the model.
A tensor that is an operand of a product and of something else is judged as the former.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.constant_content import (
    TRANSFORMS,
    computed_content,
    distinct,
    may_be,
    product_content,
    sample,
)
from onnxcomp.passes.analysis.def_use import qualified_type
from onnxcomp.passes.analysis.weight_sites import read_weight, stored_matrix
from onnxcomp.passes.codecs.constant import ConstantCodec, ConstantParams
from onnxcomp.passes.ir.threads import in_threads
from onnxcomp.passes.ir.traversal import (
    default_opset,
    find_initializer,
    is_default_domain,
    scopes,
    subgraphs,
)
from onnxcomp.passes.weight import DTYPES, Array, Constant, ConstantForm, WeightSite

__all__ = ["EXACT", "mark_constants"]

# Operators that treat an operand element by element.
_ELEMENTWISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Mod", "PRelu", "Clip"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Sign"),
        *("Neg", "Abs", "Exp", "Log", "Sqrt", "Reciprocal", "Sin", "Cos", "Floor", "Ceil", "Round"),
    )
)
_PRODUCTS = frozenset(
    (
        *("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"),
        *("com.microsoft::FusedMatMul", "com.microsoft::FusedGemm", "com.microsoft::FusedConv"),
    )
)

# Inputs of other operators that are added, sampled at or written into, element by element.
_OPERANDS = {
    "Gemm": (2,),
    "GridSample": (1,),
    "ScatterND": (0,),
    "ScatterElements": (0,),
    "Attention": (3,),
    "com.microsoft::Attention": (5,),
    "com.microsoft::MultiHeadAttention": (5,),
    "com.microsoft::GroupQueryAttention": (10,),
    "com.microsoft::BiasSoftmax": (1,),
}

# Operators that hand elements on; of those that take indices the table is the first input.
_MOVES = frozenset(
    (
        *("Cast", "Concat", "Expand", "Flatten", "Gather", "GatherND", "GatherElements"),
        *("Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose"),
        "Unsqueeze",
    )
)
_LOOK_UPS = frozenset(("Gather", "GatherND", "GatherElements"))

# Inputs that are caches of rotary embeddings, by operator.
_ROTARY = {
    "com.microsoft::RotaryEmbedding": (2, 3),
    "RotaryEmbedding": (1, 2),
    "com.microsoft::GroupQueryAttention": (7, 8),
}

# The most values that two bytes index.
_INDEX = 1 << 16

# The operator set that has Range.
_RANGE_OPSET = 11

# What the reason of a tensor starts with that is kept exactly on purpose.
EXACT = "constant"


def mark_constants(
    model: ir.Model, sites: tuple[WeightSite, ...], *, threads: int = 1
) -> tuple[WeightSite, ...]:
    """The sites, those marked that are no trained weights; each is read once.

    Args:
        model: The canonical model.
        sites: Its weights.
        threads: How many are looked at at once.
    """
    opset = default_opset(model) or 0
    graphs = _Graphs.of(model)

    def marked(site: WeightSite) -> WeightSite:
        return _marked(model, site, opset, graphs)

    total = len(sites)
    return tuple(in_threads(marked, sites, threads, what="looking for constants", total=total))


@dataclasses.dataclass(frozen=True, slots=True)
class _Graphs:
    """The main graph of a model, and the If node of each branch in it."""

    main: ir.Graph
    branches: Mapping[ir.Graph, ir.Node]

    @classmethod
    def of(cls, model: ir.Model) -> _Graphs:
        nodes = (node for scope in scopes(model) for node in scope.graph)
        found = (node for node in nodes if node.op_type == "If" and is_default_domain(node.domain))
        return cls(model.graph, {graph: node for node in found for _, graph in subgraphs(node)})


def _marked(model: ir.Model, site: WeightSite, opset: int, graphs: _Graphs) -> WeightSite:
    value = find_initializer(model, site.name)
    role = None if value is None else _role(value, graphs)
    if role is None:
        return site
    product = role.kind == "product"
    if not role.rotary and not may_be(sample(stored_matrix(model, site)), product=product):
        return site
    weight = read_weight(model, site)
    content = role.rotary or _content(weight, role)
    if not content:
        return site
    form, values = _form(site, weight, opset)
    if site.wide and not _exact_in_float32(value):
        form, values = "dense", 0
    kept = {"table": f"stored as {values} values and indices", "range": "stored as its two ends"}
    stored = kept.get(form, "stored in half precision" if form == "half" else "as it is")
    reason = f"{EXACT}: {content}, read by {', '.join(role.operators[:3])}; {stored}, bit for bit"
    transform = product and content in TRANSFORMS
    return dataclasses.replace(site, constant=Constant(reason, form, values, transform))


def _content(weight: Array, role: _Role) -> str:
    if role.kind == "product":
        return product_content(weight)
    return computed_content(weight, look_up=role.kind == "look-up")


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """What is done with a tensor.

    Attributes:
        kind: "elementwise", "look-up" or "product".
        operators: What computes with it.
        rotary: What it is by its operator alone, in words; mostly empty.
    """

    kind: str
    operators: tuple[str, ...]
    rotary: str = ""


def _role(value: ir.Value, graphs: _Graphs) -> _Role | None:
    """The role of a tensor; None where something is done with it that is none of the above."""
    ends = list(_ends(value, graphs))
    operators = tuple(dict.fromkeys(end.operator for end in ends))
    if not ends:
        return None
    if all(end.index in _ROTARY.get(end.operator, ()) for end in ends):
        return _Role("rotary", operators, "a cache of rotary embeddings")
    kinds = {_kind(end) for end in ends}
    if "" in kinds:
        return None
    if "product" in kinds:
        return _Role("product", operators)
    looked = any(end.looked for end in ends)
    return _Role("look-up" if looked else "elementwise", operators)


@dataclasses.dataclass(frozen=True, slots=True)
class _End:
    """Where a tensor ends up.

    Attributes:
        operator: That computes with it; `_OUTPUT` for an output of the model.
        index: Of its input.
        looked: Whether a look-up lies between.
    """

    operator: str
    index: int
    looked: bool


_OUTPUT = "an output"


def _kind(end: _End) -> str:
    """What is done with a tensor there; empty for anything else."""
    if end.index in _OPERANDS.get(end.operator, ()) or end.operator in (_OUTPUT, *_ELEMENTWISE):
        return "elementwise"
    return "product" if end.operator in _PRODUCTS else ""


def _ends(
    value: ir.Value,
    graphs: _Graphs,
    looked: bool = False,
    seen: frozenset[ir.Value] = frozenset(),
) -> Iterator[_End]:
    """Where a tensor is computed with, and where it leaves the model."""
    following: list[tuple[ir.Value, bool]] = []
    for node, index in value.uses():
        moves = node.op_type in _MOVES and is_default_domain(node.domain)
        if not moves or (index and node.op_type != "Concat"):
            yield _End(qualified_type(node), index, looked)
            continue
        found = looked or node.op_type in _LOOK_UPS
        following += [(output, found) for output in node.outputs]
    graph = value.graph
    if value.is_graph_output():
        places = [] if graph is None else [i for i, v in enumerate(graph.outputs) if v is value]
        holder = None if graph is None else graphs.branches.get(graph)
        if holder is not None and places:
            following += [(holder.outputs[place], looked) for place in places]
        else:
            yield _End(_OUTPUT if graph is graphs.main else "the node of a body", 0, looked)
    for output, found in following:
        if output not in seen:
            yield from _ends(output, graphs, found, seen | {output})


def _form(site: WeightSite, weight: Array, opset: int) -> tuple[ConstantForm, int]:
    """The smallest way to keep every bit, and how many distinct values a table has."""
    stored = np.ascontiguousarray(weight.astype(DTYPES[site.dtype], copy=False))
    if opset >= _RANGE_OPSET and _is_range(stored):
        return "range", 0
    codec = ConstantCodec()
    found: list[ConstantParams] = []
    bits = stored.view(np.uint16 if stored.itemsize == 2 else np.uint32).reshape(-1)
    values = distinct(bits, _INDEX)
    if values is not None:
        found.append(ConstantParams("table", values))
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16).astype(np.float32)
    if site.dtype == "float32" and np.array_equal(half.view(np.uint32), bits.reshape(half.shape)):
        found.append(ConstantParams("half"))
    best = min(found, key=lambda params: codec.size(site, params), default=None)
    if best is None or codec.size(site, best) >= site.nbytes:
        return "dense", 0
    return ("half", 0) if best.form == "half" else ("table", best.values)


def _exact_in_float32(value: ir.Value | None) -> bool:
    """Whether float32 holds every element of a float64 tensor, which is read as such."""
    assert value is not None and value.const_value is not None
    stored = np.asarray(value.const_value.numpy())
    return bool((stored.astype(np.float32) == stored).all())


def _is_range(stored: Array) -> bool:
    """Whether the elements, one after the other, are ``start + i * step`` in float32 arithmetic."""
    flat = stored.reshape(-1)
    if not 1 < flat.size < 1 << 24:
        return False
    start, step = flat[0].astype(np.float32), (flat[1:2].astype(np.float32) - flat[0])[0]
    with np.errstate(over="ignore"):
        made = (np.arange(flat.size, dtype=np.float32) * step + start).astype(stored.dtype)
    return bool(np.array_equal(made.view(np.uint8), np.ascontiguousarray(flat).view(np.uint8)))
