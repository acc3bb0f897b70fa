"""A model as one file that is as small as can be: to be stored and sent, not to be run.

Codes of hyperfunctions are as good as random and stay as they are. What entropy coding makes
smaller is the rest: scales, dense weights and the graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.package.archive_format import (
    BLOCK,
    Extent,
    damaged,
    pack,
    read_header,
    unpack,
    write_header,
)
from onnxcomp.runtime.package.contents import staged, unwritable
from onnxcomp.runtime.package.tensor_bytes import Place, places
from onnxcomp.runtime.structure import data_files

__all__ = ["Archive", "restore", "write_archive"]

PathLike = str | os.PathLike[str]

# A gain below this part of the bytes is said to be not worth an archive.
_WORTH = 0.03

_CHUNK = 1 << 20

# The stream of what lies between tensors has no width.
_BETWEEN = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Archive:
    """A model in an archive, or restored from one.

    Attributes:
        path: The archive, or the folder of the restored model.
        model: Name of the .onnx file.
        files: Bytes and SHA-256 of the model's files, by name.
        bytes: Of the archive.
        streams: Bytes before and after coding, by what they are: "graph", "1 byte".
        notes: What is worth knowing.
    """

    path: Path
    model: str
    files: Mapping[str, Mapping[str, Any]]
    bytes: int
    streams: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    @property
    def gain(self) -> float:
        """What the archive is smaller by, as a part of the model's bytes."""
        return 1.0 - self.bytes / self.model_bytes if self.model_bytes else 0.0

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp package archive`` and ``restore``."""
        values = {**dataclasses.asdict(self), "path": str(self.path), "notes": list(self.notes)}
        return {"kind": "archive", **values, "model_bytes": self.model_bytes, "gain": self.gain}


def write_archive(model: PathLike, output: PathLike, *, force: bool = False) -> Archive:
    """Write a model with its data as one file, which `restore` turns back bit for bit.

    Args:
        model: The .onnx file, compressed or not.
        output: The archive. It appears complete or not at all.
        force: Replace a file that is there already.

    Raises:
        UsageError: The output exists already or cannot be written.
        ModelError: The model or its data cannot be read.
    """
    path, target = Path(model), Path(os.path.abspath(output))
    names = [path.name, *data_files(path)]
    for name in names:
        _check_name(name)
    found = places(path)
    sources = [path, *(path.parent / name for name in names[1:])]
    part = _room(target, force=force, sources=sources)
    seen = _states(sources)
    try:
        files = {name: _file(own) for name, own in zip(names, sources, strict=True)}
        sizes = [entry["bytes"] for entry in files.values()]
        streams = _streams(sizes, [found.get(name, []) for name in ("", *names[1:])])
        with part.open("wb") as file:
            header = {"format": 1, "model": path.name, "files": files, "streams": streams}
            write_header(file, header)
            sizes_of = _write_streams(file, streams, sources)
            size = file.tell()
        if _states(sources) != seen:
            raise ModelError(f"{path} or its data changed while it was read", hint="try again")
        part.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        part.unlink(missing_ok=True)
    done = Archive(Path(output), path.name, files, size, sizes_of)
    return dataclasses.replace(done, notes=_notes(done))


def restore(archive: PathLike, output: PathLike) -> Archive:
    """Write the files of an archive as they were, into a new folder.

    Args:
        archive: What `write_archive` wrote.
        output: The folder. It appears complete or not at all.

    Raises:
        ModelError: The archive is none, is cut or damaged.
        UsageError: The folder exists already or cannot be written.
    """
    try:
        with Path(archive).open("rb") as file:
            header = read_header(file)
            try:
                return _restored(file, header, Path(output))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise damaged(f"its header lacks something ({error!r})") from error
    except OSError as error:
        raise ModelError(
            f"cannot read {archive}: {error.strerror or error}", hint="check the path"
        ) from error


def _restored(file: IO[bytes], header: Mapping[str, Any], output: Path) -> Archive:
    files = header["files"]
    streams = _checked(header["streams"], [entry["bytes"] for entry in files.values()])
    if header["model"] not in files:
        raise damaged("its model is not in it")
    for name in files:
        _check_name(name)
    with staged(Path(os.path.abspath(output)), force=False) as folder:
        paths = [folder / name for name in files]
        for path, entry in zip(paths, files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as made:
                made.truncate(entry["bytes"])
        for width, extents in streams:
            _read_stream(file, width, extents, paths)
        if file.read(1):
            raise damaged("it goes on behind its end")
        for path, (name, entry) in zip(paths, files.items(), strict=True):
            if _file(path) != entry:
                raise damaged(f"{name} would have another SHA-256")
    return Archive(output, str(header["model"]), files, file.tell())


def _check_name(name: str) -> None:
    """Refuse files that would be restored to somewhere else than the folder of the model."""
    outside = os.path.isabs(name) or os.path.splitdrive(name)[0] or "\0" in name
    if not name or outside or os.path.normpath(name).split(os.sep)[0] in ("..", "."):
        raise ModelError(
            f"a file {name!r} cannot be part of an archive",
            hint="save the model again: onnxcomp optimize MODEL -o OUT --method dense",
        )


def _room(target: Path, *, force: bool, sources: Sequence[Path]) -> Path:
    """The file to write, beside its place."""
    if not target.parent.is_dir():
        raise UsageError(
            f"the folder {str(target.parent)!r} does not exist", hint="create it first"
        )
    if target.is_dir() or any(target == Path(os.path.abspath(own)) for own in sources):
        raise UsageError(f"{target} cannot become an archive", hint="choose another name")
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", hint="--force replaces it")
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}")


def _states(sources: Sequence[Path]) -> list[tuple[int, int]]:
    """What changes with a file: its bytes, and when it was written."""
    try:
        states = [path.stat() for path in sources]
    except OSError as error:
        raise ModelError(
            f"cannot read the model: {error}", hint="keep its files together"
        ) from error
    return [(state.st_size, state.st_mtime_ns) for state in states]


def _file(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
                size += len(piece)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def _streams(sizes: Sequence[int], found: Sequence[Sequence[Place]]) -> list[dict[str, Any]]:
    """All bytes of all files, by width: places, and what lies between them."""
    streams: dict[int, list[Extent]] = {}
    for number, (size, own) in enumerate(zip(sizes, found, strict=True)):
        done = 0
        for start, stop, width in own:
            if stop > size:
                break
            if start > done:
                streams.setdefault(_BETWEEN, []).append(Extent(number, done, start - done))
            streams.setdefault(width, []).append(Extent(number, start, stop - start))
            done = stop
        if size > done:
            streams.setdefault(_BETWEEN, []).append(Extent(number, done, size - done))
    return [{"width": width, "extents": streams[width]} for width in sorted(streams)]


def _checked(streams: Any, sizes: Sequence[int]) -> list[tuple[int, list[Extent]]]:
    """The streams of a header, whose extents have to be all bytes of the files, once."""
    found: list[tuple[int, list[Extent]]] = []
    for stream in streams:
        width, extents = int(stream["width"]), [Extent(*map(int, e)) for e in stream["extents"]]
        if width not in (_BETWEEN, 1, 2, 4, 8):
            raise damaged(f"numbers of {width} bytes")
        found.append((width, extents))
    ends = [0] * len(sizes)
    for number, start, size in sorted(extent for _, extents in found for extent in extents):
        if not 0 <= number < len(sizes) or size < 1 or start != ends[number]:
            raise damaged(f"{size} bytes at {start} of file {number} are out of place")
        ends[number] += size
    if ends != list(sizes):
        raise damaged("not all bytes of its files are in it")
    return found


def _write_streams(
    file: IO[bytes], streams: Sequence[Mapping[str, Any]], sources: Sequence[Path]
) -> dict[str, dict[str, int]]:
    """Write the blocks of all streams; bytes before and after by stream."""
    sizes = {}
    for stream in streams:
        width, before = stream["width"], file.tell()
        for block in _blocks(stream["extents"], sources):
            file.writelines(pack(block, max(1, width)))
        name = f"{width} byte{'s' if width > 1 else ''}" if width else "graph"
        total = sum(extent.size for extent in stream["extents"])
        sizes[name] = {"bytes": total, "stored": file.tell() - before}
    return sizes


def _blocks(extents: Sequence[Extent], sources: Sequence[Path]) -> Iterator[bytes]:
    """A stream in blocks of full size, but for the last one."""
    held = bytearray()
    for number, start, size in extents:
        with sources[number].open("rb") as file:
            file.seek(start)
            while size:
                piece = file.read(min(size, BLOCK - len(held)))
                if not piece:
                    raise ModelError(f"{sources[number]} became shorter while it was read")
                held += piece
                size -= len(piece)
                if len(held) == BLOCK:
                    yield bytes(held)
                    held.clear()
    if held:
        yield bytes(held)


def _read_stream(
    file: IO[bytes], width: int, extents: Sequence[Extent], paths: Sequence[Path]
) -> None:
    """Read the blocks of a stream and put each byte in its place."""
    left = sum(extent.size for extent in extents)
    block = memoryview(b"")
    for number, start, size in extents:
        with paths[number].open("r+b") as made:
            made.seek(start)
            while size:
                if not block:
                    block = memoryview(unpack(file, max(1, width), min(left, BLOCK)))
                    left -= len(block)
                piece, block = block[:size], block[size:]
                made.write(piece)
                size -= len(piece)


def _notes(done: Archive) -> tuple[str, ...]:
    if done.gain >= _WORTH:
        return ()
    codes = done.streams.get("1 byte", {"bytes": 0})["bytes"] / max(1, done.model_bytes)
    gain = 100 * max(0.0, done.gain)
    return (
        f"the archive gains {gain:.1f} %: {100 * codes:.0f} % of the model are codes, which have "
        "no entropy to lose; the model itself is as good to store and to send",
    )
