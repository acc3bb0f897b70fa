"""Low-rank factors that are stored by the integer codec, in 4 or 8 bits: no library is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.codecs.integer.nodes import BlockLayout
from onnxcomp.passes.codecs.lowrank.factor_pair import FactorPairCodec, InnerCodec
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Payload

__all__ = ["LowRankIntCodec", "LowRankIntParams"]

_BLOCKS = (32, 128)

# What belongs to a factor besides its tensors.
_ATTRIBUTES = ("bits", "block", "extent")


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankIntParams(Params):
    """Settings of low-rank factors in integers.

    Attributes:
        rank: Columns of the first factor and rows of the second one; multiples of 32 need no
            padding.
        bits: Bits per weight of both factors, 4 or 8.
        block: Largest number of weights with one scale, as for `int`.
    """

    rank: int = 64
    bits: int = 4
    block: int = 32


class LowRankIntCodec(FactorPairCodec):
    """``x W^T -> MatMulNBits(MatMulNBits(x, right), left)``."""

    name: ClassVar[str] = "lowrank+int"
    summary: ClassVar[str] = "two thin matrices in 4 or 8 bits per weight; no library"
    params_type: ClassVar[type[Params]] = LowRankIntParams
    inner: ClassVar[InnerCodec] = IntegerCodec()

    def coding(self, params: Params) -> IntegerParams:
        """Settings of both factors."""
        given = LowRankIntParams.of(params)
        return IntegerParams(given.bits, given.block)

    def rank(self, params: Params) -> int:
        """Columns of the first factor and rows of the second one."""
        return LowRankIntParams.of(params).rank

    def offers(self, rank: int) -> Sequence[LowRankIntParams]:
        """Settings of a rank, from more to fewer bits."""
        return [LowRankIntParams(rank, bits, block) for bits in (8, 4) for block in _BLOCKS]

    def part_of(self, payload: Payload, part: str) -> Payload:
        """One factor of a payload, as the integer codec knows it.

        Raises:
            ValueError: Tensors and attributes contradict each other.
        """
        prefix = f"{part}."
        tensors = {
            key.removeprefix(prefix): tensor
            for key, tensor in payload.tensors.items()
            if key.startswith(prefix)
        }
        attributes = {key: payload.attributes[f"{part}_{key}"] for key in _ATTRIBUTES}
        if "precision" in payload.attributes:
            attributes["precision"] = payload.attributes["precision"]
        found = Payload(tensors, {}, attributes)
        shared = {key: payload.shared[key] for key in BlockLayout.of(found).shared()}
        return dataclasses.replace(found, shared=shared)
