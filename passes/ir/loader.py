"""Load a model from wherever it is into ONNX IR, with its weights left in their files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.external_data import DataFiles
from onnxcomp.passes.ir.protobuf_wire import WireError, without_tensors
from onnxcomp.passes.ir.tensors import SparseTensor
from onnxcomp.passes.ir.traversal import scopes, subgraphs
from onnxcomp.passes.ir.validate import check_attributes

__all__ = ["copy_model", "from_gs", "load", "load_changed"]

ModelSource = str | os.PathLike[str] | onnx.ModelProto | ir.Model | Any
Graphs = Iterator[tuple[ir.Graph, onnx.GraphProto]]

_SPARSE_ATTRIBUTES = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)


def load(source: ModelSource) -> ir.Model:
    """Load a model; the source is never modified, whatever is done to the result.

    Args:
        source: Path of an .onnx file, an `onnx.ModelProto`, an `onnx_ir.Model`, an
            `onnx_graphsurgeon.Graph` or a torch `ONNXProgram`. Weights of a file, inline or
            external, are mapped when they are read; those of an object are shared with it.

    Raises:
        ModelError: The file is missing, truncated or not ONNX, an external tensor lies outside
            the model's folder, or the graph is broken.
        UsageError: The source is of another type.
    """
    if isinstance(source, (str, os.PathLike)):
        return _load_file(Path(source))
    if isinstance(source, onnx.ModelProto):
        return _from_proto(source, DataFiles(None))
    if isinstance(source, ir.Model):
        return copy_model(source)
    if type(source).__module__.startswith("onnx_graphsurgeon."):
        return from_gs(source)
    for attribute in ("model", "model_proto"):
        inner = getattr(source, attribute, None)
        if isinstance(inner, (ir.Model, onnx.ModelProto)):
            return load(inner)
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    raise UsageError(
        f"cannot read a model from an object of type {kind}",
        hint="give a path, an onnx.ModelProto, an onnx_ir.Model, an onnx_graphsurgeon.Graph or "
        "a torch ONNXProgram",
    )


def load_changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> ir.Model:
    """Load a model's file with a change of its message, which has no large tensors in it.

    Raises:
        ModelError: As for `load`.
    """
    return _load_file(path, change)


def from_gs(graph: Any) -> ir.Model:
    """The model that an `onnx_graphsurgeon.Graph` describes; the graph is not changed.

    Raises:
        ModelError: The graph is not a valid model.
        UsageError: GraphSurgeon is not installed.
    """
    from onnxcomp.passes.ir.graphsurgeon import proto_of_gs

    return load(proto_of_gs(graph))


def copy_model(model: ir.Model) -> ir.Model:
    """A copy that shares tensors, but no graph, node or value, with the original."""
    try:
        copy = model.clone()
    except RuntimeError as error:  # of nodes before their producers
        raise ModelError(
            f"the model cannot be copied: {_root_cause(error)}",
            hint="sort it first: model.graph.sort()",
        ) from error
    files = DataFiles(None)
    files.adopt(copy)
    _remember(copy, files)
    return copy


def _load_file(path: Path, change: Callable[[onnx.ModelProto], None] | None = None) -> ir.Model:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        if path.exists() and not path.is_dir():
            raise ModelError(
                f"{path}: a model is read from a regular file, not from a pipe or a device",
                hint="save it to a file first: its weights are read in place",
            )
        raise ModelError(f"{path}: the model file {what}", hint="check the path")
    try:
        skeleton = _skeleton_of(path)
        proto = onnx.ModelProto.FromString(skeleton)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (WireError, DecodeError) as error:
        raise ModelError(
            f"{path}: not an ONNX file, or truncated ({error})",
            hint="download or export the file again; .ort and .tflite files are not supported",
        ) from error
    if change is not None:
        change(proto)
    try:
        return _from_proto(proto, DataFiles(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error.__cause__


def _skeleton_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise WireError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return without_tensors(mapped)


def _from_proto(proto: onnx.ModelProto, files: DataFiles) -> ir.Model:
    if not proto.HasField("graph") or proto.ir_version < 1:
        what = "IR version" if proto.HasField("graph") else "graph"
        raise ModelError(f"not an ONNX model: it has no {what}", hint="export the model again")
    check_attributes(proto)
    proto = _with_sparse_initializers(proto)
    readable, odd = _representable(proto)
    try:
        model = ir.serde.deserialize_model(readable)
        _annotate(model, proto, odd)
        files.adopt(model)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"the model is invalid: {_root_cause(error)}",
            hint="the file is damaged; export the model again",
        ) from error
    _check_values(model)
    _order_nodes(model)
    _remember(model, files)
    return model


def _root_cause(error: BaseException) -> str:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split())[:300]


def _remember(model: ir.Model, files: DataFiles) -> None:
    known = model.graph.meta.get(metadata.SOURCE, frozenset())
    model.graph.meta[metadata.SOURCE] = known | files.paths


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graph_protos(attribute.g)
            for inner in attribute.graphs:
                yield from _graph_protos(inner)


def _is_odd(kind: onnx.TypeProto) -> bool:
    """Whether ONNX IR has no form for a type: maps, opaque types, and sequences of them."""
    if kind.HasField("map_type") or kind.WhichOneof("value") == "opaque_type":
        return True
    for field in ("sequence_type", "optional_type"):
        if kind.HasField(field) and _is_odd(getattr(kind, field).elem_type):
            return True
    return False


def _with_sparse_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Sparse tensors in Constant nodes become sparse initializers, which are kept as they are."""
    if not any(_sparse_constants(graph) for graph in _graph_protos(proto.graph)):
        return proto
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for graph in _graph_protos(changed.graph):
        for node in _sparse_constants(graph):
            tensor = graph.sparse_initializer.add()
            tensor.CopyFrom(node.attribute[0].sparse_tensor)
            tensor.values.name = node.output[0]
            graph.node.remove(node)
    return changed


