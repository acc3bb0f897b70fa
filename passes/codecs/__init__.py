"""Codecs: ways to store one weight. `CODECS` has them by name."""

from __future__ import annotations

from onnxcomp.passes.codecs.constant import ConstantCodec
from onnxcomp.passes.codecs.dense import DenseCodec
from onnxcomp.passes.codecs.half import HalfCodec
from onnxcomp.passes.codecs.hash.codec import HashCodec
from onnxcomp.passes.codecs.hyper.codec import HyperCodec
from onnxcomp.passes.codecs.integer.codec import IntegerCodec
from onnxcomp.passes.codecs.integer.dynamic import DynamicCodec
from onnxcomp.passes.codecs.lowrank.family import LOWRANK_CODECS
from onnxcomp.passes.codecs.registry import CodecRegistry
from onnxcomp.passes.codecs.sparse.family import SPARSE_CODECS
from onnxcomp.passes.codecs.winding.codec import WindingCodec

__all__ = ["CODECS"]

CODECS = CodecRegistry(
    (
        DenseCodec(),
        HyperCodec(),
        IntegerCodec(),
        DynamicCodec(),
        HalfCodec(),
        *LOWRANK_CODECS,
        WindingCodec(),
        HashCodec(),
        *SPARSE_CODECS,
        ConstantCodec(),
    )
)
