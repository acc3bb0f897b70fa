"""Put what was written in its place, or beside it where a gate rejected it."""

from __future__ import annotations

from pathlib import Path

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.last_logits import with_last_logits
from onnxcomp.passes.ir import files
from onnxcomp.passes.ir.model import Saved, load, save

__all__ = ["publish"]


def publish(
    written: Saved, output: Path, settings: Settings, *, accepted: bool, verify: bool
) -> Saved:
    """Move the files of a model to its place, or to ``*.rejected.onnx``; the model comes first.

    Args:
        written: What the gates saw.
        output: Its place.
        settings: Say whether only the last logits are wanted.
        accepted: Whether it goes there.
        verify: Whether what differs from `written` is run once more.
    """
    saved = with_last_logits(written, settings, verify=verify)
    if accepted:
        return Saved(files.publish(saved.files, output.parent), saved.bytes)
    rejected = files.rejected_path(output)
    if len(saved.files) == 1:
        saved.files[0].replace(rejected)
        return Saved((rejected,), saved.bytes)
    # The model refers to its data by name: it is written again under the new one.
    return Saved(save(load(saved.files[0]), rejected).files, saved.bytes)
