"""Exchange models with ONNX GraphSurgeon. The only file that imports it.

GraphSurgeon drops metadata, document strings of nodes, the value_info of constants, listed
initializers and attributes of rare types, and copies a captured initializer into each subgraph. A
graph made by `to_gs` remembers the model it came from: `proto_of_gs` gives back what was dropped
wherever the graph still says what it said then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.ir.serializer import model_proto, tensor_header

try:
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.ir.tensor import LazyValues  # type: ignore[import-untyped]
except ImportError as error:
    raise UsageError(
        "onnx_graphsurgeon is not installed", hint="pip install 'onnxcomp[graphsurgeon]'"
    ) from error

__all__ = ["proto_of_gs", "to_gs"]

# Attribute of a graph that holds the model it was made from and what GraphSurgeon makes of it.
_ORIGIN = "_onnxcomp_origin"

_NODE_FIELDS = ("doc_string", "metadata_props", "overload", "device_configurations")
_MODEL_FIELDS = ("doc_string", "metadata_props", "domain", "model_version", "training_info")
_TENSOR_FIELDS = ("doc_string", "metadata_props")


def to_gs(model: ir.Model) -> Any:
    """The model as an `onnx_graphsurgeon.Graph`; its weights are read into memory."""
    original = model_proto(model)
    bare = model_proto(model, tensor_header)
    with _quiet():
        graph = gs.import_onnx(original)
        baseline = gs.export_onnx(gs.import_onnx(bare), do_type_check=False)
    setattr(graph, _ORIGIN, (original, baseline))
    return graph


def proto_of_gs(graph: Any) -> onnx.ModelProto:
    """The model that an `onnx_graphsurgeon.Graph` describes; the graph is not changed."""
    with _quiet(), _packed(graph):
        proto: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    origin = getattr(graph, _ORIGIN, None)
    if origin is not None:
        _restore_model(proto, *origin)
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep GraphSurgeon from telling about types it passes through untouched."""
    logger = gs.logger.G_LOGGER
    severity, logger.severity = logger.severity, logger.ERROR
    try:
        yield
    finally:
        logger.severity = severity


def _constants(graph: Any) -> Iterator[Any]:
    for body in (graph, *graph.functions):
        for each in (body, *body.subgraphs(recursive=True)):
            yield from (t for t in each.tensors().values() if isinstance(t, gs.Constant))
            for node in each.nodes:
                yield from (v for v in node.attrs.values() if isinstance(v, gs.Constant))


@contextlib.contextmanager
def _packed(graph: Any) -> Iterator[None]:
    """While exporting, values of types numpy lacks are messages: 4-bit ones need packing."""
    changed = {id(t): (t, t._values) for t in _constants(graph) if _is_exotic(t._values)}
    for constant, values in changed.values():
        tensor = ir.Tensor(values, dtype=ir.DataType.from_numpy(values.dtype), name=constant.name)
        message = ir.serde.serialize_tensor(tensor)
        constant._values = _message_values(message)
    try:
        yield
    finally:
        for constant, values in changed.values():
            constant._values = values


