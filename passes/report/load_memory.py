"""Memory that a compressed model takes to load where the operator library is absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxcomp.errors import CompressionError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["load_bytes"]

# Memory of a process with a session of a small model.
_SESSION = 80 << 20


def load_bytes(path: Path, model: ir.Model | None) -> int:
    """Memory at the peak of loading a model without the operator library.

    Args:
        path: Its file.
        model: What is in it; None where that cannot be read.
    """
    folding = 0 if model is None else _folding_bytes(model)
    return _SESSION + path.stat().st_size + folding


def _folding_bytes(model: ir.Model) -> int:
    """Memory that expanding the weights takes; 0 where the file does not say how they are stored.

    Intermediate results stay until ONNX Runtime has folded the last weight, or the last of a piece.
    """
    from onnxcomp.passes.codecs import CODECS
    from onnxcomp.passes.config.methods import typed_params
    from onnxcomp.passes.ir.manifest import own_name, read_manifest
    from onnxcomp.passes.ir.traversal import initializers
    from onnxcomp.passes.lowering.row_parts import divided, largest_part
    from onnxcomp.passes.lowering.stages import is_staged, kind_of, loading_peak
    from onnxcomp.passes.weight import DOMAIN

    needs, values = [], initializers(model)
    try:
        manifest, staged = read_manifest(model), is_staged(model)
        sites = [record.site for record in manifest.values()]
        largest = largest_part(sites) if staged else None
        for name, record in manifest.items():
            codec = CODECS.get(record.recipe.codec)
            if codec is None or not record.recipe.params or not record.recipe.tensors:
                continue
            params = typed_params(codec.params_type, record.recipe.params, codec.name)
            codec.check(params)
            value = values.get(own_name(name, record.recipe.tensors[0]))
            readers = [node for node, _ in value.uses()] if value is not None else []
            kinds = [kind_of(node.op_type) for node in readers if node.domain == DOMAIN]
            if any(node.domain != DOMAIN for node in readers):
                kinds.append("weight")  # inlined, perhaps in parts
            for kind in kinds:
                if kind is not None:
                    need = codec.load_memory(record.site, params, kind)
                    needs += divided(need, record.site, codec, kind, largest)
    except CompressionError:  # a damaged record, or one of a newer version
        return 0
    return loading_peak(needs, staged=staged)
