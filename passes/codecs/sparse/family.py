"""The codecs of weights with zeros, in the order in which they are listed."""

from __future__ import annotations

from onnxcomp.passes.codecs.sparse.codec import SparseCodec
from onnxcomp.passes.codecs.sparse.hyper_codec import SparseHyperCodec
from onnxcomp.passes.codecs.sparse.int_codec import SparseIntCodec

__all__ = ["SPARSE_CODECS"]

SPARSE_CODECS = (SparseCodec(), SparseIntCodec(), SparseHyperCodec())
