"""Tensors that are not in memory: mapped from a file, or sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.passes.weight import Array

__all__ = [
    "ELEMENT_TYPES",
    "WEIGHT_TYPES",
    "MappedTensor",
    "SparseTensor",
    "all_finite",
    "dtype_name",
    "is_float",
    "is_matrix",
    "not_finite",
    "shape_of",
]

# Tensors are copied from file to file in pieces of this size.
_COPY_BYTES = 1 << 20

# Elements that are looked at together.
_PIECE = 1 << 18

# Element types of the weights that codecs store, by their name in `passes.weight`.
ELEMENT_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
WEIGHT_TYPES = tuple(ELEMENT_TYPES.values())

_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.DOUBLE: "float64",
}


def dtype_name(dtype: ir.DataType) -> str:
    """The element type in words: "float32", "bfloat16", "uint8", "float8e4m3fn", ..."""
    return _NAMES.get(dtype) or dtype.name.lower()


def is_float(dtype: ir.DataType) -> bool:
    """Whether the type is a floating-point type of any width."""
    return dtype in _NAMES or dtype.name.startswith("FLOAT")


def shape_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape as plain integers."""
    return tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def is_matrix(tensor: ir.TensorProtocol) -> bool:
    """Whether more than one dimension of a tensor is greater than 1."""
    return sum(dim > 1 for dim in shape_of(tensor)) > 1


def not_finite(weight: Array) -> str:
    """Why a weight cannot be encoded for its values; empty when all are finite."""
    return "" if all(map(all_finite, _pieces(weight))) else "holds infinities or NaN"


def all_finite(part: Array) -> bool:
    """Whether there are no infinities and no NaN among some floating-point numbers."""
    if part.itemsize != 2:
        return bool(np.isfinite(part).all())
    # numpy has no vector instructions for such types; with all bits of the exponent it is neither.
    exponent = np.uint16(0x7C00 if part.dtype == np.float16 else 0x7F80)
    return not ((part.view(np.uint16) & exponent) == exponent).any()


def _pieces(matrix: Array) -> Iterator[Array]:
    """A matrix ``(rows, length)`` in pieces of some lines, as it lies in memory."""
    lines = matrix.T if matrix.strides[0] < matrix.strides[-1] else matrix
    step = max(1, _PIECE // max(1, lines.shape[-1]))
    return (lines[start : start + step] for start in range(0, len(lines), step))


class MappedTensor(ir.LazyTensor):
    """A tensor whose bytes lie in a file and are mapped at each access, never kept.

    `numpy` maps the file anew, so pages leave memory as soon as the array does. An array that
    would not be aligned to its element size is read instead of mapped.

    Attributes:
        path: The file.
        offset: First byte of the tensor in the file.
        length: Bytes of the tensor.
    """

    def __init__(
        self,
        path: str,
        offset: int,
        length: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        **labels: Any,
    ) -> None:
        super().__init__(self._map, dtype, shape, cache=False, **labels)
        self.path = path
        self.offset = offset
        self.length = length

    def _map(self) -> ir.TensorProtocol:
        shape = shape_of(self)
        if self.dtype.bitwidth < 8:
            return ir.PackedTensor(self._elements(np.dtype(np.uint8)), self.dtype, shape=shape)
        array = self._elements(self.dtype.numpy())
        return ir.Tensor(array.reshape(shape), dtype=self.dtype)

    def _elements(self, dtype: np.dtype[Any]) -> Array:
        count = self.length // dtype.itemsize
        if count == 0:
            return np.zeros(0, dtype)
        if self.offset % dtype.itemsize:
            raw = np.fromfile(self.path, np.uint8, self.length, offset=self.offset)
        else:
            raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        # A plain array keeps the map alive without the subclass leaking into results.
        return np.asarray(raw).view(dtype)

    def tobytes(self) -> bytes:
        """The bytes of the tensor, read from the file."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def tofile(self, file: BinaryIO) -> None:
        """Copy the bytes to a file in small pieces."""
        with open(self.path, "rb") as source:
            source.seek(self.offset)
            left = self.length
            while left and (piece := source.read(min(left, _COPY_BYTES))):
                file.write(piece)
                left -= len(piece)


class SparseTensor(ir.LazyTensor):
    """A sparse initializer, kept as the protobuf message it came as.

    Attributes:
        proto: The message; `numpy` gives the dense form.
    """

    def __init__(self, proto: onnx.SparseTensorProto) -> None:
        super().__init__(
            self._dense,
            ir.DataType(proto.values.data_type),
            ir.Shape(proto.dims),
            cache=False,
            name=proto.values.name,
        )
        self.proto = proto

    def _dense(self) -> ir.TensorProtocol:
        values = onnx.numpy_helper.to_array(self.proto.values)
        indices = onnx.numpy_helper.to_array(self.proto.indices)
        shape = shape_of(self)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        dense = np.zeros(math.prod(shape), values.dtype)
        dense[indices] = values
        return ir.Tensor(dense.reshape(shape), dtype=self.dtype)
