"""Write a model: weights streamed one at a time, sizes known before anything is written.

A model of less than `THRESHOLD` bytes of tensors is one file. A larger one is ``<out>.onnx`` and
``<out>.onnx.data``: every tensor of `EXTERNAL_BYTES` or more lies in the data file, at a multiple
of `PAGE` where it is large, so that a runtime can map it and compute on it in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.errors import CompressionError, ModelError, UsageError
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.atomic import uninterrupted
from onnxcomp.passes.ir.protobuf_wire import varint
from onnxcomp.passes.ir.serializer import (
    fill_nodes,
    fill_rest,
    model_shell,
    tensor_header,
    tensor_proto,
)
from onnxcomp.passes.ir.tensors import SparseTensor
from onnxcomp.passes.weight import release_pages
from onnxcomp.runtime.activity import activity

__all__ = ["EXTERNAL_BYTES", "PAGE", "THRESHOLD", "ExternalData", "Saved", "output_size", "save"]

ExternalData = Literal["auto", "always", "never"]

THRESHOLD = 64 << 20
EXTERNAL_BYTES = 1024
PAGE = 4096
_PREFIX = 40  # characters of a name in that of its temporary file, which must stay valid
_LINE = 64  # alignment of small external tensors: one cache line
_PAGE_BYTES = 64 << 10  # tensors of this size start on a page of their own
_LARGEST = (1 << 31) - 1  # bytes of the largest message protobuf reads

_GRAPH_TAG, _INITIALIZER_TAG, _RAW_DATA_TAG = (varint(n << 3 | 2) for n in (7, 5, 9))
_AFTER_GRAPH = ("opset_import", "metadata_props", "training_info", "functions", "configuration")
_AFTER_RAW_DATA = ("doc_string", "metadata_props")

Piece = bytes | ir.TensorProtocol


@dataclasses.dataclass(frozen=True, slots=True)
class Saved:
    """What `save` wrote.

    Attributes:
        files: The .onnx file, then its data file if there is one.
        bytes: Bytes of all files together.
    """

    files: tuple[Path, ...]
    bytes: int


class _DataFile:
    """Lays tensors out one behind the other in a data file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size = 0
        self.regions: list[tuple[int, ir.TensorProtocol]] = []

    def place(self, tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
        """Give the tensor its region and return the message that refers to it."""
        alignment = PAGE if tensor.nbytes >= _PAGE_BYTES else _LINE
        offset = -(-self.size // alignment) * alignment
        self.regions.append((offset, tensor))
        self.size = offset + tensor.nbytes
        proto = tensor_header(tensor, name)
        proto.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": self.name, "offset": offset, "length": tensor.nbytes}
        for key, value in entries.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    def write(self, file: BinaryIO) -> None:
        """Write every tensor at its place."""
        for number, (offset, tensor) in enumerate(self.regions):
            activity("writing", number, len(self.regions), tensor.name or "")
            file.write(bytes(offset - file.tell()))
            _stream(tensor, file)


class _Image:
    """The files of a model as pieces: serialised messages, and tensors still to be read.

    The tensors of the main graph stay pieces. Inline tensors of subgraphs and attributes are
    serialised with their graph, because every enclosing message states its length.
    """

    def __init__(self, model: ir.Model, external: bool, name: str) -> None:
        self.data = _DataFile(f"{name}.data") if external else None
        initializers = [
            part
            for name, value in model.graph.initializers.items()
            if value.const_value is not None and not isinstance(value.const_value, SparseTensor)
            for part in self._initializer(value.const_value, name)
        ]
        nodes, rest, shell = onnx.GraphProto(), onnx.GraphProto(), model_shell(model)
        fill_nodes(nodes, model.graph, self._nested)
        fill_rest(rest, model.graph)
        # Before IR 10 the shell keeps the value_info of function bodies in its graph.
        rest.value_info.extend(shell.graph.value_info)
        head, tail = _split(shell, _AFTER_GRAPH, drop="graph")
        graph = [nodes.SerializeToString(), *initializers, rest.SerializeToString()]
        size = sum(map(_length, graph))
        self.pieces: list[Piece] = [head, _GRAPH_TAG + varint(size), *graph, tail]
        self.size = sum(map(_length, self.pieces))
        if self.size > _LARGEST:
            raise _too_large(self.size)

    def _is_external(self, tensor: ir.TensorProtocol) -> bool:
        sizeable = tensor.nbytes >= EXTERNAL_BYTES
        return self.data is not None and sizeable and not isinstance(tensor, ir.StringTensor)

    def _nested(self, tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
        if self.data is not None and self._is_external(tensor):
            return self.data.place(tensor, name)
        return tensor_proto(tensor, name)

    def _initializer(self, tensor: ir.TensorProtocol, name: str) -> Iterator[Piece]:
        if self._is_external(tensor) or isinstance(tensor, ir.StringTensor):
            message = self._nested(tensor, name).SerializeToString()
            yield _INITIALIZER_TAG + varint(len(message)) + message
            return
        head, tail = _split(tensor_header(tensor, name), _AFTER_RAW_DATA)
        head += _RAW_DATA_TAG + varint(tensor.nbytes)
        size = len(head) + tensor.nbytes + len(tail)
        yield _INITIALIZER_TAG + varint(size) + head
        yield tensor
        yield tail

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return self.size + (self.data.size if self.data else 0)

    def write(self, file: BinaryIO) -> None:
        """Write the .onnx file."""
        for piece in self.pieces:
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                _stream(piece, file)


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.nbytes


def _split(
    proto: onnx.ModelProto | onnx.TensorProto, after: tuple[str, ...], drop: str = ""
) -> tuple[bytes, bytes]:
    """The message in two parts, the second with the fields named."""
    tail = type(proto)()
    tail.CopyFrom(proto)
    for field, _ in proto.ListFields():
        (proto if field.name in (*after, drop) else tail).ClearField(field.name)
    if drop:
        tail.ClearField(drop)
    return proto.SerializeToString(), tail.SerializeToString()


def _stream(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    start = file.tell()
    if hasattr(tensor, "tofile"):
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    if isinstance(raw := getattr(tensor, "raw", None), np.ndarray):
        release_pages(raw)  # or all payloads that wait in a file would be in memory in the end
    written = file.tell() - start
    if written != tensor.nbytes:
        raise CompressionError(
            f"tensor {tensor.name!r} has {tensor.nbytes} bytes, but {written} were read",
            hint="the input may have changed while it was read",
        )


def _too_large(size: int) -> ModelError:
    return ModelError(
        f"the model needs {size:,} bytes in one .onnx file, and protobuf stops at {_LARGEST:,}",
        hint="use --external-data auto, and weights as initializers rather than in functions",
    )


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()


def _image(model: ir.Model, external_data: ExternalData, name: str) -> _Image:
    total = sum(t.nbytes for t in _tensors(model) if not isinstance(t, ir.StringTensor))
    if external_data == "never" and total > _LARGEST:
        raise _too_large(total)
    external = external_data == "always" or (external_data == "auto" and total >= THRESHOLD)
    try:
        return _Image(model, external, name)
    except (ir.serde.SerdeError, UnicodeError) as error:  # text that is no UTF-8, say
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        raise ModelError(
            f"the model cannot be written: {cause}", hint="the file is damaged; export it again"
        ) from error


def output_size(
    model: ir.Model, *, external_data: ExternalData = "auto", name: str = "out.onnx"
) -> int:
    """Bytes `save` would write in all files together, exactly, without reading any weight.

    Args:
        model: The model.
        external_data: As for `save`.
        name: File name of the output; its length is part of every external tensor's entry.
    """
    return _image(model, external_data, name).total


def save(
    model: ir.Model, path: str | os.PathLike[str], *, external_data: ExternalData = "auto"
) -> Saved:
    """Write a model; the files appear complete or not at all.

    Args:
        model: The model; not changed.
        path: The .onnx file. A data file is called ``<path>.data`` and holds all large tensors;
            nothing refers to the files the model was read from.
        external_data: "auto" writes a data file for `THRESHOLD` bytes of tensors or more.

    Raises:
        UsageError: The output would overwrite a file the model is read from, or cannot be written.
        ModelError: The model does not fit into one .onnx file and `external_data` is "never".
    """
    path = Path(path)
    image = _image(model, external_data, path.name)
    targets = [path] if image.data is None else [path, path.with_name(image.data.name)]
    _refuse_overwriting(model, targets)
    staging = _Staging()
    try:
        # The data file first: a reader of the new model must find its weights.
        if image.data is not None:
            with staging.open(targets[1]) as file:
                image.data.write(file)
        with staging.open(path) as file:
            image.write(file)
        staging.commit()
    except OSError as error:
        # numpy does not say why it wrote less than it should have.
        reason = error.strerror or f"the disk is full, or a limit is reached ({error})"
        raise UsageError(
            f"cannot write {path.name}: {reason}", hint="choose a folder with enough free space"
        ) from error
    finally:
        staging.discard()
    return Saved(tuple(targets), image.total)


def _refuse_overwriting(model: ir.Model, targets: list[Path]) -> None:
    sources = model.graph.meta.get(metadata.SOURCE, frozenset())
    for target in targets:
        if os.path.realpath(target) in sources:
            raise UsageError(
                f"the output {target} would overwrite a file the model is read from",
                hint="choose another name with -o",
            )


class _Staging:
    """Files under temporary names beside their targets, renamed together at the end."""

    def __init__(self) -> None:
        self._files: list[tuple[Path, Path]] = []

    def open(self, target: Path) -> BinaryIO:
        """Open the temporary file of a target, with the permissions the umask gives."""
        temporary = target.with_name(f".{target.name[:_PREFIX]}.{secrets.token_hex(4)}.part")
        # Listed before it exists: an interruption in between leaves nothing behind.
        self._files.append((temporary, target))
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        return os.fdopen(descriptor, "w+b")

    def commit(self) -> None:
        """Give every file its final name."""
        with uninterrupted():
            while self._files:
                temporary, target = self._files[0]
                os.replace(temporary, target)
                del self._files[0]

    def discard(self) -> None:
        """Remove what was not committed."""
        with uninterrupted():
            for temporary, _ in self._files:
                with contextlib.suppress(OSError):
                    temporary.unlink()
