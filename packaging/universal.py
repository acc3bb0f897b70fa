"""Join a wheel for Intel's and one for Apple's processors into a universal one.

A universal library is a header in big-endian order, and the libraries behind it, each at a multiple
of the largest page (mach-o/fat.h). Apple's `lipo` writes the same and runs on macOS only.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import zipfile
from pathlib import Path

__all__ = ["join_libraries", "join_wheels"]

_FAT_MAGIC, _MACH_MAGIC = 0xCAFEBABE, 0xFEEDFACF
_PAGE_BITS = 14  # 16 KiB, the page of Apple's processors
_LIBRARIES = (".dylib", ".so")


def join_libraries(*libraries: bytes) -> bytes:
    """One universal library of several for one processor each.

    Raises:
        ValueError: One is not a 64-bit library of macOS, or two are for one processor.
    """
    page = 1 << _PAGE_BITS
    header = struct.pack(">II", _FAT_MAGIC, len(libraries))
    body, kinds = b"", set()
    for library in libraries:
        magic, processor, variant = struct.unpack_from("<III", library)
        if magic != _MACH_MAGIC:
            raise ValueError(f"magic number {magic:#x} is not that of a 64-bit library of macOS")
        if processor in kinds:
            raise ValueError(f"two libraries are for the processor {processor:#x}")
        kinds.add(processor)
        body += bytes(-len(body) % page)
        place = page + len(body)
        header += struct.pack(">IIIII", processor, variant, place, len(library), _PAGE_BITS)
        body += library
    return header + bytes(page - len(header)) + body


def join_wheels(first: Path, second: Path, tag: str, outdir: Path) -> Path:
    """A wheel with the libraries of both; all other files have to be equal.

    Args:
        first: The wheel for one processor.
        second: The wheel for the other.
        tag: Platform tag of the result.
        outdir: Where to write it.

    Raises:
        ValueError: The wheels differ in more than their libraries.
    """
    outdir.mkdir(parents=True, exist_ok=True)
    name, version, *_ = first.name.split("-")
    target = outdir / f"{name}-{version}-py3-none-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    rows = []
    with (
        zipfile.ZipFile(first) as one,
        zipfile.ZipFile(second) as other,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        if one.namelist() != other.namelist():
            raise ValueError(f"{first.name} and {second.name} hold different files")
        for entry in one.infolist():
            if entry.is_dir() or entry.filename == f"{info}/RECORD":
                continue
            content, twin = one.read(entry), other.read(entry.filename)
            if entry.filename.endswith(_LIBRARIES):
                content = join_libraries(content, twin)
            elif entry.filename == f"{info}/WHEEL":
                lines = [line for line in content.decode().splitlines() if "Tag:" not in line]
                content = "\n".join([*filter(None, lines), f"Tag: py3-none-{tag}", ""]).encode()
            elif content != twin:
                raise ValueError(f"{first.name} and {second.name} differ in {entry.filename}")
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.append(f"{entry.filename},sha256={digest.decode()},{len(content)}")
            out.writestr(entry, content)
        out.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    return target
