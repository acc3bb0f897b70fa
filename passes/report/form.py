"""In which form a file carries compressed weights, and which engines read that form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from onnxcomp.passes.ir.manifest import own_name, read_manifest
from onnxcomp.passes.ir.traversal import initializers, scopes
from onnxcomp.passes.weight import DOMAIN

__all__ = ["ENGINES", "INLINED", "Form", "form_of"]

Name = Literal["plain", "functions", "library", "inlined"]

# Engines that run each form, as benchmarks/bench_engines.py measures it.
ENGINES: Mapping[Name, str] = {
    "functions": (
        "ONNX Runtime in every language, the browser included, and the reference evaluator of "
        "onnx; not by OpenVINO, tract or MNN: `onnxcomp expand --keep-codes` makes them a file"
    ),
    "library": "ONNX Runtime with the operator library, and nothing else",
    "inlined": "ONNX Runtime, OpenVINO, tract, MNN and whatever else runs ONNX",
    "plain": "whatever runs ONNX",
}

INLINED = (
    "the definitions are inlined: the operator library does not know them and cannot speed this "
    "file up"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """How compressed weights are in a file.

    Attributes:
        name: "functions" (calls with definitions), "library" (calls without), "inlined", or
            "plain": operators that no definition is needed for.
        undone: Weights that the record lists as compressed and that are dense again.
    """

    name: Name
    undone: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user must know about it."""
        found = [INLINED] if self.name == "inlined" else []
        if self.undone:
            found.append(
                f"{len(self.undone)} weights are no longer stored as onnxcomp wrote them: another "
                f"tool folded them to dense ones (onnxslim, onnxsim, a saved optimised model); use "
                f"the file that onnxcomp wrote"
            )
        return tuple(found)


def form_of(model: ir.Model) -> Form:
    """The form of a model.

    Raises:
        ModelError: Its record of compressed weights is damaged.
    """
    manifest, values = read_manifest(model), set(initializers(model))
    undone = tuple(
        name
        for name, entry in manifest.items()
        if any(own_name(name, key) not in values for key in entry.recipe.tensors)
    )
    from onnxcomp.passes.lowering.stages import is_staged

    calls = {
        node.op_identifier()
        for scope in scopes(model)
        for node in scope.graph
        if node.domain == DOMAIN
    }
    if calls:
        return Form("functions" if calls <= set(model.functions) else "library", undone)
    if is_staged(model):  # all that was called expands whole weights, and stands inlined
        return Form("functions", undone)
    kept = [entry.recipe for name, entry in manifest.items() if name not in undone]
    inlined = any(not _stock(recipe.codec) for recipe in kept)
    return Form("inlined" if inlined else "plain", undone)


def _stock(codec: str) -> bool:
    from onnxcomp.passes.codecs import CODECS

    return codec in CODECS and CODECS[codec].stock
