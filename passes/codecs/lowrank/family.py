"""The codecs that store thin factors, in the order in which they are listed."""

from __future__ import annotations

from onnxcomp.passes.codecs.lowrank.codec import LowRankCodec
from onnxcomp.passes.codecs.lowrank.hyper_lowrank import HyperLowRankCodec
from onnxcomp.passes.codecs.lowrank.lowrank_hyper import LowRankHyperCodec
from onnxcomp.passes.codecs.lowrank.lowrank_int import LowRankIntCodec
from onnxcomp.passes.codecs.lowrank.shared_basis import SharedBasisCodec

__all__ = ["LOWRANK_CODECS"]

LOWRANK_CODECS = (
    LowRankCodec(),
    LowRankHyperCodec(),
    LowRankIntCodec(),
    HyperLowRankCodec(),
    SharedBasisCodec(),
)
