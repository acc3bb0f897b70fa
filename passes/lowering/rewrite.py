"""Put payloads in the place of weights.

``MatMul(x, W) -> HyperMatMul(x, codes, ...)``, ``Gather(W, i) -> HyperGather(i, codes, ...)``, and
``Gemm(A, W, C) -> Add(Mul(HyperMatMul(A), alpha), Mul(C, beta))``; ``MatMul(x, Gather(W, i))`` with
a stack of matrices takes the product of a codec that has one (see `expert_products`); convolutions
and recurrent operators take the factors of a codec that has them (see `split_operators`); any other
consumer of ``W`` reads ``Reshape(Transpose(HyperWeight(codes, ...)))``, made once for each graph
that needs it. The operators are those of the codec. Visits the main graph and all subgraphs, which
see payloads by capture; function bodies are not visited.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, EmitFactors, Payload
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.manifest import (
    STAGE_KEY,
    USE_KEY,
    ManifestEntry,
    Recipe,
    read_manifest,
    shared_name,
    write_manifest,
)
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.traversal import (
    LISTING_IR,
    default_opset,
    inherit_notes,
    initializers,
    remove_dead,
    remove_initializer,
    replace_value,
    scopes,
)
from onnxcomp.passes.lowering.builder import GraphBuilder, InitializerPool
from onnxcomp.passes.lowering.expert_products import expert_product
from onnxcomp.passes.lowering.routes import dtype_at_use, route
from onnxcomp.passes.lowering.row_parts import stored_form
from onnxcomp.passes.lowering.split_operators import split, splits
from onnxcomp.passes.weight import DOMAIN, DTYPES, Attribute, Kind, Mode, Shift, Use, WeightSite

__all__ = ["FUNCTION_IR", "Placement", "in_parts", "precision_attributes", "rewrite"]

# The IR version that introduced model-local functions.
FUNCTION_IR = 8


def precision_attributes(precision: str) -> dict[str, int]:
    """What is added to the attributes of every payload: nothing for "exact" arithmetic."""
    return {"precision": 1} if precision == "int8" else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """One weight and what to store in its place.

    Attributes:
        site: The weight.
        codec: The codec that made the payload.
        payload: What is stored; arrays may be mapped from files, or virtual for sizing.
        mode: How uses are served. "auto" fuses products and look-ups the codec has operators for
            and folds the rest; "folded" and "decode" serve every use with the dense weight.
        params: Parameters of the codec, for the manifest.
        shift: What is added to the offset of its products; None for nothing.
    """

    site: WeightSite
    codec: Codec
    payload: Payload
    mode: Mode | Literal["auto"] = "auto"
    params: Params | None = None
    shift: Shift | None = None


def rewrite(
    model: ir.Model,
    placements: Sequence[Placement],
    *,
    portable: bool = True,
    largest: int | None = None,
) -> Change:
    """Replace weights by payloads, in place.

    Names, order and types of the model's inputs and outputs stay, as does its operator set. The
    import of our domain, the functions the nodes need and a metadata entry are added; the IR
    version becomes at least `FUNCTION_IR` when there are functions.

    Args:
        model: The model the sites were found in.
        placements: At most one for each site.
        portable: Add the functions, so that the model runs without the operator library.
        largest: Bytes of the parts, in float32, in which whole weights are expanded; None for one.

    Returns:
        The number of uses rewired, with a note for each weight.

    Raises:
        ModelError: A site is not in the model.
    """
    opset = default_opset(model)
    if opset is None:
        raise ModelError("the model imports no standard operator set")
    work = _Rewriter(model, InitializerPool(model, opset), largest)
    fused = [work.fuse(placement) for placement in placements]
    # Products may have weights as their other operand: those follow when all products are fused.
    dense = [work.restore(placement) for placement in placements]
    for placement in placements:
        remove_initializer(work.weights[placement.site.name])
    for domain in sorted(work.pool.domains):
        model.graph.opset_imports.setdefault(domain, 1)
    _add_functions(model, placements, work.pool.operators, portable=portable)
    _add_to_manifest(model, placements)
    notes = [
        f"{placement.site.name}: {placement.codec.name}, {fusions} fused, {others} dense"
        for placement, fusions, others in zip(placements, fused, dense, strict=True)
    ]
    return Change(sum(fused) + sum(dense), tuple(notes))


class _Rewriter:
    """The state of one rewrite."""

    def __init__(self, model: ir.Model, pool: InitializerPool, largest: int | None) -> None:
        self.pool = pool
        self._largest = largest
        self.weights = initializers(model)
        self._nodes = {node.name: node for scope in scopes(model) for node in scope.graph}

    def _node(self, name: str) -> ir.Node:
        if name not in self._nodes:
            raise ModelError(f"the model has no node {name!r}", hint="find the sites again")
        return self._nodes[name]

    def fuse(self, placement: Placement) -> int:
        """Replace the products and look-ups of one weight; return how many."""
        if placement.site.name not in self.weights:
            raise ModelError(f"the model has no initializer {placement.site.name!r}")
        if placement.mode not in ("auto", "fused") or placement.site.wide:
            return 0
        kinds = placement.codec.kinds(placement.site)
        uses = [use for use in placement.site.uses if use.need in kinds]
        fused = sum(self._fuse_use(placement, use) for use in uses)
        if placement.codec.factors is not None:
            others = [use for use in placement.site.uses if use.need not in kinds]
            fused += sum(self._split_use(placement, placement.codec.factors, use) for use in others)
        return fused

    def _split_use(self, placement: Placement, factors: EmitFactors, use: Use) -> bool:
        """Use the two factors of a weight one after the other; return whether that is possible."""
        node, site = self._node(use.node), placement.site
        if not splits(node, use, site):
            return False
        x = node.inputs[0]
        assert x is not None
        builder = self._builder(placement, node, use.node)
        kind, result = split(builder, node, site, *factors(builder, site, placement.payload))
        producer = result.producer()
        assert producer is not None
        way = [0, 0]  # both kinds lead through the first input of two nodes
        producer.metadata_props[USE_KEY] = json.dumps([site.name, kind, way])
        if producer is not node:
            self._put(result, node)
        return True

    def _fuse_use(self, placement: Placement, use: Use) -> bool:
        node = self._node(use.node)
        path = [self._node(name) for name in use.path]
        dtype = dtype_at_use(path, placement.site.dtype)
        converted = dtype != placement.site.dtype
        if converted and in_parts(placement.codec, self.pool.opset):
            # Tensors of standard operators have the stored type: the Cast has to stay.
            return False
        site = dataclasses.replace(placement.site, dtype=dtype)
        builder = self._builder(placement, node, use.node)
        result = _replacement(placement, site, use, node, path, builder)
        if result.producer() is None:
            result = builder.node("Identity", [result])
        self._put(result, node)
        remove_dead(reversed(path))
        return True

    def _put(self, result: ir.Value, node: ir.Node) -> None:
        """Put a value in the place of a node's output, and its producer in that of the node."""
        producer = result.producer()
        assert producer is not None and node.graph is not None
        inherit_notes(node, producer)
        replace_value(node.outputs[0], result)
        node.graph.remove(node, safe=True)
        producer.name = node.name
        if metadata.GENERATED_NAME in node.meta:
            producer.meta[metadata.GENERATED_NAME] = node.meta[metadata.GENERATED_NAME]

    def _builder(self, placement: Placement, anchor: ir.Node, label: str) -> GraphBuilder:
        site, codec = placement.site, placement.codec.name
        return GraphBuilder(self.pool, anchor, label, site, codec, placement.payload)

    def restore(self, placement: Placement) -> int:
        """Give whoever still reads a weight the decoded one; return how many uses that are."""
        weight = self.weights[placement.site.name]
        by_graph = defaultdict(list)
        for node, index in weight.uses():
            by_graph[node.graph].append((node, index))
        for graph, uses in by_graph.items():
            consumers = {node for node, _ in uses}
            assert graph is not None
            anchor = next(node for node in graph if node in consumers)
            builder = self._builder(placement, anchor, placement.site.name)
            mode = placement.mode
            restored = stored_form(
                placement.codec, placement.site, placement.payload, mode, builder, self._largest
            )
            for node, index in uses:
                node.replace_input_with(index, restored)
        return sum(map(len, by_graph.values()))


