"""Whether stored codes suit a class of machines."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import ManifestEntry, own_name, read_manifest
from onnxcomp.passes.ir.traversal import initializers

__all__ = ["better_params", "better_weights"]

# Operators of our own in which the kind of codes is no matter: what is decoded once when a session
# starts, and look-ups of a few rows.
_PATIENT = ("Weight", "Gather")


def better_params(
    record: ManifestEntry, values: Mapping[str, ir.Value], target: str
) -> Params | None:
    """Settings with which a weight would be faster on a class of machines; None where it is well.

    Args:
        record: The weight.
        values: Initializers of the compressed model by name.
        target: A value of the option `target`.

    Raises:
        UsageError: Its settings are not those of its codec.
    """
    recipe = record.recipe
    codec = CODECS.get(recipe.codec)
    own = [values.get(own_name(record.site.name, key)) for key in recipe.tensors]
    readers = {node.op_type for value in own if value is not None for node, _ in value.uses()}
    if codec is None or not recipe.params or all(name.endswith(_PATIENT) for name in readers):
        return None
    params = typed_params(codec.params_type, recipe.params, codec.name)
    found = codec.targeted(params, target)
    return None if codec.kind(found) == codec.kind(params) else found


def better_weights(model: ir.Model, target: str) -> tuple[list[str], int]:
    """Weights of a model that other codes would make faster on a class of machines, of how many.

    Raises:
        CompressionError: The record of what was done cannot be read.
    """
    records, values = read_manifest(model), initializers(model)
    found = [name for name, record in records.items() if better_params(record, values, target)]
    return found, len(records)
