"""Read an .onnx file without its tensors: the bytes stay in the file and are mapped on demand.

A protobuf parser would copy every weight into memory. `without_tensors` copies only the rest of
the message; each large tensor becomes an external one that points back into the file itself, as
``(location, offset, length)`` with the location `INLINE`. The encoding is described in the public
protobuf documentation ("Encoding"); field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["INLINE", "WireError", "varint", "without_tensors"]

# Location of a tensor that lies in the .onnx file itself. No file can have this name.
INLINE = "\0inline"

# Messages shorter than this are copied as they are, and tensors stay in them.
_LEAST = 1024

# The deepest nesting protobuf itself accepts.
_DEPTH = 100

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# TensorProto: field numbers, and the repeated fields whose packed form equals raw_data.
_DATA_TYPE, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 2, 9, 13, 14
_PACKED = {1: 4, 11: 10}  # FLOAT: float_data, DOUBLE: double_data

# AttributeProto fields that hold plain values: such an attribute has no tensor in it, and a tree
# ensemble has millions of them.
_PLAIN = {2, 3, 4, 7, 8, 9}

# Where tensors can be: message -> field number -> message of that field.
_FIELDS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}


class WireError(ValueError):
    """The bytes are not a protobuf message; the message says where."""


class _Field(NamedTuple):
    """One field on the wire: ``[start, end)`` with its tag, ``[begin, end)`` its content."""

    number: int
    wire_type: int
    start: int
    begin: int
    end: int


Buffer = bytes | mmap.mmap | memoryview


def varint(value: int) -> bytes:
    """The variable-length encoding of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 70:
        byte = buffer[position]
        result |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return result, position
        shift += 7
    raise WireError(f"broken integer at byte {position}")


def _content(buffer: Buffer, wire_type: int, position: int, end: int) -> tuple[int, int]:
    """Begin and end of a field's content."""
    if wire_type == _BYTES:
        length, position = _read_varint(buffer, position, end)
        return position, position + length
    if wire_type == _VARINT:
        return position, _read_varint(buffer, position, end)[1]
    if wire_type in (_FIXED32, _FIXED64):
        return position, position + (4 if wire_type == _FIXED32 else 8)
    raise WireError(f"unknown wire type {wire_type} at byte {position}")


def _fields(buffer: Buffer, position: int, end: int) -> Iterator[_Field]:
    while position < end:
        start = position
        tag, position = _read_varint(buffer, position, end)
        if tag < 8:  # a file of zeros would be read to its end, byte by byte
            raise WireError(f"a field has the number 0 at byte {start}")
        begin, stop = _content(buffer, tag & 7, position, end)
        if stop > end:
            raise WireError(
                f"a field of {stop - begin} bytes at byte {start} ends after byte {end}"
            )
        yield _Field(tag >> 3, tag & 7, start, begin, stop)
        position = stop


def _delimited(number: int, content: bytes) -> bytes:
    return varint(number << 3 | _BYTES) + varint(len(content)) + content


def _tensor(buffer: Buffer, begin: int, end: int) -> bytes | None:
    """The tensor with its bytes replaced by a reference; None when they must stay."""
    fields = list(_fields(buffer, begin, end))
    data_type = 0
    for field in fields:
        if field.number == _DATA_TYPE and field.wire_type == _VARINT:
            data_type = _read_varint(buffer, field.begin, field.end)[0]
    numbers = {_RAW_DATA, _PACKED.get(data_type, _RAW_DATA)}
    values = [field for field in fields if field.number in numbers]
    stored = len(values) == 1 and values[0].wire_type == _BYTES
    if not stored or any(field.number == _EXTERNAL_DATA for field in fields):
        return None
    place = values[0]
    if place.end - place.begin < _LEAST:
        return None
    entries = {"location": INLINE, "offset": place.begin, "length": place.end - place.begin}
    kept = (field for field in fields if field is not place and field.number != _DATA_LOCATION)
    out = [bytes(buffer[field.start : field.end]) for field in kept]
    for key, value in entries.items():
        pair = _delimited(1, key.encode()) + _delimited(2, str(value).encode())
        out.append(_delimited(_EXTERNAL_DATA, pair))
    out.append(varint(_DATA_LOCATION << 3 | _VARINT) + varint(1))
    return b"".join(out)


def _message(buffer: Buffer, begin: int, end: int, kind: str, depth: int) -> bytes | None:
    """The message without large tensors; None when nothing in it changes."""
    if kind == "tensor":
        return _tensor(buffer, begin, end)
    if depth > _DEPTH:
        raise WireError(f"messages are nested more than {_DEPTH} deep at byte {begin}")
    out: list[bytes] = []
    copied = begin
    for field in _fields(buffer, begin, end):
        if kind == "attribute" and field.number in _PLAIN:
            return None
        inner = _FIELDS[kind].get(field.number)
        if inner is None or field.wire_type != _BYTES or field.end - field.begin < _LEAST:
            continue
        content = _message(buffer, field.begin, field.end, inner, depth + 1)
        if content is not None:
            out += [bytes(buffer[copied : field.start]), _delimited(field.number, content)]
            copied = field.end
    if not out:
        return None
    return b"".join([*out, bytes(buffer[copied:end])])


def without_tensors(buffer: Buffer) -> bytes:
    """The serialised model with every tensor of 1 KiB or more made external to it.

    Args:
        buffer: The whole .onnx file, usually mapped into memory.

    Returns:
        A serialised ModelProto. Offsets count from the start of `buffer`.

    Raises:
        WireError: The buffer is cut short or is not a protobuf message.
    """
    stripped = _message(buffer, 0, len(buffer), "model", 0)
    return bytes(buffer[:]) if stripped is None else stripped
