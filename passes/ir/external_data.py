"""Where external tensors may lie, and tensors mapped from there.

A location must be a relative path that stays in the model's folder, symbolic links followed. Where
the model file is itself a link (content-addressed caches do this), the folder it points to counts
as the model's folder as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.protobuf_wire import INLINE
from onnxcomp.passes.ir.tensors import MappedTensor, dtype_name, shape_of
from onnxcomp.passes.ir.traversal import scopes

__all__ = ["DataFiles"]


class DataFiles:
    """The files one model's tensors are read from.

    Args:
        model: The .onnx file; None for a model that came as an object.
    """

    def __init__(self, model: Path | None) -> None:
        self._model = None if model is None else os.path.realpath(model)
        self._folder = None if model is None else os.path.dirname(os.path.abspath(model))
        self._sizes: dict[str, int] = {}
        if self._model is not None:
            self._sizes[self._model] = os.path.getsize(self._model)

    @property
    def paths(self) -> frozenset[str]:
        """Real paths of the model file and of all data files met so far."""
        return frozenset(self._sizes)

    def adopt(self, model: ir.Model) -> None:
        """Replace every external tensor of a model by a mapped one, and check the others.

        Raises:
            ModelError: A location is refused or missing, or a tensor does not fit its bytes.
        """
        for scope in scopes(model):
            for value in scope.graph.initializers.values():
                if value.const_value is not None:
                    value.const_value = self.mapped(value.const_value, value.name or "")
        for node in _nodes(model):
            for attribute in list(node.attributes.values()):
                if not attribute.is_ref() and attribute.type in _TENSORS:
                    node.attributes[attribute.name] = self._attribute(node, attribute)

    def _attribute(self, node: ir.Node, attribute: ir.Attr) -> ir.Attr:
        where = f"{attribute.name} of node {node.name or node.op_type}"
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = self.mapped(attribute.as_tensor(), where)
            return ir.AttrTensor(attribute.name, tensor, doc_string=attribute.doc_string)
        tensors = [self.mapped(tensor, where) for tensor in attribute.as_tensors()]
        return ir.AttrTensors(attribute.name, tensors, doc_string=attribute.doc_string)

    def mapped(self, tensor: ir.TensorProtocol, label: str) -> ir.TensorProtocol:
        """The tensor itself, or a mapped one in place of an external one."""
        if isinstance(tensor, MappedTensor):
            self._size(tensor.path, label)
        _check_kind(tensor, label)
        if isinstance(tensor, ir.TensorProtoTensor):
            _check_inline(tensor, label)
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        path = self._resolve(tensor, label)
        offset, length = tensor.offset or 0, tensor.length
        length = length or tensor.nbytes  # some writers put 0 for "to the end of the tensor"
        self._check_region(path, offset, length, tensor, label)
        labels = {
            "name": tensor.name,
            "doc_string": tensor.doc_string,
            "metadata_props": dict(tensor.metadata_props),
        }
        return MappedTensor(path, offset, length, tensor.dtype, tensor.shape, **labels)

    def _check_region(
        self, path: str, offset: int, length: int, tensor: ir.TensorProtocol, label: str
    ) -> None:
        if length != tensor.nbytes:
            raise _misfit(tensor, label, length)
        size = self._size(path, label)
        if offset < 0 or offset + length > size:
            raise ModelError(
                f"tensor {label!r} is cut short: it needs bytes {offset} to {offset + length} of "
                f"{os.path.basename(path)}, which has {size}",
                hint="the data file is truncated or belongs to another model",
            )

    def _size(self, path: str, label: str) -> int:
        if path not in self._sizes:
            try:
                status = os.stat(path)
            except OSError as error:
                raise ModelError(
                    f"the data file {os.path.basename(path)} of tensor {label!r} cannot be read: "
                    f"{error.strerror}",
                    hint="keep the model and its data files together in one folder",
                ) from error
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(
                    f"the data file {path} of tensor {label!r} is not a regular file",
                    hint="keep the model and its data files together in one folder",
                )
            self._sizes[path] = status.st_size
        return self._sizes[path]

    def _resolve(self, tensor: ir.ExternalTensor, label: str) -> str:
        location = os.fspath(tensor.location)
        if location == INLINE and self._model is not None:
            return self._model
        base = os.fspath(tensor.base_dir)
        if self._folder is None and not base:
            raise ModelError(
                f"tensor {label!r} is stored in the file {location!r}, but the model was given "
                "without a path",
                hint="give the path of the .onnx file instead of the loaded object",
            )
        folder = os.path.abspath(base) if base else str(self._folder)
        return self._contained(folder, location, label)

    def _contained(self, folder: str, location: str, label: str) -> str:
        path = os.path.normpath(os.path.join(folder, location))
        absolute = os.path.isabs(location) or bool(PureWindowsPath(location).anchor)
        if not absolute and "\0" not in location and _within(path, folder):
            real = os.path.realpath(path)
            roots = [os.path.realpath(folder), os.path.dirname(self._model or "")]
            if any(_within(real, root) for root in roots if root):
                return real
        raise ModelError(
            f"tensor {label!r} points outside the model's folder: {location!r}",
            hint="external data must lie beside the model; move it there and export again",
        )


_DAMAGED = "the file is damaged; export the model again"

# Fields of TensorProto that hold values one by one, and entries for each element; all other types
# are in int32_data, those below a byte packed.
_VALUES = {
    "FLOAT": ("float_data", 1),
    "COMPLEX64": ("float_data", 2),
    "DOUBLE": ("double_data", 1),
    "COMPLEX128": ("double_data", 2),
    "INT64": ("int64_data", 1),
    "UINT32": ("uint64_data", 1),
    "UINT64": ("uint64_data", 1),
}

_TENSORS = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _misfit(tensor: ir.TensorProtocol, label: str, length: int) -> ModelError:
    kind = f"{dtype_name(tensor.dtype)} {list(shape_of(tensor))}"
    return ModelError(
        f"tensor {label!r} is {kind} and needs {tensor.nbytes} bytes, but {length} are stored",
        hint=_DAMAGED,
    )


def _check_kind(tensor: ir.TensorProtocol, label: str) -> None:
    """Refuse tensors of a type or with a dimension that no tensor can have."""
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor {label!r} has no element type", hint=_DAMAGED)
    if tensor.dtype == ir.DataType.STRING and not isinstance(tensor, ir.StringTensor):
        raise ModelError(f"tensor {label!r} has its strings stored as raw bytes", hint=_DAMAGED)
    if any(dim < 0 for dim in shape_of(tensor)):
        raise ModelError(
            f"tensor {label!r} has a negative dimension: {list(shape_of(tensor))}", hint=_DAMAGED
        )


def _check_inline(tensor: ir.TensorProtoTensor, label: str) -> None:
    """Refuse tensors that hold more or fewer elements than their shape has."""
    raw, bits = tensor.raw, tensor.dtype.bitwidth
    if raw.HasField("raw_data"):
        if len(raw.raw_data) != tensor.nbytes:
            raise _misfit(tensor, label, len(raw.raw_data))
        return
    field, width = _VALUES.get(tensor.dtype.name, ("int32_data", 1))
    wanted = width * (tensor.size if bits >= 8 else -(-tensor.size * bits // 8))
    entries = len(getattr(raw, field))
    if entries != wanted:
        raise ModelError(
            f"tensor {label!r} is {dtype_name(tensor.dtype)} {list(shape_of(tensor))} and needs "
            f"{wanted} values, but {entries} are stored",
            hint=_DAMAGED,
        )
