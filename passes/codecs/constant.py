"""The constant codec: tensors that are no trained weights, smaller and bit for bit.

``table``  the distinct values and an index for each element, several indices to a byte where there
are few values: ``W -> Reshape(Gather(values, digits(codes)))``.
``range``  a sequence of equal steps: ``W -> Reshape(Cast(Range) * step + start)``.
``half``   float16 that holds every value: ``W -> Cast(W16)``.

All by standard operators, which a session folds to the dense tensor when it starts. Which of the
three, and of how many values, is found by `passes.analysis.constants`, which marks the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.weight import DTYPES, Array, Kind, WeightSite

__all__ = ["ConstantCodec", "ConstantParams", "digits"]

V = TypeVar("V")

_FORMS = ("table", "range", "half")
_LARGEST_TABLE = 1 << 16
_HALF = np.dtype(np.float16)

# Codes that are made at a time.
_PIECE = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True)
class ConstantParams(Params):
    """How a constant is kept.

    Attributes:
        form: "table", "range" or "half".
        values: Distinct values of a table, 2 to 65536; 0 for the others.
    """

    form: str = "half"
    values: int = 0


def digits(values: int) -> int:
    """Indices in one byte: as many digits of base `values` as fit; 1 from 17 values on."""
    base = max(2, values)
    return max(1, int(math.log(256) / math.log(base) + 1e-9))


class ConstantCodec(Codec):
    """Exact forms of tensors that analysis has marked as constants."""

    name: ClassVar[str] = "constant"
    summary: ClassVar[str] = "masks, grids and tables, exactly: values and indices; no library"
    params_type: ClassVar[type[Params]] = ConstantParams

    def refuse(self, site: WeightSite) -> str | None:
        """Only what is known to be a constant, and has a smaller exact form."""
        refusal = site.refusal(self.name)
        if refusal is None and site.constant is None:
            return "not recognised as a constant"
        if refusal is None and site.constant is not None and site.constant.form == "dense":
            return "no smaller form keeps every bit"
        return refusal

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        own = ConstantParams.of(params)
        if own.form not in _FORMS:
            raise UsageError(f"form {own.form!r} is unknown", hint=f"one of {', '.join(_FORMS)}")
        if own.form == "table" and not 1 <= own.values <= _LARGEST_TABLE:
            raise UsageError(f"a table of {own.values} values", hint="1 to 65536 values")

    def candidates(self, site: WeightSite) -> Sequence[ConstantParams]:
        """The form that was found for the tensor."""
        if self.refuse(site) or site.constant is None:
            return []
        return [ConstantParams(site.constant.form, site.constant.values)]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Table: ``values (n,)`` and ``codes``, uint8 or uint16; range: ``line (2,)``."""
        own = ConstantParams.of(params)
        if own.form == "range":
            return {"line": TensorLayout((2,), np.dtype(np.float32))}
        if own.form == "half":
            return {"half": TensorLayout((site.rows, site.length), _HALF)}
        each = digits(own.values)
        kind = np.dtype(np.uint8 if own.values <= 256 else np.uint16)
        return {
            "values": TensorLayout((own.values,), DTYPES[site.dtype]),
            "codes": TensorLayout((-(-site.size // each),), kind),
        }

    def predict(self, site: WeightSite, params: Params) -> float:
        """Zero."""
        return 0.0

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Store ``(rows, length)`` without changing a bit.

        Raises:
            ModelError: The form does not hold this tensor.
        """
        own = ConstantParams.of(params)
        stored = np.array(weight, DTYPES[site.dtype], order="C").reshape(-1)
        tensors: dict[str, Array]
        if own.form == "range":
            first = stored[:2].astype(np.float32)
            tensors = {"line": np.array([first[0], first[1] - first[0]], np.float32)}
        elif own.form == "half":
            tensors = {"half": stored.astype(_HALF).reshape(site.rows, site.length)}
        else:
            tensors = _table(stored, own.values)
        payload = Payload(tensors)
        if not np.array_equal(_bits(_restored(site, payload)), _bits(stored)):
            raise ModelError(f"the form {own.form} does not hold every value of {site.name!r}")
        return payload

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The tensor in float32, ``(rows, length)``."""
        restored = _restored(site, payload)
        return restored.astype(np.float32).reshape(site.rows, site.length)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> Reshape(Gather(values, digits(codes))), or the other forms."""
        if kind not in ("weight", "decode"):
            raise UsageError(f"the codec constant has no {kind}")
        dtype = _ELEMENT[site.dtype]
        if "half" in payload.tensors:
            return builder.node("Cast", [builder.tensor("half")], {"to": dtype})
        if "line" in payload.tensors:
            flat = _emit_range(builder, site, dtype)
        else:
            indices = _emit_digits(builder, site, len(payload.tensors["values"]))
            flat = builder.node("Gather", [builder.tensor("values"), indices], {"axis": 0})
        shape = np.array([site.rows, site.length], np.int64)
        target = builder.constant(f"shape.{site.rows}x{site.length}", shape)
        return builder.node("Reshape", [flat, target])

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """Indices in int32 and the dense tensor, and a copy where it is transposed."""
        return LoadMemory(site.nbytes * (2 if site.transposed else 1), 12 * site.size)


_ELEMENT = {
    "float32": int(onnx.TensorProto.FLOAT),
    "float16": int(onnx.TensorProto.FLOAT16),
    "bfloat16": int(onnx.TensorProto.BFLOAT16),
}


def _bits(array: Array) -> Array:
    """The bits of floats: zeros of both signs differ."""
    return np.ascontiguousarray(array).view(np.uint16 if array.itemsize == 2 else np.uint32)


def _table(stored: Array, values: int) -> dict[str, Array]:
    """Distinct values, sorted by their bits, and packed indices into them."""
    flat, each = _bits(stored), digits(values)
    pieces = [flat[start : start + _PIECE * each] for start in range(0, flat.size, _PIECE * each)]
    bits = np.empty(0, flat.dtype)
    for piece in pieces:
        bits = np.union1d(bits, piece)
    if len(bits) != values:
        raise ModelError(f"the tensor has {len(bits)} distinct values, {values} were planned")
    codes = np.empty(-(-flat.size // each), np.uint8 if values <= 256 else np.uint16)
    powers = _powers(values).astype(np.int64)
    for number, piece in enumerate(pieces):
        padded = np.zeros(-(-piece.size // each) * each, np.int64)
        padded[: piece.size] = np.searchsorted(bits, piece)
        packed = padded.reshape(-1, each) @ powers
        codes[number * _PIECE : number * _PIECE + packed.size] = packed
    return {"values": bits.view(stored.dtype), "codes": codes}


def _powers(values: int) -> Array:
    """Worth of each digit of a byte, the first one the least."""
    return np.power(max(2, values), np.arange(digits(values))).astype(np.int32)


def _restored(site: WeightSite, payload: Payload) -> Array:
    """The flat tensor in its own type."""
    dtype = DTYPES[site.dtype]
    tensors = payload.tensors
    if "half" in tensors:
        return tensors["half"].reshape(-1).astype(dtype)
    if "line" in tensors:
        start, step = tensors["line"].astype(np.float32)
        made: Array = np.arange(site.size, dtype=np.float32) * step + start
        return made.astype(dtype)
    values, codes = tensors["values"], tensors["codes"].astype(np.int32)
    base = max(2, len(values))
    indices = (codes[:, None] // _powers(len(values))) % base
    restored: Array = values[indices.reshape(-1)[: site.size]].astype(dtype)
    return restored


def _emit_range(builder: Builder[V], site: WeightSite, dtype: int) -> V:
    """``Cast(Range(0, n, 1)) * step + start``; operator set 11 has Range."""
    limits = [
        builder.constant(f"int64.{number}", np.array(number, np.int64))
        for number in (0, site.size, 1)
    ]
    steps = builder.node("Range", limits)
    floats = builder.node("Cast", [steps], {"to": _ELEMENT["float32"]})
    line = builder.tensor("line")
    start, step = (
        builder.node("Gather", [line, builder.constant(f"int64.[{i}]", np.array([i]))], {"axis": 0})
        for i in (0, 1)
    )
    made = builder.node("Add", [builder.node("Mul", [floats, step]), start])
    return made if dtype == _ELEMENT["float32"] else builder.node("Cast", [made], {"to": dtype})


def _emit_digits(builder: Builder[V], site: WeightSite, values: int) -> V:
    """Indices ``(size,)`` in int32, by arithmetic that operator set 7 has."""
    to = {"to": int(onnx.TensorProto.INT32)}
    codes = builder.node("Cast", [builder.tensor("codes")], to)
    each, base = digits(values), max(2, values)
    if each == 1:
        return codes
    column = builder.constant("shape.-1x1", np.array([-1, 1], np.int64))
    powers = builder.constant(f"powers.{base}", _powers(values))
    factor = builder.constant(f"int32.{base}", np.array(base, np.int32))
    higher = builder.node("Div", [builder.node("Reshape", [codes, column]), powers])
    left = builder.node("Mul", [builder.node("Div", [higher, factor]), factor])
    flat = builder.constant("shape.-1", np.array([-1], np.int64))
    found = builder.node("Reshape", [builder.node("Sub", [higher, left]), flat])
    if site.size % each == 0:
        return found
    if builder.opset < 10:
        return builder.node("Slice", [found], {"axes": [0], "starts": [0], "ends": [site.size]})
    ends = builder.constant(f"int64.[{site.size}]", np.array([site.size]))
    return builder.node("Slice", [found, builder.constant("int64.[0]", np.array([0])), ends])
