"""What `doctor` finds in a model's file before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.lowering.targets import better_weights
from onnxcomp.passes.report.form import ENGINES, form_of
from onnxcomp.runtime.doctor import Finding
from onnxcomp.runtime.machine import Machine, current_isa, target_of

__all__ = ["codes", "compressed_text", "form"]


def compressed_text(model: ir.Model) -> str:
    """What a model's weights are stored as, in a few words."""
    try:
        records = read_manifest(model)
    except CompressionError as error:
        return error.message
    codecs = sorted({record.recipe.codec for record in records.values()})
    return (
        f"{len(records)} compressed weights ({', '.join(codecs)})" if records else "not compressed"
    )


def form(model: ir.Model) -> Finding:
    """Which engines read the file."""
    try:
        found = form_of(model)
    except CompressionError as error:
        return Finding("form", "note", error.message, error.hint)
    text = f"{found.name}; read by {ENGINES[found.name]}"
    facts = {"form": found.name, "undone": len(found.undone)}
    return Finding("form", "note" if found.notes else "ok", text, "; ".join(found.notes), facts)


def codes(path: Path, model: ir.Model, machine: Machine) -> Iterator[Finding]:
    """Whether other codes would run faster here.

    Args:
        path: The file, for the hint.
        model: What is in it.
        machine: This machine.
    """
    target = target_of(current_isa(machine))
    if target is None:
        return
    try:
        better, total = better_weights(model, target)
    except CompressionError:
        return  # said of the model already
    facts = {"target": target, "weights": total, "better": better}
    if better:
        text = f"{len(better)} of {total} weights have codes that run slower here than others"
        hint = f"onnxcomp retarget {path} --target {target} --original DENSE.onnx -o NEW.onnx"
        yield Finding("codes", "note", text, hint, facts)
    elif total:
        yield Finding("codes", "ok", f"all suit this machine ({target})", facts=facts)
