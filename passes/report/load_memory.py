"""Memory that a compressed model takes to load where the operator library is absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.errors import CompressionError

if TYPE_CHECKING:
    from onnxcomp.passes.weight import Kind

__all__ = ["load_bytes"]

# Memory of a process with a session of a small model.
_SESSION = 80 << 20


def load_bytes(path: Path) -> int:
    """Memory at the peak of loading the model without the operator library."""
    return _SESSION + path.stat().st_size + _folding_bytes(path)


def _folding_bytes(path: Path) -> int:
    """Memory that expanding the weights takes; 0 where the file does not say how they are stored.

    Intermediate results stay until ONNX Runtime has folded the last weight, or the last of a piece.
    """
    from onnxcomp.passes.codecs import CODECS
    from onnxcomp.passes.config.methods import typed_params
    from onnxcomp.passes.ir.manifest import own_name, read_manifest
    from onnxcomp.passes.ir.model import load
    from onnxcomp.passes.ir.traversal import initializers
    from onnxcomp.passes.lowering.stages import is_staged, loading_peak

    needs = []
    try:
        model = load(path)
        values = initializers(model)
        for name, record in read_manifest(model).items():
            codec = CODECS.get(record.recipe.codec)
            if codec is None or not record.recipe.params or not record.recipe.tensors:
                continue
            params = typed_params(codec.params_type, record.recipe.params, codec.name)
            codec.check(params)
            value = values.get(own_name(name, record.recipe.tensors[0]))
            readers = [node.op_type for node, _ in value.uses()] if value is not None else []
            needs += [
                codec.load_memory(record.site, params, kind) for kind in map(_kind, readers) if kind
            ]
    except CompressionError:  # a damaged record, or one of a newer version
        return 0
    return loading_peak(needs, staged=is_staged(model))


def _kind(operator: str) -> Kind | None:
    """How a custom operator uses a weight."""
    endings: Mapping[str, Kind] = {"MatMul": "matmul", "Gather": "gather"}
    endings = {**endings, "Decode": "weight", "Weight": "weight"}
    return next((kind for end, kind in endings.items() if operator.endswith(end)), None)
