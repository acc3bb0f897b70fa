"""Put what was written in its place, or beside it where a gate rejected it."""

from __future__ import annotations

from pathlib import Path

from onnxcomp.passes.ir import files
from onnxcomp.passes.ir.model import Saved, load, save

__all__ = ["publish"]


def publish(saved: Saved, output: Path, *, accepted: bool) -> tuple[Path, ...]:
    """Move the files of a model to its place, or to ``*.rejected.onnx``; the model comes first."""
    if accepted:
        return files.publish(saved.files, output.parent)
    rejected = files.rejected_path(output)
    if len(saved.files) == 1:
        saved.files[0].replace(rejected)
        return (rejected,)
    # The model refers to its data by name: it is written again under the new one.
    return save(load(saved.files[0]), rejected).files
