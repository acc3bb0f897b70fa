"""The format of archives: docs/format.md, "Archives".

    magic, 8 bytes
    size and CRC-32 of the header, uint32 each
    header: JSON, by LZMA (.xz)
    blocks: coding uint8, bytes before and after, CRC-32 of what follows, uint32 each; the bytes

Numbers of one width are one stream over all files, what lies between them another. All is little
endian.
"""

from __future__ import annotations

import json
import lzma
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from onnxcomp.errors import ModelError

__all__ = ["BLOCK", "MAGIC", "Extent", "damaged", "pack", "read_header", "unpack", "write_header"]

MAGIC = b"\x89ocarc\r\n"

# Bytes of a block before it is coded, at most.
BLOCK = 1 << 22

# Bytes of a header, at most.
_HEADER = 1 << 26

_STORED, _BYTES, _PLANES = 0, 1, 2
_WORD = struct.Struct("<II")
_FRAME = struct.Struct("<BIII")

_FILTERS = {
    _BYTES: [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": BLOCK}],
    # Planes of floats: what is in them is in the frequencies of single bytes.
    _PLANES: [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": BLOCK, "lc": 0, "pb": 0}],
}

# Of larger blocks pieces of so many bytes are tried first, and all is tried where they gain a
# hundredth: codes are as good as random, and LZMA takes half a second for a megabyte of them.
_PIECES, _PIECE, _WORTH = 8, 1 << 15, 0.99


class Extent(NamedTuple):
    """Bytes of a file that follow one another in a stream.

    Attributes:
        file: Number of the file.
        start: The first byte.
        size: How many.
    """

    file: int
    start: int
    size: int


def damaged(what: str) -> ModelError:
    """The error of an archive that is not as it was written."""
    return ModelError(f"the archive is damaged: {what}", hint="copy or download it again")


def write_header(file: IO[bytes], header: Mapping[str, Any]) -> None:
    """Write what stands in front of the blocks."""
    stored = lzma.compress(json.dumps(header, separators=(",", ":")).encode())
    file.write(MAGIC + _WORD.pack(len(stored), zlib.crc32(stored)) + stored)


def read_header(file: IO[bytes]) -> dict[str, Any]:
    """The header of an archive.

    Raises:
        ModelError: It is none, or is damaged.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise ModelError(
            "the file is not an archive of onnxcomp", hint="onnxcomp package archive makes one"
        )
    size, check = _WORD.unpack(_exactly(file, _WORD.size))
    if size > _HEADER:
        raise damaged(f"a header of {size} bytes")
    stored = _exactly(file, size)
    if zlib.crc32(stored) != check:
        raise damaged("its header has another checksum")
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        header = json.loads(decoder.decompress(stored, _HEADER))
    except (lzma.LZMAError, RecursionError, ValueError) as error:
        raise damaged(f"its header cannot be read ({error})") from error
    if not isinstance(header, dict) or header.get("format") != 1:
        found = header.get("format") if isinstance(header, dict) else header
        raise ModelError(
            f"the archive has format {found!r}, this release reads 1",
            hint="restore it with the release that wrote it, or a newer one",
        )
    return header


def pack(data: bytes, width: int) -> Iterator[bytes]:
    """A block as it is stored: its frame, then its bytes.

    Args:
        data: At most `BLOCK` bytes.
        width: Bytes of a number.
    """
    coding, stored = _smallest(data, width)
    yield _FRAME.pack(coding, len(data), len(stored), zlib.crc32(stored))
    yield stored


def unpack(file: IO[bytes], width: int, size: int) -> bytes:
    """The next block.

    Args:
        file: Where it is read from.
        width: Bytes of a number.
        size: Bytes that it has to hold.

    Raises:
        ModelError: It is damaged, or the archive ends before it.
    """
    coding, raw, length, check = _FRAME.unpack(_exactly(file, _FRAME.size))
    if raw != size or length > size or coding not in (_STORED, *_FILTERS):
        raise damaged(f"a block says {raw} bytes in {length} by coding {coding}, not {size}")
    stored = _exactly(file, length)
    if zlib.crc32(stored) != check:
        raise damaged("a block has another checksum")
    if coding == _STORED:
        data = stored
    else:
        try:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS[coding])
            data = decoder.decompress(stored, size)
        except lzma.LZMAError as error:
            raise damaged(str(error)) from error
    if len(data) != size:
        raise damaged(f"a block holds {len(data)} bytes, not {size}")
    return _joined(data, width) if coding == _PLANES else data


def _smallest(data: bytes, width: int) -> tuple[int, bytes]:
    codings = [_BYTES] if width == 1 else [_BYTES, _PLANES]
    if len(data) > _PIECES * _PIECE:
        step = len(data) // _PIECES // width * width
        tried = b"".join(data[n * step : n * step + _PIECE] for n in range(_PIECES))
        sizes = {coding: len(_coded(tried, coding, width)) for coding in codings}
        best = min(codings, key=lambda coding: sizes[coding])
        if sizes[best] > _WORTH * len(tried):
            return _STORED, data
        codings = [best]
    found = [(coding, _coded(data, coding, width)) for coding in codings]
    return min([(_STORED, data), *found], key=lambda item: len(item[1]))


def _coded(data: bytes, coding: int, width: int) -> bytes:
    if coding == _PLANES:
        data = _split(data, width)
    return lzma.compress(data, format=lzma.FORMAT_RAW, filters=_FILTERS[coding])


def _split(data: bytes, width: int) -> bytes:
    """The first bytes of all numbers, then the second ones; what is left over last."""
    whole = len(data) // width * width
    planes = np.frombuffer(data, np.uint8, whole).reshape(-1, width).T
    return planes.tobytes() + data[whole:]


def _joined(data: bytes, width: int) -> bytes:
    """Inverse of `_split`."""
    whole = len(data) // width * width
    planes = np.frombuffer(data, np.uint8, whole).reshape(width, -1).T
    return planes.tobytes() + data[whole:]


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise damaged("it ends too early")
    return data
