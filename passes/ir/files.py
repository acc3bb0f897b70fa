"""Where a model comes from and where the result goes: facts of files, and a place to work in."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.atomic import uninterrupted
from onnxcomp.passes.ir.model import load, output_size

__all__ = [
    "Loaded",
    "alone_in",
    "file_hash",
    "marked_path",
    "publish",
    "read",
    "refuse_overwriting",
    "rejected_path",
    "workspace",
]

_CHUNK = 1 << 20

# Characters of an output's name in names made of it, which must stay valid.
_PREFIX = 40

# Bytes of a file name, of 255, that leave room for a mark and for the name of the data file.
_LONGEST = 230

# How often the removal of a workspace is tried, and seconds between tries.
_REMOVALS, _BETWEEN = 20, 0.05

# What ends the name of a workspace.
_TOKEN = re.compile("[0-9a-f]{8}")

# Errors that say that an output cannot be written where it was asked for.
_UNWRITABLE = (
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The model a plan was made for.

    Attributes:
        name: File name; empty for a model in memory.
        bytes: Bytes of the file and its external data.
        sha256: Hash of the .onnx file; None for a model in memory.
    """

    name: str
    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory with the facts of its origin.

    Attributes:
        model: The model; it belongs to the run, which may change it.
        path: Its file; None for a model that was given in memory.
        files: Real paths of the files its tensors are read from.
        source: Name, bytes and hash.
    """

    model: ir.Model
    path: Path | None
    files: frozenset[str]
    source: Source


def file_hash(path: Path) -> str:
    """SHA-256 of a file, read in pieces, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def read(source: Any) -> Loaded:
    """Load a model from anything `graph.load` accepts; what was given is not changed.

    Raises:
        ModelError: It is not a model that can be compiled.
        UsageError: It is not a model at all.
    """
    model = load(source)
    if not model.graph.outputs:
        raise ModelError("the graph has no outputs", hint="export the model again")
    files: frozenset[str] = frozenset(model.graph.meta.get(metadata.SOURCE, ()))
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        size = sum(os.path.getsize(file) for file in files)
        return Loaded(model, path, files, Source(path.name, size, file_hash(path)))
    return Loaded(model, None, files, Source("", output_size(model), None))


def refuse_overwriting(files: frozenset[str], output: Path) -> None:
    """Refuse an output whose files are among those of the input, by whatever name.

    Raises:
        UsageError: They are, or the folder of the output does not exist.
    """
    if not output.parent.is_dir():
        raise UsageError(
            f"the folder {str(output.parent)!r} does not exist", hint="create it first"
        )
    if output.is_dir():
        raise UsageError(f"the output {str(output)!r} is a folder", hint="name a file in it")
    for path in (output, output.with_name(f"{output.name}.data")):
        if os.path.realpath(path) in files:
            raise UsageError(
                f"the output {str(path)!r} is the input", hint="choose another name with -o"
            )
        _refuse_special(path)


def _refuse_special(path: Path) -> None:
    """Refuse what a finished file would replace, or write through: pipes, devices and links.

    Raises:
        UsageError: It is one of these.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing is there yet
    if stat.S_ISLNK(mode):
        raise UsageError(
            f"the output {str(path)!r} is a link to {os.readlink(path)!r}",
            hint="name the file itself: a model is written beside its place and then moved there",
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(
            f"the output {str(path)!r} is no regular file but a pipe, a socket or a device",
            hint="name a file: a model is written beside its place and then moved there",
        )


def _unwritable(output: Path, error: OSError) -> UsageError:
    return UsageError(
        f"cannot write {output}: {error.strerror}",
        hint="choose a writable folder with enough free space",
    )


@contextlib.contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder beside the output, on the same file system, gone when the block is left.

    Folders that killed runs with the same output have left behind are removed.
    """
    folder = output.with_name(f".{output.name[:_PREFIX]}.{secrets.token_hex(4)}")
    with contextlib.ExitStack() as stack:
        yield from _held(folder, output, stack)


def _held(folder: Path, output: Path, stack: contextlib.ExitStack) -> Iterator[Path]:
    try:
        try:
            with alone_in(output.parent):
                _remove_abandoned(output)
                folder.mkdir(mode=0o700)
                _lock(folder, stack)
        except OSError as error:
            raise _unwritable(output, error) from error
        yield folder
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise _unwritable(output, error) from error
    finally:
        with uninterrupted():
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, in which processes that end just now may still write."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_BETWEEN)


def _lock(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a folder until the stack is left, or this process ends in whatever way."""
    try:
        import fcntl
    except ImportError:
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(output: Path) -> None:
    """Remove workspaces for this output that nobody holds: their runs were killed."""
    start = f".{output.name[:_PREFIX]}."
    for folder in output.parent.glob(f"{glob.escape(start)}*"):
        if not _TOKEN.fullmatch(folder.name[len(start) :]) or not folder.is_dir():
            continue
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            if not folder.is_symlink() and _lock(folder, stack):
                shutil.rmtree(folder, ignore_errors=True)


def publish(files: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    """Move finished files to their place, the .onnx file last, and return their new paths.

    The model file refers to its data and not the other way round: whoever finds it finds all of it.
    Neither a signal nor another run with the same output comes between the two. The data file of a
    model that is replaced goes with it, unless it is replaced as well.
    """
    model = folder / files[0].name
    with uninterrupted(), alone_in(folder):
        stale = _own_data(model) if len(files) == 1 else None
        for file in reversed(files):
            file.replace(folder / file.name)
        if stale is not None:
            with contextlib.suppress(OSError):
                stale.unlink()
    return tuple(folder / file.name for file in files)


def _own_data(model: Path) -> Path | None:
    """The file ``<model>.data`` of an earlier output that refers to it; else None."""
    from onnxcomp.runtime.structure import data_files

    data = model.with_name(f"{model.name}.data")
    if model.is_symlink() or data.is_symlink() or not (model.is_file() and data.is_file()):
        return None
    try:
        return data if data.name in data_files(model) else None
    except ModelError:  # not a model, so the data are not known to be its own
        return None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs from publishing into a folder; without effect where folders have no locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def rejected_path(output: Path) -> Path:
    """Where a model that failed verification is kept: ``small.onnx`` -> ``small.rejected.onnx``."""
    return marked_path(output, "rejected")


def marked_path(output: Path, mark: str) -> Path:
    """A path beside an output with a mark before its suffix; long names are shortened for it."""
    stem = output.stem if len(os.fsencode(output.name)) <= _LONGEST else output.stem[:_PREFIX]
    return output.with_name(f"{stem}.{mark}{output.suffix or '.onnx'}")
