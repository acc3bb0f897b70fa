"""Turn a compressed model back into plain dense ONNX.

``HyperMatMul(x, codes, ...) -> MatMul(x, W)``, ``HyperGather(i, codes, ...) -> Gather(W, i)``, and
what ``HyperWeight`` or ``HyperDecode`` restored becomes ``W`` itself; likewise for other codecs,
whose products and look-ups by standard operators are known by their nodes' metadata.
``W`` has the name, shape and type of the tensor that was compressed and is decoded when it is
written. Our functions, domain import and metadata go. Visits the main graph and all subgraphs.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError, ModelError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir.manifest import (
    KEY,
    USE_KEY,
    WEIGHT_KEY,
    ManifestEntry,
    own_name,
    read_manifest,
    shared_name,
)
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import ELEMENT_TYPES
from onnxcomp.passes.ir.traversal import (
    Names,
    inherit_notes,
    initializers,
    new_initializer,
    remove_dead,
    remove_initializer,
    rename_initializer,
    replace_value,
    scopes,
)
from onnxcomp.passes.lowering.builder import attribute
from onnxcomp.passes.lowering.routes import operand
from onnxcomp.passes.lowering.split_operators import SPLIT_KINDS, join
from onnxcomp.passes.lowering.stages import remove_stages
from onnxcomp.passes.weight import DOMAIN, Array, Attribute, WeightSite

__all__ = ["decode_site", "expand", "stored_payload"]

_DAMAGED = "expand the file that onnxcomp wrote, before other tools changed it"

# A domain whose import compression may have added.
_MICROSOFT = "com.microsoft"


def expand(model: ir.Model) -> Change:
    """Replace every compressed weight by a dense one, in place.

    Returns:
        The number of weights that became dense, with a note for each.

    Raises:
        ModelError: The record of what was compressed is missing or does not fit the model.
    """
    manifest = read_manifest(model)
    own_nodes = [node for node in _nodes(model) if node.domain == DOMAIN]
    if own_nodes and not manifest:
        raise ModelError(
            f"the model has {DOMAIN} operators, but its metadata entry {KEY!r} is missing",
            hint="expand the file that onnxcomp wrote, before other tools changed it",
        )
    if not manifest:
        return Change(0)
    work = _Expander(model, manifest)
    for node in list(_nodes(model)):
        if node.metadata_props.get(WEIGHT_KEY) in manifest:
            work.restore(node)
    for node in list(_nodes(model)):
        if USE_KEY in node.metadata_props:
            work.replace_use(node)
    for node in own_nodes:
        if node.graph is not None:
            work.replace(node)
    work.clean()
    notes = tuple(f"{name}: {manifest[name].recipe.codec} became dense" for name in work.weights)
    return Change(len(notes), notes)


def decode_site(model: ir.Model, entry: ManifestEntry) -> Array:
    """The decoded weight of a compressed model in canonical form, ``(rows, length)`` float32.

    Raises:
        ModelError: A tensor of the weight is missing, or its codec is unknown.
    """
    return _decode(entry, initializers(model))


def _decode(entry: ManifestEntry, values: Mapping[str, ir.Value]) -> Array:
    codec = CODECS.get(entry.recipe.codec)
    if codec is None:
        raise ModelError(
            f"weight {entry.site.name!r} was stored by an unknown codec: {entry.recipe.codec}",
            hint="update onnxcomp",
        )
    payload = stored_payload(entry, values)
    site, shape = entry.site, (entry.site.rows, entry.site.length)
    try:
        decoded = codec.decode(site, payload)
        if decoded.shape != shape:
            raise ValueError(f"the decoded shape is {decoded.shape}, not {shape}")
    except (CompressionError, ValueError, TypeError, KeyError, IndexError) as error:
        raise ModelError(
            f"the tensors of compressed weight {site.name!r} are damaged: {error}", hint=_DAMAGED
        ) from error
    return decoded


def stored_payload(entry: ManifestEntry, values: Mapping[str, ir.Value]) -> Payload:
    """What a compressed model stores for one weight.

    Args:
        entry: The weight.
        values: Initializers of the model by name.

    Raises:
        ModelError: A tensor is missing or damaged.
    """
    own = {key: own_name(entry.site.name, key) for key in entry.recipe.tensors}
    shared = {key: shared_name(key) for key in entry.recipe.shared}
    return Payload(_arrays(own, values), _arrays(shared, values), entry.recipe.attributes)


def _arrays(names: Mapping[str, str], values: Mapping[str, ir.Value]) -> dict[str, Array]:
    arrays = {}
    for key, name in names.items():
        value = values.get(name)
        if value is None or value.const_value is None:
            raise ModelError(f"the compressed model lacks its tensor {name!r}", hint=_DAMAGED)
        try:
            arrays[key] = np.asarray(value.const_value.numpy())
        except (ValueError, TypeError) as error:  # content and shape do not fit together
            raise ModelError(f"the tensor {name!r} is damaged: {error}", hint=_DAMAGED) from error
    return arrays


def _dense(entry: ManifestEntry, values: Mapping[str, ir.Value]) -> ir.LazyTensor:
    """The stored tensor; decoded at each access, so that one at a time is in memory."""
    site = entry.site
    dtype = ELEMENT_TYPES[site.dtype]

    def decoded() -> ir.TensorProtocol:
        matrix = _decode(entry, values)
        stored = site.stored_form(matrix).astype(dtype.numpy(), copy=False)
        return ir.Tensor(stored, dtype=dtype)

    return ir.LazyTensor(decoded, dtype, ir.Shape(site.shape), cache=False, name=site.name)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for scope in scopes(model) for node in scope.graph)


@dataclasses.dataclass(frozen=True, slots=True)
class _Matrix:
    """A form of a weight that a standard operator needs; forms are made once per model."""

    site: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: ir.DataType


class _Expander:
    """The state of one expansion.

    Attributes:
        weights: The dense weights made so far, by name.
    """

    def __init__(self, model: ir.Model, manifest: Mapping[str, ManifestEntry]) -> None:
        self._model = model
        self._manifest = manifest
        self._names = Names(model)
        self._values = initializers(model)
        self._owners = {
            own_name(name, key): entry
            for name, entry in manifest.items()
            for key in entry.recipe.tensors
        }
        self.weights: dict[str, ir.Value] = {}
        self._matrices: dict[_Matrix, ir.Value] = {}

    def weight(self, name: str) -> ir.Value:
        """The dense initializer of a site."""
        if name not in self.weights:
            tensor = _dense(self._manifest[name], self._values)
            self.weights[name] = new_initializer(self._model, self._names.value(name), tensor)
        return self.weights[name]

    def restore(self, node: ir.Node) -> None:
        """A whole weight was decoded here: read the dense one instead."""
        weight = self.weight(node.metadata_props[WEIGHT_KEY])
        if node.outputs[0].is_graph_output():
            raise ModelError(f"node {node.name!r} is damaged: it returns a weight", hint=_DAMAGED)
        node.outputs[0].replace_all_uses_with(weight)
        self._remove(node)

    def _remove(self, node: ir.Node) -> None:
        """Remove a node whose output nobody reads, and what was computed for it alone."""
        producers = [value.producer() for value in node.inputs if value is not None]
        if remove_dead([node]):
            for producer in producers:
                if producer is not None and KEY in producer.metadata_props:
                    self._remove(producer)

    def _take_place(self, node: ir.Node, result: ir.Value) -> None:
        """Let a result stand for the output of a node, and its producer have the node's name."""
        name, producer = node.name, result.producer()
        assert producer is not None
        inherit_notes(node, producer)
        replace_value(node.outputs[0], result)
        self._remove(node)
        producer.name = name

    def replace(self, node: ir.Node) -> None:
        """Put the standard operator in the place of a custom one."""
        entry = next(
            (self._owners[v.name] for v in node.inputs if v and v.name in self._owners), None
        )
        if entry is None:
            raise ModelError(f"node {node.name!r} reads no weight of the manifest", hint=_DAMAGED)
        try:
            result = self._standard(node, entry.site)
        except (TypeError, ValueError) as error:  # of attributes
            raise ModelError(f"node {node.name!r} is damaged: {error}", hint=_DAMAGED) from error
        self._take_place(node, result)

    def replace_use(self, node: ir.Node) -> None:
        """Put one standard operator in the place of those that a codec had emitted."""
        try:
            name, kind, way, *stated = json.loads(node.metadata_props[USE_KEY])
            entry, source = self._manifest[name], operand(node, way)
            dtype = ELEMENT_TYPES[stated[0] if stated else entry.site.dtype]
            indices = operand(node, stated[1]) if kind == "experts" else source
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"node {node.name!r} is damaged: {error}", hint=_DAMAGED) from error
        if kind in SPLIT_KINDS:
            self._join(node, kind, source, entry.site)
            return
        if kind == "experts":
            self._take_place(node, self._stack_product(node, entry.site, source, indices, dtype))
            return
        site, transposed = entry.site, kind == "matmul"
        shape = (site.length, site.rows) if transposed else (site.rows, site.length)
        weight = self._matrix(_Matrix(site.name, shape, transposed, dtype))
        result = self._before(
            node,
            "MatMul" if transposed else "Gather",
            [source, weight] if transposed else [weight, source],
        )
        self._take_place(node, result)

    def _join(self, node: ir.Node, kind: str, source: ir.Value, site: WeightSite) -> None:
        """Put a convolution or recurrence with the whole weight in the place of a split one."""
        fed = [value.producer() for value in node.inputs[:2] if value is not None]

        def before(
            op_type: str, inputs: list[ir.Value | None], attributes: Sequence[ir.Attr]
        ) -> ir.Value:
            return self._before(node, op_type, inputs, attributes)

        try:
            result = join(node, kind, source, self.weight(site.name), before)
        except ValueError as error:
            raise ModelError(f"node {node.name!r} is damaged: {error}", hint=_DAMAGED) from error
        if result is node.outputs[0]:
            for producer in fed:
                if producer is not None and KEY in producer.metadata_props:
                    self._remove(producer)
            return
        self._take_place(node, result)

    def _standard(self, node: ir.Node, site: WeightSite) -> ir.Value:
        rows, length = site.rows, site.length
        if node.op_type.endswith("MatMul"):
            default = ELEMENT_TYPES[site.dtype].value
            dtype = ir.DataType(node.attributes.get_int("dtype", default))
            weight = self._matrix(_Matrix(site.name, (length, rows), True, dtype))
            return self._before(node, "MatMul", [node.inputs[0], weight])
        if node.op_type.endswith("Experts"):
            dtype = ir.DataType(node.attributes.get_int("dtype", ELEMENT_TYPES[site.dtype].value))
            x, indices, *_ = node.inputs
            return self._stack_product(node, site, x, indices, dtype)
        weight = self._matrix(_Matrix(site.name, (rows, length), False, ir.DataType.FLOAT))
        if node.op_type.endswith("Gather"):
            return self._before(node, "Gather", [weight, node.inputs[0]])
        extent = tuple(node.attributes.get_ints("extent", (rows, length)))
        return self._before(node, "Reshape", [weight, self._dims(extent)])

    def _stack_product(
        self,
        node: ir.Node,
        site: WeightSite,
        x: ir.Value | None,
        indices: ir.Value | None,
        dtype: ir.DataType,
    ) -> ir.Value:
        """A product with all matrices of a stack, or with those that are chosen."""
        shape = (site.experts, site.length, site.rows // site.experts)
        weight: ir.Value | None = self._matrix(_Matrix(site.name, shape, True, dtype))
        if indices is None or indices.name != shared_name(f"experts.{site.experts}"):
            weight = self._before(node, "Gather", [weight, indices])
        return self._before(node, "MatMul", [x, weight])

    def _matrix(self, wanted: _Matrix) -> ir.Value:
        """The weight as ``(rows, length)``, or as ``(length, rows)`` when transposed, in a type.

        A stack also with three dimensions, each of its matrices transposed or not.
        """
        if wanted not in self._matrices:
            site = self._manifest[wanted.site].site
            value = self.weight(wanted.site)
            stack, turned = len(wanted.shape) == 3, site.transposed
            if site.experts > 1 and turned != (stack and wanted.transposed):
                value = self._at_start("Transpose", [value], {"perm": [0, 2, 1]})
                turned = not turned
            flat = (site.length, site.rows) if turned else (site.rows, site.length)
            if not stack and (flat != site.shape or turned != site.transposed):
                value = self._at_start("Reshape", [value, self._dims(flat)])
            if not stack and wanted.transposed != turned:
                value = self._at_start("Transpose", [value], {"perm": [1, 0]})
            if wanted.dtype != ELEMENT_TYPES[site.dtype]:
                value = self._at_start("Cast", [value], {"to": wanted.dtype.value})
            self._matrices[wanted] = value
        return self._matrices[wanted]

    @functools.cache  # noqa: B019 - an expander lives for one call
    def _dims(self, shape: tuple[int, ...]) -> ir.Value:
        name = self._names.value(f"shape.{'x'.join(map(str, shape))}")
        return new_initializer(self._model, name, np.array(shape, np.int64))

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        name = self._names.node(f"{node.name}/{op_type}")
        made = ir.Node("", op_type, inputs, attributes, name=name)
        made.outputs[0].name = self._names.value(made.name or op_type)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        return made.outputs[0]

    def _at_start(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Attribute] | None = None,
    ) -> ir.Value:
        """A node at the start of the main graph, where every graph sees its output."""
        attrs = [attribute(key, value) for key, value in (attributes or {}).items()]
        name = self._names.node(f"{inputs[0].name}/{op_type}")
        made = ir.Node("", op_type, inputs, attrs, name=name)
        made.outputs[0].name = self._names.value(name)
        graph, producer = self._model.graph, inputs[0].producer()
        if producer is None:
            graph.insert_before(graph[0], made)
        else:
            graph.insert_after(producer, made)
        return made.outputs[0]

    def clean(self) -> None:
        """Remove payloads, functions, import and metadata."""
        remove_stages(self._model)
        prefix = shared_name("")
        for name, value in self._values.items():
            if name in self._owners and value.uses():
                raise ModelError(f"nodes still read the compressed {name!r}", hint=_DAMAGED)
            if not value.uses() and (name in self._owners or name.startswith(prefix)):
                remove_initializer(value)
            elif name.startswith(prefix):
                rename_initializer(value, self._names.value(name.removeprefix(prefix)))
        for node in _nodes(self._model):
            node.metadata_props.pop(KEY, None)
            node.metadata_props.pop(WEIGHT_KEY, None)
            node.metadata_props.pop(USE_KEY, None)
        for identifier in [key for key in self._model.functions if key[0] == DOMAIN]:
            del self._model.functions[identifier]
        domains = {node.domain for node in _nodes(self._model)} | {""}
        for domain in [DOMAIN, _MICROSOFT]:
            if domain not in domains:
                self._model.graph.opset_imports.pop(domain, None)
        self._model.metadata_props.pop(KEY, None)