def _replacement(
    placement: Placement,
    site: WeightSite,
    use: Use,
    node: ir.Node,
    path: Sequence[ir.Node],
    builder: GraphBuilder,
) -> ir.Value:
    """The value that takes the place of a node's output."""
    if use.need in ("experts", "batch"):
        emit = placement.codec.experts
        assert emit is not None
        emitted = functools.partial(emit, builder, site, placement.payload)
        return expert_product(emitted, site.experts, use, node, path, builder)
    if use.need == "gather":
        return _emitted(placement, site, "gather", node.inputs[1], builder)
    x = node.inputs[0]
    if node.op_type != "Gemm":
        return _emitted(placement, site, "matmul", x, builder)
    if node.attributes.get_int("transA", 0):
        assert x is not None
        x = builder.node("Transpose", [x], {"perm": [1, 0]})
    product = _emitted(placement, site, "matmul", x, builder)
    return _affine(node, product, site.dtype, builder)


def in_parts(codec: Codec, opset: int) -> bool:
    """Whether a use becomes standard operators, or several custom ones that do not explain it."""
    return codec.composite or not codec.functions(opset)


def _emitted(
    placement: Placement, site: WeightSite, kind: Kind, x: ir.Value | None, builder: GraphBuilder
) -> ir.Value:
    """A codec's product or look-up, marked where only its nodes' metadata can tell what it is."""
    assert x is not None
    result = placement.codec.emit(builder, site, placement.payload, kind, x)
    producer = result.producer()
    if producer is not None and in_parts(placement.codec, builder.opset):
        way = route(result, x)
        producer.metadata_props[USE_KEY] = json.dumps([site.name, kind, way])
    return result


