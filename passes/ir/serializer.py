"""Turn an ONNX IR model back into protobuf messages, tensors left to the caller.

ONNX IR's own serialiser copies every tensor into the message, adds a value_info entry for each
initializer and drops sparse initializers; here the messages come out as they were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx
import onnx_ir as ir

from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.tensors import SparseTensor, shape_of

__all__ = [
    "TensorWriter",
    "fill_nodes",
    "fill_rest",
    "model_proto",
    "model_shell",
    "tensor_header",
    "tensor_proto",
]

# Gives the message of one tensor, under a name that may differ from the tensor's own.
TensorWriter = Callable[[ir.TensorProtocol, str | None], onnx.TensorProto]


def tensor_header(tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
    """The message of a tensor without its bytes."""
    proto = onnx.TensorProto(data_type=tensor.dtype.value, dims=shape_of(tensor))
    if name:
        proto.name = name
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    _add_pairs(proto.metadata_props, tensor.metadata_props)
    return proto


def tensor_proto(tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
    """The message of a tensor with its bytes in it."""
    proto = tensor_header(tensor, name)
    if isinstance(tensor, ir.StringTensor):
        proto.string_data.extend(tensor.string_data())
    else:
        proto.raw_data = tensor.tobytes()
    return proto


def model_proto(model: ir.Model, write: TensorWriter = tensor_proto) -> onnx.ModelProto:
    """The whole model as one message, in memory; `save` is the way to a file."""
    proto = model_shell(model)
    moved = list(proto.graph.value_info)
    proto.ClearField("graph")
    _fill_graph(proto.graph, model.graph, write)
    proto.graph.value_info.extend(moved)
    return proto


def model_shell(model: ir.Model) -> onnx.ModelProto:
    """Everything of a model but its graph. Tensors in function bodies are included."""
    empty = ir.Graph((), (), nodes=(), opset_imports=dict(model.graph.opset_imports))
    shell = ir.serde.serialize_model(
        ir.Model(
            empty,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            domain=model.domain,
            model_version=model.model_version,
            doc_string=model.doc_string,
            functions=tuple(model.functions.values()),
            metadata_props=dict(model.metadata_props),
            device_configurations=model.device_configurations,
        )
    )
    shell.training_info.extend(model.graph.meta.get(metadata.TRAINING, ()))
    return shell


def fill_nodes(proto: onnx.GraphProto, graph: ir.Graph, write: TensorWriter) -> None:
    """Write a graph's name and nodes, with their subgraphs."""
    if graph.name:
        proto.name = graph.name
    for node in graph:
        _fill_node(proto.node.add(), node, write)


def fill_rest(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Write what is neither name, node nor dense initializer."""
    if graph.doc_string:
        proto.doc_string = graph.doc_string
    proto.input.extend(_interface(value, metadata.INPUT_INFO) for value in graph.inputs)
    proto.output.extend(_interface(value, metadata.OUTPUT_INFO) for value in graph.outputs)
    proto.value_info.extend(_value_info(graph))
    for value in graph.initializers.values():
        if isinstance(value.const_value, SparseTensor):
            proto.sparse_initializer.append(value.const_value.proto)
    for value in _annotated(graph):
        annotation = proto.quantization_annotation.add(tensor_name=value.name)
        _add_pairs(annotation.quant_parameter_tensor_names, value.meta[metadata.QUANTIZATION])
    _add_pairs(proto.metadata_props, graph.metadata_props)


def _add_pairs(field: object, pairs: Mapping[str, str]) -> None:
    for key, value in pairs.items():
        field.add(key=key, value=value)  # type: ignore[attr-defined]


def _interface(value: ir.Value, mark: str) -> onnx.ValueInfoProto:
    """A graph input or output: the message it was read from while it still tells the truth."""
    info, kind, shape = value.meta.get(mark, (None, None, None))
    if info is not None and (info.name, kind, shape) == (value.name, value.type, value.shape):
        copy = onnx.ValueInfoProto()
        copy.CopyFrom(info)
        return copy
    return ir.serde.serialize_value(value)


def _produced(graph: ir.Graph) -> Iterator[ir.Value]:
    return (output for node in graph for output in node.outputs if output.name)


def _value_info(graph: ir.Graph) -> Iterator[onnx.ValueInfoProto]:
    for value in graph.initializers.values():
        if value.meta.get(metadata.LISTED) and not value.is_graph_input():
            yield ir.serde.serialize_value(value)
    for value in _produced(graph):
        known = value.type is not None or value.shape is not None
        told = known or value.doc_string or value.metadata_props
        if told and not value.is_graph_output():
            yield ir.serde.serialize_value(value)
    yield from graph.meta.get(metadata.EXTRA_VALUE_INFO, ())


def _annotated(graph: ir.Graph) -> Iterator[ir.Value]:
    seen = {}
    for values in (graph.inputs, graph.initializers.values(), _produced(graph)):
        seen.update({id(value): value for value in values})
    return (value for value in seen.values() if value.meta.get(metadata.QUANTIZATION))


def _fill_node(proto: onnx.NodeProto, node: ir.Node, write: TensorWriter) -> None:
    proto.op_type = node.op_type
    if node.domain:
        proto.domain = node.domain
    if node.overload:
        proto.overload = node.overload
    generated, original = node.meta.get(metadata.GENERATED_NAME, (None, None))
    if name := original if node.name == generated else node.name:
        proto.name = name
    if node.doc_string:
        proto.doc_string = node.doc_string
    proto.input.extend("" if value is None else value.name or "" for value in node.inputs)
    proto.output.extend(value.name or "" for value in node.outputs)
    while proto.output and not proto.output[-1]:
        del proto.output[-1]
    for attribute in node.attributes.values():
        _fill_attribute(proto.attribute.add(), attribute, write)
    _add_pairs(proto.metadata_props, node.metadata_props)
    for configuration in getattr(node, "device_configurations", ()):
        message = ir.serde.serialize_node_device_configuration(configuration)
        proto.device_configurations.append(message)


def _fill_attribute(proto: onnx.AttributeProto, attribute: ir.Attr, write: TensorWriter) -> None:
    kind = attribute.type
    if attribute.is_ref():
        proto.CopyFrom(ir.serde.serialize_reference_attribute(attribute))
        return
    if kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        several = kind == ir.AttributeType.TENSORS
        for tensor in attribute.as_tensors() if several else (attribute.as_tensor(),):
            target = proto.tensors.add() if several else proto.t
            target.CopyFrom(write(tensor, tensor.name))
    elif kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        several = kind == ir.AttributeType.GRAPHS
        for graph in attribute.as_graphs() if several else (attribute.as_graph(),):
            _fill_graph(proto.graphs.add() if several else proto.g, graph, write)
    else:
        proto.CopyFrom(ir.serde.serialize_attribute(attribute))
        return
    proto.name = attribute.name
    proto.type = onnx.AttributeProto.AttributeType.ValueType(kind.value)
    if attribute.doc_string:
        proto.doc_string = attribute.doc_string


def _fill_graph(proto: onnx.GraphProto, graph: ir.Graph, write: TensorWriter) -> None:
    fill_nodes(proto, graph, write)
    for name, value in graph.initializers.items():
        if value.const_value is not None and not isinstance(value.const_value, SparseTensor):
            proto.initializer.append(write(value.const_value, name))
    fill_rest(proto, graph)
