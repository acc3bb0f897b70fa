"""A large model with zeros for weights: sizes of values do not depend on what weights hold.

All weights lie in one file with a hole, at the same place, so that a session maps the largest of
them and nothing else.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from onnxcomp.passes.ir.model import save
from onnxcomp.passes.ir.serializer import model_proto, tensor_header, tensor_proto
from onnxcomp.passes.ir.tensors import is_float

__all__ = ["save_for_sizes"]

# Bytes of a model's weights below which it is run as it is.
_LEAST = 256 << 20

# Weights of fewer bytes are kept.
_SMALL = 1 << 16

# Operators whose results have sizes that depend on values, or that decide by them what is run.
_BY_VALUE = frozenset(
    ("NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan", "SequenceMap")
)


def save_for_sizes(model: ir.Model, folder: Path) -> Path:
    """Write a model whose values have the sizes of another one's.

    Args:
        model: The model; only read.
        folder: Where the files go; they may go as soon as sessions have read them.

    Returns:
        The .onnx file.
    """
    tensors = [value.const_value for value in model.graph.initializers.values()]
    large = [t for t in tensors if t is not None and is_float(t.dtype) and t.nbytes >= _SMALL]
    by_value = any(node.op_type in _BY_VALUE for node in model.graph.all_nodes())
    path = folder / "sizes.onnx"
    if sum(tensor.nbytes for tensor in large) < _LEAST or by_value:
        return save(model, path).files[0]
    zeros = folder / "zeros.data"
    with zeros.open("wb") as file:
        file.truncate(max(tensor.nbytes for tensor in large))

    def hollow(tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
        if not is_float(tensor.dtype) or tensor.nbytes < _SMALL:
            return tensor_proto(tensor, name)
        proto = tensor_header(tensor, name)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": zeros.name, "offset": 0, "length": tensor.nbytes}.items():
            proto.external_data.add(key=key, value=str(value))
        return proto

    path.write_bytes(model_proto(model, hollow).SerializeToString())
    return path