def _is_exotic(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "V"


def _message_values(message: onnx.TensorProto) -> Any:
    """GraphSurgeon's lazy values over a message, of whatever type."""
    values = LazyValues.__new__(LazyValues)
    values.tensor = message
    values.shape, values.dtype = list(message.dims), message.data_type
    values.nbytes = len(message.raw_data)
    return values


def _by_name(messages: Iterable[Any]) -> dict[str, Any]:
    return {message.name: message for message in messages}


def _copy_fields(target: Any, source: Any, fields: Iterable[str]) -> None:
    """Copy the fields that the source has and the target lacks."""
    given = {field.name for field, _ in target.ListFields()}
    for field, value in source.ListFields():
        if field.name not in fields or field.name in given:
            continue
        if isinstance(value, (str, int)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def _restore_model(
    proto: onnx.ModelProto, original: onnx.ModelProto, baseline: onnx.ModelProto
) -> None:
    _copy_fields(proto, original, _MODEL_FIELDS)
    was = {(function.domain, function.name): function for function in baseline.functions}
    first = {(function.domain, function.name): function for function in original.functions}
    for function in proto.functions:
        key = function.domain, function.name
        if function == was.get(key):
            function.CopyFrom(first[key])
    _restore_graph(proto.graph, original.graph, baseline.graph, [])


def _restore_graph(
    graph: onnx.GraphProto,
    original: onnx.GraphProto,
    baseline: onnx.GraphProto,
    outer: list[tuple[onnx.GraphProto, set[str]]],
) -> None:
    """Give a graph back what was dropped; `outer` are the graphs around it with their own names."""
    _copy_fields(graph, original, ("doc_string", "metadata_props"))
    own = {tensor.name for tensor in original.initializer}
    around = [*outer, (graph, own)]
    _restore_nodes(graph, original, baseline, around)
    _restore_initializers(graph, original, baseline, own, outer)
    _restore_infos(graph, original, baseline)
    names = {tensor.name for tensor in graph.initializer} | _values(graph)
    for annotation in original.quantization_annotation:
        if annotation.tensor_name in names:
            graph.quantization_annotation.add().CopyFrom(annotation)


def _values(graph: onnx.GraphProto) -> set[str]:
    produced = {name for node in graph.node for name in node.output}
    return produced | {info.name for info in graph.input}


def _node_key(node: onnx.NodeProto) -> tuple[str, str, str]:
    """Operator and first output: what a node is known by across GraphSurgeon."""
    return node.domain, node.op_type, next((name for name in node.output if name), node.name)


def _restore_nodes(
    graph: onnx.GraphProto,
    original: onnx.GraphProto,
    baseline: onnx.GraphProto,
    around: list[tuple[onnx.GraphProto, set[str]]],
) -> None:
    first = {_node_key(node): node for node in original.node}
    was = {_node_key(node): node for node in baseline.node}
    for node in graph.node:
        before = first.get(_node_key(node))
        if before is None:
            continue
        _copy_fields(node, before, _NODE_FIELDS)
        kept, exported = _by_name(node.attribute), _by_name(was[_node_key(node)].attribute)
        for attribute in before.attribute:
            if attribute.name not in exported:
                node.attribute.add().CopyFrom(attribute)
            elif attribute.type == onnx.AttributeProto.GRAPH and attribute.name in kept:
                inner = kept[attribute.name].g
                _restore_graph(inner, attribute.g, exported[attribute.name].g, around)


def _restore_initializers(
    graph: onnx.GraphProto,
    original: onnx.GraphProto,
    baseline: onnx.GraphProto,
    own: set[str],
    outer: list[tuple[onnx.GraphProto, set[str]]],
) -> None:
    tensors = _by_name(graph.initializer)
    for name in set(tensors) - own:
        owner = next((each for each, names in reversed(outer) if name in names), None)
        if owner is not None:
            # A captured initializer was copied here: it belongs to the graph around.
            captured = tensors.pop(name)
            if name not in {tensor.name for tensor in owner.initializer}:
                owner.initializer.add().CopyFrom(captured)
    exported = {tensor.name for tensor in baseline.initializer}
    for tensor in original.initializer:
        if tensor.name in tensors:
            _copy_fields(tensors[tensor.name], tensor, _TENSOR_FIELDS)
        elif tensor.name not in exported and not _is_moved(tensor.name, graph):
            tensors[tensor.name] = tensor
    order = [tensor.name for tensor in original.initializer]
    names = [name for name in order if name in tensors] + [n for n in tensors if n not in own]
    _refill(graph.initializer, [tensors[name] for name in names])


def _is_moved(name: str, graph: onnx.GraphProto) -> bool:
    """Whether a subgraph still holds its copy of an initializer of this graph."""
    return any(
        name in {tensor.name for tensor in attribute.g.initializer}
        for node in graph.node
        for attribute in node.attribute
    )


def _restore_infos(
    graph: onnx.GraphProto, original: onnx.GraphProto, baseline: onnx.GraphProto
) -> None:
    for field in ("input", "output", "value_info"):
        first: Mapping[str, Any] = _by_name(getattr(original, field))
        was: Mapping[str, Any] = _by_name(getattr(baseline, field))
        infos = getattr(graph, field)
        # GraphSurgeon describes captured values in each subgraph too: those entries go again.
        kept = [info for info in infos if info.name in first or info != was.get(info.name)]
        _refill(infos, [_unless_changed(info, first, was) for info in kept])
    _restore_inputs(graph, original)
    _restore_value_info(graph, original)


def _unless_changed(
    info: onnx.ValueInfoProto, first: Mapping[str, Any], was: Mapping[str, Any]
) -> onnx.ValueInfoProto:
    same = info.name in first and info == was.get(info.name)
    return first[info.name] if same else info


def _refill(field: Any, messages: Iterable[Any]) -> None:
    """Set a repeated field; the messages may be its own."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)


def _restore_inputs(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """List initializers as inputs again where they were, in the order there was."""
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = {info.name: info for info in graph.input}
    listed = [info for info in original.input if info.name in inputs.keys() | initializers]
    ordered = [inputs.pop(info.name, info) for info in listed]
    _refill(graph.input, [*ordered, *inputs.values()])


def _restore_value_info(graph: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Describe again what is still there, or never was a value of the graph."""
    told = {info.name for infos in (graph.input, graph.output, graph.value_info) for info in infos}
    known = {tensor.name for tensor in graph.initializer} | _values(graph)
    before = {tensor.name for tensor in original.initializer} | _values(original)
    for info in original.value_info:
        gone = info.name in before and info.name not in known
        if info.name not in told and not gone:
            graph.value_info.add().CopyFrom(info)
