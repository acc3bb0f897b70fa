"""Where the numbers of a model lie in its files, found without reading them.

Protobuf is a tree of fields with lengths, so tensors are found by jumping over all others. A file
that is not what it seems gives fewer places, never an error: they are hints for compression.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx

from onnxcomp.runtime.structure import nested_tensors, read_structure

__all__ = ["Place", "places"]

# Fields of onnx.proto that hold messages with tensors somewhere below them, by message.
_BELOW: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_TYPE, _FLOATS, _RAW = 2, 4, 9

# Wire types of protobuf.
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5

# Messages within one another above which a file is not followed.
_DEPTH = 64

_WIDE = {
    2: (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT16,
        onnx.TensorProto.UINT16),
    4: (onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.UINT32),
    8: (onnx.TensorProto.DOUBLE, onnx.TensorProto.INT64, onnx.TensorProto.UINT64),
}  # fmt: skip
_WIDTHS: dict[int, int] = {int(kind): width for width, kinds in _WIDE.items() for kind in kinds}


class Place(NamedTuple):
    """Some bytes of a file that are numbers of one width.

    Attributes:
        start: The first of them.
        stop: Behind the last.
        width: Bytes of a number.
    """

    start: int
    stop: int
    width: int


def places(model: Path) -> dict[str, list[Place]]:
    """Places of tensors by file: "" for the model itself, else external data as it names them.

    Raises:
        ModelError: The file is not an ONNX model.
    """
    found: dict[str, list[Place]] = {}
    for tensor in nested_tensors(read_structure(model)):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" in entries:
            start = int(entries.get("offset") or 0)
            size = int(entries.get("length") or 0)
            width = _WIDTHS.get(tensor.data_type, 1)
            found.setdefault(entries["location"], []).append(Place(start, start + size, width))
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found[""] = list(_inline(view))
    return {name: _apart(own) for name, own in found.items()}


def _apart(found: list[Place]) -> list[Place]:
    """Places in order, without those that overlap an earlier one: several tensors may share."""
    apart: list[Place] = []
    for place in sorted(found):
        if place.stop > place.start >= (apart[-1].stop if apart else 0):
            apart.append(place)
    return apart


def _inline(view: mmap.mmap) -> Iterator[Place]:
    pending = [("model", 0, len(view), 0)]
    while pending:
        message, start, stop, depth = pending.pop()
        if message == "tensor":
            yield from _tensor(view, start, stop)
        elif depth < _DEPTH:
            below = _BELOW[message]
            pending += [
                (below[number], first, last, depth + 1)
                for number, wire, first, last in _fields(view, start, stop)
                if wire == _BYTES and number in below
            ]


def _tensor(view: mmap.mmap, start: int, stop: int) -> Iterator[Place]:
    width, numbers = 1, None
    for number, wire, first, last in _fields(view, start, stop):
        if number == _TYPE and wire == _VARINT:
            width = _WIDTHS.get(_varint(view, first, last)[0], 1)
        elif number in (_RAW, _FLOATS) and wire == _BYTES:
            numbers = (first, last)
    if numbers is not None:
        yield Place(*numbers, width)


def _fields(view: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, first byte and the one behind the last, of each field of a message."""
    while start < stop:
        key, start = _varint(view, start, stop)
        wire = key & 7
        if wire == _VARINT:
            last = _varint(view, start, stop)[1]
        elif wire == _BYTES:
            size, start = _varint(view, start, stop)
            last = start + size
        elif wire in (_EIGHT, _FOUR):
            last = start + (8 if wire == _EIGHT else 4)
        else:
            return
        if last > stop:
            return
        yield key >> 3, wire, start, last
        start = last


def _varint(view: mmap.mmap, start: int, stop: int) -> tuple[int, int]:
    """A number of variable length, and the byte behind it."""
    value = shift = 0
    while start < stop and shift < 64:
        byte = view[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            break
    return value, start
