"""A finished model stays on disk while gates look at it: they may be killed."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

from onnxcomp.errors import UsageError
from onnxcomp.passes.ir.atomic import uninterrupted
from onnxcomp.passes.ir.files import alone_in, marked_path

__all__ = ["kept_unverified"]

log = logging.getLogger(__name__)


@contextlib.contextmanager
def kept_unverified(files: tuple[Path, ...], output: Path) -> Iterator[Path]:
    """Let a model lie in ``OUT.unverified.onnx`` until the block is left; then it goes back.

    It stays there where the process is killed, and where the block fails for another reason than
    what the user gave or an interruption. Nothing that lies there already is replaced.

    Args:
        files: The model's files, the .onnx file first; at most one holds data.
        output: Where it goes when the gates have accepted it, on the same file system.

    Yields:
        The model for the gates. It is moved, not linked: readers refuse data with two names.
    """
    moved: list[tuple[Path, Path]] = []
    kept = False
    try:
        with uninterrupted(), alone_in(output.parent):
            model = _free_name(output)
            _move(files, model, moved)
        try:
            yield model
        except UsageError:
            raise
        except Exception:
            log.warning("the model is kept as %s: it was not verified", model)
            kept = True
            raise
    finally:
        if not kept:
            with uninterrupted():
                if moved and len(files) > 1:
                    model.unlink(missing_ok=True)
                for place, file in moved:
                    place.replace(file)


def _move(files: tuple[Path, ...], model: Path, moved: list[tuple[Path, Path]]) -> None:
    """Move the last file, and write a model that names it where that holds the data."""
    from onnxcomp.runtime.structure import nested_tensors, read_structure

    place = model if len(files) == 1 else _data_of(model)
    files[-1].replace(place)
    moved.append((place, files[-1]))
    if len(files) == 1:
        return
    proto = read_structure(files[0])
    for tensor in nested_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.name
    model.write_bytes(proto.SerializeToString())


def _free_name(output: Path) -> Path:
    """``small.onnx`` -> ``small.unverified.onnx``, with a number where that is taken."""
    marks = (f"unverified{'' if number == 1 else f'-{number}'}" for number in itertools.count(1))
    paths = (marked_path(output, mark) for mark in marks)
    return next(path for path in paths if not (path.exists() or _data_of(path).exists()))


def _data_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.data")
