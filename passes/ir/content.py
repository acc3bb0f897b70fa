"""A hash of all that a model says: its graph, and every element of its tensors."""

from __future__ import annotations

import hashlib
import io

import onnx
import onnx_ir as ir

from onnxcomp.passes.ir.serializer import model_proto, tensor_header, tensor_proto
from onnxcomp.runtime.activity import activity

__all__ = ["content_hash"]


class _Hashing(io.RawIOBase):
    """A file that keeps a hash of what is written to it and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return len(data)


def content_hash(model: ir.Model) -> str:
    """SHA-256 of a model, in hex: of its messages, with a hash in the place of each tensor's bytes.

    Tensors that lie in files are read in pieces. Where they lie does not matter.
    """

    def hashed(tensor: ir.TensorProtocol, name: str | None) -> onnx.TensorProto:
        """A tensor with a hash in the place of its bytes."""
        if isinstance(tensor, ir.StringTensor):
            return tensor_proto(tensor, name)
        activity("comparing with earlier runs", item=name or "")
        file = _Hashing()
        if hasattr(tensor, "tofile"):
            tensor.tofile(file)
        else:
            file.write(tensor.tobytes())
        proto = tensor_header(tensor, name)
        proto.raw_data = file.digest.digest()
        return proto

    message = model_proto(model, hashed).SerializeToString(deterministic=True)
    return hashlib.sha256(message).hexdigest()