def _affine(node: ir.Node, product: ir.Value, dtype: str, builder: GraphBuilder) -> ir.Value:
    """``alpha * product + beta * C`` of a Gemm."""
    product = _scaled(product, node.attributes.get_float("alpha", 1.0), dtype, builder)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    beta = node.attributes.get_float("beta", 1.0)
    if bias is None or beta == 0.0:
        return product
    return builder.node("Add", [product, _scaled(bias, beta, dtype, builder)])


def _scaled(value: ir.Value, factor: float, dtype: str, builder: GraphBuilder) -> ir.Value:
    if factor == 1.0:
        return value
    array = np.array(factor, DTYPES[dtype])
    return builder.node("Mul", [value, builder.constant(f"scalar.{dtype}.{factor!r}", array)])


def _add_functions(
    model: ir.Model, placements: Sequence[Placement], operators: set[str], *, portable: bool
) -> None:
    """Import our domain, and add the functions that are called, directly or by one another."""
    if not operators:
        return
    model.graph.opset_imports[DOMAIN] = 1
    if not portable:
        return
    opset = default_opset(model)
    assert opset is not None
    codecs = {placement.codec.name: placement.codec for placement in placements}
    bodies = {body.name: body for codec in codecs.values() for body in codec.functions(opset)}
    wanted, pending = set[str](), set(operators)
    while pending:
        name = pending.pop()
        if name in bodies and name not in wanted:
            wanted.add(name)
            pending |= {node.op_type for node in bodies[name].node if node.domain == DOMAIN}
    # In the codec's order, callees first: onnx.reference needs a function before its callers.
    for body in (body for name, body in bodies.items() if name in wanted):
        present = model.functions.get((body.domain, body.name, ""))
        # Those that serve some weights only, of an earlier compression, make way.
        if present is None or STAGE_KEY in present.metadata_props:
            function = ir.serde.deserialize_function(body)
            model.functions[function.identifier()] = function
    if model.functions:
        _raise_ir_version(model)


def _raise_ir_version(model: ir.Model) -> None:
    """Functions need IR 8. From IR 4 on a listed initializer could be overridden: unlist them."""
    if model.ir_version < LISTING_IR:
        for value in list(model.graph.inputs):
            if value.is_initializer():
                model.graph.inputs.remove(value)
    model.ir_version = max(model.ir_version, FUNCTION_IR)


def _plain(value: Attribute) -> Attribute:
    """An attribute as JSON gives it back."""
    return value if isinstance(value, (str, int, float)) else [int(item) for item in value]


def _add_to_manifest(model: ir.Model, placements: Sequence[Placement]) -> None:
    manifest, stored = read_manifest(model), initializers(model)
    for placement in placements:
        if placement.codec.name == "dense":
            continue
        params = {} if placement.params is None else placement.params.to_json()
        recipe = Recipe(
            placement.codec.name,
            params,
            placement.mode,
            {key: _plain(value) for key, value in placement.payload.attributes.items()},
            list(placement.payload.tensors),
            [key for key in placement.payload.shared if shared_name(key) in stored],
        )
        manifest[placement.site.name] = ManifestEntry(placement.site, recipe)
    write_manifest(model, manifest)