def _sparse_constants(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [
        node
        for node in graph.node
        if node.op_type == "Constant"
        and len(node.attribute) == len(node.output) == 1
        and node.attribute[0].type == onnx.AttributeProto.SPARSE_TENSOR
        and node.attribute[0].name == "sparse_value"
    ]


def _representable(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The model without what ONNX IR cannot read: map types and sparse initializers."""
    odd = False
    for graph in _graph_protos(proto.graph):
        infos = [*graph.input, *graph.output, *graph.value_info]
        odd |= bool(graph.sparse_initializer) or any(_is_odd(info.type) for info in infos)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            if attribute.type in _SPARSE_ATTRIBUTES:
                raise ModelError(
                    f"attribute {attribute.name!r} holds a sparse tensor, which is not supported",
                    hint="store the constant as a dense tensor or as a sparse initializer",
                )
    if not odd:
        return proto, False
    readable = onnx.ModelProto()
    readable.CopyFrom(proto)
    for graph in _graph_protos(readable.graph):
        for info in [*graph.input, *graph.output, *graph.value_info]:
            if _is_odd(info.type):
                info.ClearField("type")
        for sparse in graph.sparse_initializer:
            graph.initializer.add(
                name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims
            )
    return readable, True


def _paired(graph: ir.Graph, proto: onnx.GraphProto) -> Graphs:
    """The graphs of a model beside the messages they were read from."""
    yield graph, proto
    for node, node_proto in zip(graph, proto.node, strict=True):
        for attribute in node_proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _paired(node.attributes[attribute.name].as_graph(), attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                inner = node.attributes[attribute.name].as_graphs()
                for one, one_proto in zip(inner, attribute.graphs, strict=True):
                    yield from _paired(one, one_proto)


def _annotate(model: ir.Model, proto: onnx.ModelProto, odd: bool) -> None:
    """Keep on the graphs what ONNX IR drops, so that writing gives it back."""
    if proto.training_info:
        model.graph.meta[metadata.TRAINING] = list(proto.training_info)
    for graph, graph_proto in _paired(model.graph, proto.graph):
        for values, infos, mark in (
            (graph.inputs, graph_proto.input, metadata.INPUT_INFO),
            (graph.outputs, graph_proto.output, metadata.OUTPUT_INFO),
        ):
            for value, info in zip(values, infos, strict=True):
                shape = None if value.shape is None else value.shape.copy()
                value.meta[mark] = (info, value.type, shape)
        _annotate_value_info(graph, graph_proto, model)
        if odd:
            for sparse in graph_proto.sparse_initializer:
                graph.initializers[sparse.values.name].const_value = SparseTensor(sparse)


def _annotate_value_info(graph: ir.Graph, proto: onnx.GraphProto, model: ir.Model) -> None:
    produced = {output.name for node in graph for output in node.outputs}
    inputs = {value.name for value in graph.inputs}
    outputs = {value.name for value in graph.outputs}
    functions = tuple(
        f"{function.domain}::{function.name}/" for function in model.functions.values()
    )
    extra = []
    for info in proto.value_info:
        if info.name in graph.initializers and info.name not in inputs:
            graph.initializers[info.name].meta[metadata.LISTED] = True
        elif info.name not in produced | inputs | outputs and not (
            functions and info.name.startswith(functions)
        ):
            extra.append(info)
    if extra:
        graph.meta[metadata.EXTRA_VALUE_INFO] = extra


def _check_values(model: ir.Model) -> None:
    """Every value that is read or returned must come from somewhere."""
    bodies = [scope.graph for scope in scopes(model)]
    bodies += [function.graph for function in model.functions.values()]
    for graph in bodies:
        for node in graph:
            for value in node.inputs:
                if value is not None and not _defined(value):
                    raise ModelError(
                        f"node {node.name or node.op_type!r} reads {value.name!r}, which nothing "
                        "produces",
                        hint="export the model again; ONNX Runtime would refuse it too",
                    )
        for value in graph.outputs:
            if not _defined(value):
                raise ModelError(
                    f"output {value.name!r} is not produced by the graph",
                    hint="export the model again; ONNX Runtime would refuse it too",
                )


def _order_nodes(model: ir.Model) -> None:
    """Put nodes behind those they read from, as ONNX asks for; ordered models stay as they are."""
    if all(_is_ordered(body, set()) for body in _bodies(model)):
        return
    try:
        for body in _bodies(model):
            body.sort()
    except ValueError as error:
        raise ModelError(
            "the graph has a cycle: a node needs its own result",
            hint="export the model again; ONNX Runtime would refuse it too",
        ) from error


def _bodies(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def _is_ordered(graph: ir.Graph, made: set[ir.Node]) -> bool:
    """Whether every node comes after its producers; `made` takes the nodes met so far."""
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in made:
                return False
        for _, inner in subgraphs(node):
            if not _is_ordered(inner, made):
                return False
        made.add(node)
    return True


def _defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()
