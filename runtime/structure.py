"""What a model file says about itself without its weights: its graphs and custom operators."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = [
    "DOMAIN",
    "custom_nodes",
    "custom_operators",
    "data_files",
    "model_bytes",
    "nested_nodes",
    "nested_tensors",
    "read_structure",
]

DOMAIN = "com.onnxcomp"

PathLike = str | os.PathLike[str]

_NO_MODEL = "download or export the file again; .ort and .tflite files are not supported"


def read_structure(model: PathLike | bytes) -> onnx.ModelProto:
    """The model, a path or bytes, as a message; external data is left on disk.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    import onnx

    try:
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(os.fspath(model), load_external_data=False)
    except Exception as error:  # of the file system or of protobuf, whose classes have no types
        raise _unreadable(model, error) from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{_name(model)} is not an ONNX model: it has no graph", hint=_NO_MODEL)
    return proto


def _name(model: PathLike | bytes) -> str:
    return f"{len(model)} bytes" if isinstance(model, bytes) else os.fspath(model)


def _unreadable(model: PathLike | bytes, error: Exception) -> ModelError:
    path = _name(model)
    if isinstance(error, OSError):
        return ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path")
    return ModelError(f"{path}: not an ONNX file, or truncated ({error})", hint=_NO_MODEL)


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs, outer ones first."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from nested_nodes(attribute.g.node)
            for graph in attribute.graphs:
                yield from nested_nodes(graph.node)


def custom_operators(model: PathLike | bytes) -> dict[str, int]:
    """How often the model calls each operator of com.onnxcomp, by name.

    Calls inside the operators' own bodies do not count. Files without the domain's name in them
    are not parsed at all.
    """
    counts: dict[str, int] = {}
    for node in custom_nodes(model):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def custom_nodes(model: PathLike | bytes) -> list[onnx.NodeProto]:
    """The model's calls of operators of com.onnxcomp but those inside the operators' own bodies."""
    if not _mentions(model, DOMAIN.encode()):
        return []
    proto = read_structure(model)
    bodies = [function.node for function in proto.functions if function.domain != DOMAIN]
    return [
        node
        for nodes in (proto.graph.node, *bodies)
        for node in nested_nodes(nodes)
        if node.domain == DOMAIN
    ]


def _mentions(model: PathLike | bytes, text: bytes) -> bool:
    if isinstance(model, bytes):
        return text in model
    path = Path(model)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(text) >= 0
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise _unreadable(path, error) from error


def data_files(model: PathLike) -> tuple[str, ...]:
    """Files that hold external data of the model, as it names them, in the order of their names.

    Raises:
        ModelError: The file is missing or is not an ONNX model.
    """
    return tuple(sorted(set(_locations(read_structure(model)))))


def model_bytes(model: PathLike) -> int:
    """Bytes of the .onnx file and its external data.

    Raises:
        ModelError: A file is missing.
    """
    path = Path(model)
    locations = ("", *data_files(path))
    try:
        return sum((path.parent / name if name else path).stat().st_size for name in locations)
    except OSError as error:
        raise ModelError(
            f"external data of {path} cannot be read: {error}",
            hint="keep the model and its data files together in one folder",
        ) from error


def _locations(model: onnx.ModelProto) -> Iterator[str]:
    """Files that hold external data, relative to the model."""
    for tensor in nested_tensors(model):
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def nested_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions as well."""
    pending = [model.graph]
    nodes = [*nested_nodes(model.graph.node)]
    nodes += [node for function in model.functions for node in nested_nodes(function.node)]
    for node in nodes:
        for attribute in node.attribute:
            pending += [attribute.g, *attribute.graphs]
            yield from (attribute.t, *attribute.tensors)
    for graph in pending:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
