"""Memory that sessions of a model take, with the operator library and without."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from onnxcomp.errors import CompressionError, ModelError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import LoadMemory
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import own_name, read_manifest
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.tensors import is_float
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.lowering.stages import in_passes, is_staged, kind_of, loading_peak
from onnxcomp.passes.weight import DOMAIN, Kind

__all__ = ["expansions", "held_bytes", "load_bytes", "session_bytes", "tensor_bytes"]

# Memory of a process with a session of a small model.
_BASE = 80 << 20


def load_bytes(path: Path, model: ir.Model | None) -> int:
    """Memory at the peak of loading a model without the operator library.

    Args:
        path: Its file.
        model: What is in it; None where that cannot be read.
    """
    folding = 0 if model is None else _folding_bytes(model, library=False)
    return _BASE + path.stat().st_size + folding


def session_bytes(path: Path, model: ir.Model, *, library: bool) -> int:
    """Memory at the peak of a session of a model, without what its activations take.

    Args:
        path: Its file.
        model: What is in it.
        library: Whether the operator library is there, for a model that has a use for it.
    """
    tensors = [value.const_value for value in initializers(model).values()]
    stored = sum(tensor_bytes(tensor) for tensor in tensors if tensor is not None)
    return _BASE + path.stat().st_size + stored + _folding_bytes(model, library=library)


def held_bytes(forms: Iterable[tuple[Path, bool]]) -> int:
    """Memory at the peak of opening sessions one after the other, all of which stay open.

    Args:
        forms: Models, and whether they run with the operator library. One that cannot be read is
            not counted.
    """
    peak = held = 0
    for path, library in forms:
        try:
            model = load(path)
        except ModelError:
            continue
        opening = session_bytes(path, model, library=library)
        peak = max(peak, held + opening)
        folded = sum(need.kept for _, need in expansions(model, library=library))
        results = sum(need.result for _, need in expansions(model, library=library))
        held += opening if not folded else session_bytes(path, model, library=True) + results
    return peak


def tensor_bytes(tensor: ir.TensorProtocol) -> int:
    """Memory of an initializer in a session: floats of all widths are computed as float32."""
    return max(tensor.nbytes, 4 * tensor.size) if is_float(tensor.dtype) else tensor.nbytes


def expansions(model: ir.Model, *, library: bool) -> list[tuple[ir.Node, LoadMemory]]:
    """Nodes that a session expands to dense weights when it is made, with the memory of each.

    Nothing where the file does not say how its weights are stored.

    Args:
        model: A model, compressed or not.
        library: Whether operators with a kernel compute on codes.
    """
    values, found = initializers(model), []
    try:
        for name, record in read_manifest(model).items():
            codec = CODECS.get(record.recipe.codec)
            if codec is None or not record.recipe.params or not record.recipe.tensors:
                continue
            params = typed_params(codec.params_type, record.recipe.params, codec.name)
            codec.check(params)
            value = values.get(own_name(name, record.recipe.tensors[0]))
            readers = [node for node, _ in value.uses()] if value is not None else []
            own = not codec.stock
            inlined = [node for node in readers if own and _is_inlined(node)]
            for node in readers:
                kind: Kind | None = "weight" if node in inlined else kind_of(node.op_type)
                if kind is not None and not (library and kind != "weight"):
                    need = codec.load_memory(record.site, params, kind)
                    parts = len(inlined) if node in inlined else 1
                    divided = need.share(parts) if parts > 1 else in_passes(model, node, need)
                    found.append((node, divided))
    except CompressionError:  # a damaged record, or one of a newer version
        return []
    return found


def _is_inlined(node: ir.Node) -> bool:
    """Whether a definition that expands a weight, or one part of it, begins here.

    A Reshape keeps codes from being folded.
    """
    return node.domain != DOMAIN and node.op_type != "Reshape"


def _folding_bytes(model: ir.Model, *, library: bool) -> int:
    """Memory that expanding the weights takes.

    Intermediate results stay until ONNX Runtime has folded the last weight, or the last of a piece.
    """
    needs = [need for _, need in expansions(model, library=library)]
    return loading_peak(needs, staged=is_staged(model))
