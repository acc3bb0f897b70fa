"""How integers of a weight lie in tensors, and the nodes that compute with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import onnx

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.integer.grid import Grid, Integers, nibbles, unpacked
from onnxcomp.passes.codecs.protocol import Builder, Payload
from onnxcomp.passes.weight import Array, Attribute, Kind, WeightSite

__all__ = ["BlockLayout", "emit"]

V = TypeVar("V")

_FLOAT = int(onnx.TensorProto.FLOAT)
_INT32 = int(onnx.TensorProto.INT32)
_UINT8 = int(onnx.TensorProto.UINT8)
_TYPES: Mapping[str, int] = {
    "float32": _FLOAT,
    "float16": int(onnx.TensorProto.FLOAT16),
    "bfloat16": int(onnx.TensorProto.BFLOAT16),
}

_MICROSOFT = "com.microsoft"

# Activations rounded to 8 bits for each block, MatMulNBits's fastest arithmetic.
_INT8 = 4

# The version of the standard operators that gave DequantizeLinear an axis, and Slice its inputs.
_DEQUANTIZE_AXIS, _SLICE_INPUTS = 13, 10


@dataclasses.dataclass(frozen=True, slots=True)
class BlockLayout:
    """How one weight is stored.

    Attributes:
        bits: Bits of an integer.
        block: Weights that share a scale.
        rows: Rows of integers.
        length: Weights in a row, without padding.
        zero_points: Whether blocks have zero points of their own.
        halves: Whether integers of 8 bits are stored as two tensors of 4 bits.
        scale_type: Type of the scales.
    """

    bits: int
    block: int
    rows: int
    length: int
    zero_points: bool
    halves: bool
    scale_type: np.dtype[Any]

    @classmethod
    def of(cls, payload: Payload) -> BlockLayout:
        """The form of a payload, from its tensors and attributes, which may come from a file.

        Raises:
            ValueError: They contradict each other.
        """
        bits, block = payload.attributes.get("bits"), payload.attributes.get("block")
        extent, scales = payload.attributes.get("extent"), payload.tensors["scales"]
        if not isinstance(extent, Sequence) or isinstance(extent, str) or len(extent) != 2:
            raise ValueError(f"extent {extent} is not a pair")
        if bits not in (4, 8) or not isinstance(block, int) or block < 16:
            raise ValueError(f"there are no integers of {bits} bits in blocks of {block}")
        halves = "high" in payload.tensors
        zero_points = any(key.endswith("zeros") for key in payload.tensors)
        sizes = (int(bits), block, int(extent[0]), int(extent[1]))
        form = cls(*sizes, zero_points, halves, scales.dtype)
        shapes = {"scales": (form.rows, form.blocks), **form.byte_shapes()}
        found = {key: tensor.shape for key, tensor in payload.tensors.items()}
        if found != shapes:
            raise ValueError(f"tensors are {found}, expected {shapes}")
        return form

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.length // self.block)

    @property
    def grid(self) -> Grid:
        """The integers of a block."""
        return Grid(self.bits, self.block, self.zero_points, self.scale_type)

    @property
    def _parts(self) -> tuple[str, ...]:
        return ("high", "low") if self.halves else ("codes",)

    def byte_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the uint8 tensors by name."""
        per_byte = 2 if self.halves or self.bits == 4 else 1
        codes = (self.rows, self.blocks, self.block // per_byte)
        zeros = (self.rows, -(-self.blocks // per_byte))
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self._parts:
            shapes[part] = codes
            if self.zero_points:
                shapes[_zeros_of(part)] = zeros
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        scales = self.rows * self.blocks * self.scale_type.itemsize
        return scales + sum(math.prod(shape) for shape in self.byte_shapes().values())

    @property
    def folding_bytes(self) -> int:
        """Intermediate results when the dense weight is computed: five of four bytes, or more."""
        padded = self.rows * self.blocks * self.block
        return padded * (40 if self.halves else 22)

    def shared(self) -> dict[str, Array]:
        """Zero points of the lower halves where blocks have none: MatMulNBits would take 8."""
        if self.zero_points or not self.halves:
            return {}
        shape = (self.rows, -(-self.blocks // 2))
        return {f"int.zeros.{shape[0]}x{shape[1]}": np.zeros(shape, np.uint8)}

    def pack(self, integers: Integers) -> dict[str, Array]:
        """The uint8 tensors by name."""
        tensors = self._split(integers.codes)
        if self.zero_points:
            tensors |= {_zeros_of(k): v for k, v in self._split(integers.zeros).items()}
        return {key: tensors[key] for key in self.byte_shapes()}

    def _split(self, values: Array) -> dict[str, Array]:
        if self.halves:
            return {"high": nibbles(values >> 4), "low": nibbles(values & 15)}
        return {"codes": nibbles(values) if self.bits == 4 else values}

    def unpack(self, payload: Payload) -> Integers:
        """Inverse of `pack`."""
        scales = payload.tensors["scales"]
        zeros = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
        if self.zero_points:
            zeros = self._joined(payload, _zeros_of, self.blocks)
        return Integers(self._joined(payload, str, self.block), scales, zeros)

    def _joined(self, payload: Payload, name: Callable[[str], str], count: int) -> Array:
        parts = [payload.tensors[name(part)] for part in self._parts]
        if self.halves:
            high, low = (unpacked(part, count) for part in parts)
            return np.asarray((high << 4) | low)
        return unpacked(parts[0], count) if self.bits == 4 else parts[0]


def _zeros_of(part: str) -> str:
    return "zeros" if part == "codes" else f"{part}_zeros"


def emit(builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None) -> V:
    """Nodes for one use.

    ``matmul``: ``y = MatMulNBits(x, codes, scales, zeros)``, or for 8 bits
    ``y = 16 MatMulNBits(x, high, scales, ...) + MatMulNBits(x, low, scales, ...)``. ``gather``: the
    looked-up rows, ``(Cast(Gather(codes, x)) - Gather(zeros, x)) * Gather(scales, x)``. ``weight``:
    the same for all rows, which a session folds to a constant. ``decode``: integers of one byte and
    DequantizeLinear, which a session does not fold.

    Raises:
        UsageError: The codec cannot serve this use.
    """
    nodes = _Nodes(builder, site, payload)
    if kind == "matmul" and x is not None:
        result = nodes.product(x)
    elif kind == "gather" and x is not None:
        result = nodes.rows_at(x)
    elif kind == "decode" and builder.opset >= _DEQUANTIZE_AXIS:
        result = nodes.dequantized()
    elif kind in ("weight", "decode"):
        result = nodes.weight()
    else:
        raise UsageError(f"the codec int cannot make nodes of kind {kind} without an input")
    return cast("V", result)


class _Nodes:
    """Makes the nodes of one use."""

    def __init__(self, builder: Builder[V], site: WeightSite, payload: Payload) -> None:
        self._builder: Builder[Any] = builder
        self._site = site
        self._payload = payload
        self._form = BlockLayout.of(payload)

    def _node(self, op_type: str, *inputs: Any, **attributes: Attribute) -> Any:
        return self._builder.node(op_type, inputs, attributes)

    def _shape(self, *dims: int) -> Any:
        key = "x".join("all" if dim < 0 else str(dim) for dim in dims)
        return self._builder.constant(f"int.shape.{key}", np.array(dims, np.int64))

    def _cast(self, value: Any, dtype: str) -> Any:
        return value if dtype == "float32" else self._node("Cast", value, to=_TYPES[dtype])

    # Products

    def product(self, x: Any) -> Any:
        """MatMulNBits, in float32 where its kernels lack the type."""
        bfloat16 = self._site.dtype == "bfloat16"
        if bfloat16:
            x = self._node("Cast", x, to=_FLOAT)
        tensor = self._builder.tensor
        if not self._form.halves:
            zeros = [tensor("zeros")] if self._form.zero_points else []
            y = self._nbits(x, tensor("codes"), tensor("scales"), zeros)
        else:
            y = self._two_products(x)
        return self._cast(y, "bfloat16") if bfloat16 else y

    def _two_products(self, x: Any) -> Any:
        tensor, form = self._builder.tensor, self._form
        own = [tensor("high_zeros")] if form.zero_points else []
        low_zeros = "low_zeros" if form.zero_points else next(iter(self._payload.shared))
        high = self._nbits(x, tensor("high"), tensor("scales"), own)
        low = self._nbits(x, tensor("low"), tensor("scales"), [tensor(low_zeros)])
        # The product is scaled and not the scales: MatMulNBits takes computed scales for zeros.
        sixteen = np.array(16, form.scale_type)
        factor = self._builder.constant(f"int.sixteen.{form.scale_type.name}", sixteen)
        return self._node("Add", self._node("Mul", high, factor), low)

    def _nbits(self, x: Any, codes: Any, scales: Any, zeros: list[Any]) -> Any:
        form = self._form
        attributes: dict[str, Attribute] = {"K": form.length, "N": form.rows}
        attributes |= {"bits": 4, "block_size": form.block}
        if self._payload.attributes.get("precision"):
            attributes["accuracy_level"] = _INT8
        inputs = [x, codes, scales, *zeros]
        return self._builder.node("MatMulNBits", inputs, attributes, domain=_MICROSOFT)

    # Look-ups and the dense weight

    def rows_at(self, indices: Any) -> Any:
        """``weight[indices]``: only the rows that are asked for are decoded."""
        flat = self._node("Reshape", indices, self._shape(-1))
        matrix = self._values(lambda value: self._node("Gather", value, flat))
        shape = self._node("Shape", indices)
        length = self._builder.constant(
            f"int.length.{self._form.length}", np.array([self._form.length], np.int64)
        )
        return self._node("Reshape", matrix, self._node("Concat", shape, length, axis=0))

    def weight(self) -> Any:
        """The dense weight ``(rows, length)`` of the site."""
        return self._as_site(self._values(lambda value: value))

    def _as_site(self, matrix: Any) -> Any:
        site, form = self._site, self._form
        if (site.rows, site.length) == (form.rows, form.length):
            return matrix
        return self._node("Reshape", matrix, self._shape(site.rows, site.length))

    def _values(self, select: Callable[[Any], Any]) -> Any:
        """``(codes - zeros) * scales`` of selected rows, ``(selected, length)``."""
        form = self._form
        steps = self._node("Sub", self._codes(select), self._zeros(select))
        scales = self._in_blocks(self._float(select(self._builder.tensor("scales"))), 1)
        padded = form.blocks * form.block
        values = self._node("Mul", steps, scales)
        matrix = self._node("Reshape", values, self._shape(-1, padded))
        matrix = self._cut(matrix, padded, form.length)
        return self._cast(matrix, self._site.dtype)

    def _float(self, scales: Any) -> Any:
        narrow = self._form.scale_type != np.float32
        return self._node("Cast", scales, to=_FLOAT) if narrow else scales

    def _in_blocks(self, value: Any, width: int) -> Any:
        return self._node("Reshape", value, self._shape(-1, self._form.blocks, width))

    def _codes(self, select: Callable[[Any], Any]) -> Any:
        """Integers as float32 ``(selected, blocks, block)``."""
        tensor, form = self._builder.tensor, self._form
        if form.halves:
            high = self._spread(select(tensor("high")), 16)
            low = self._spread(select(tensor("low")), 1)
            return self._in_blocks(self._node("Add", high, low), form.block)
        codes = select(tensor("codes"))
        if form.bits == 4:
            return self._in_blocks(self._spread(codes, 1), form.block)
        return self._node("Cast", codes, to=_FLOAT)

    def _zeros(self, select: Callable[[Any], Any]) -> Any:
        """Zero points as float32, ``(selected, blocks, 1)`` or one for all."""
        tensor, form = self._builder.tensor, self._form
        if not form.zero_points:
            middle = np.array(1 << (form.bits - 1), np.float32)
            return self._builder.constant(f"int.middle.{form.bits}", middle)
        if not form.halves and form.bits == 8:
            zeros = self._node("Cast", select(tensor("zeros")), to=_FLOAT)
            return self._in_blocks(zeros, 1)
        if form.halves:
            high = self._spread(select(tensor("high_zeros")), 16)
            low = self._spread(select(tensor("low_zeros")), 1)
            pairs = self._node("Add", high, low)
        else:
            pairs = self._spread(select(tensor("zeros")), 1)
        width = form.blocks + form.blocks % 2
        flat = self._node("Reshape", pairs, self._shape(-1, width))
        return self._in_blocks(self._cut(flat, width, form.blocks), 1)

    def _spread(self, packed: Any, factor: int) -> Any:
        """Bytes -> the two integers in them, times a factor, in a new last axis, as float32."""
        byte = np.arange(256)
        pairs = np.stack([byte & 15, byte >> 4], axis=1).astype(np.float32) * factor
        table = self._builder.constant(f"int.halves.{factor}", pairs)
        return self._node("Gather", table, self._node("Cast", packed, to=_INT32))

    def _cut(self, matrix: Any, width: int, length: int) -> Any:
        """The first columns of a matrix."""
        if width == length:
            return matrix
        if self._builder.opset < _SLICE_INPUTS:
            return self._node("Slice", matrix, axes=[1], starts=[0], ends=[length])
        bounds = [[0], [length], [1]]
        names = ("int.start", f"int.length.{length}", "int.axis")
        ends = [
            self._builder.constant(name, np.array(bound, np.int64))
            for name, bound in zip(names, bounds, strict=True)
        ]
        return self._node("Slice", matrix, *ends)

    def dequantized(self) -> Any:
        """The dense weight, decoded at every run from one byte for each integer."""
        form = self._form
        flat = (-1, form.block)
        codes = self._node("Cast", self._codes(lambda value: value), to=_UINT8)
        codes = self._node("Reshape", codes, self._shape(*flat))
        scales = self._float(self._builder.tensor("scales"))
        scales = self._node("Reshape", scales, self._shape(-1))
        zeros = self._flat_zeros()
        values = self._node("DequantizeLinear", codes, scales, zeros, axis=0)
        padded = form.blocks * form.block
        matrix = self._node("Reshape", values, self._shape(-1, padded))
        matrix = self._cut(matrix, padded, form.length)
        return self._as_site(self._cast(matrix, self._site.dtype))

    def _flat_zeros(self) -> Any:
        form = self._form
        if not form.zero_points:
            count = form.rows * form.blocks
            middle = np.full(count, 1 << (form.bits - 1), np.uint8)
            return self._builder.constant(f"int.middles.{form.bits}.{count}", middle)
        zeros = self._node("Cast", self._zeros(lambda value: value), to=_UINT8)
        return self._node("Reshape", zeros, self._shape(-1))
