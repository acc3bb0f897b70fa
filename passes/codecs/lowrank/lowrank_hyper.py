"""Low-rank factors that are stored by the hyper codec, in 1 to 6 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.lowrank.factor_pair import FactorPairCodec, InnerCodec
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import Attribute

__all__ = ["LowRankHyperCodec", "LowRankHyperParams", "part_of"]

_BITS = (6, 5, 4, 3, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankHyperParams(Params):
    """Settings of low-rank factors in few bits.

    Attributes:
        rank: Columns of the first factor and rows of the second one; multiples of 32 need no
            padding.
        bits: Bits per weight of both factors, 1..6.
        state_bits: Bits of a state, as for `hyper`.
        group: Largest group of weights with one scale, as for `hyper`.
    """

    rank: int = 64
    bits: int = 4
    state_bits: int = 7
    group: int = 128


def part_of(payload: Payload, part: str) -> Payload:
    """One factor of a payload, as the hyper codec knows it.

    Raises:
        ValueError: Tensors and attributes contradict each other.
    """
    group, extent = payload.attributes.get(f"{part}_group"), payload.attributes[f"{part}_extent"]
    codes = payload.tensors[f"{part}.codes"]
    table = next((a for key, a in payload.shared.items() if key.startswith("hyper.table.")), None)
    if not isinstance(group, int) or isinstance(extent, (int, float, str)) or codes.ndim != 5:
        raise ValueError(f"codes {codes.shape}, group {group} and extent {extent} do not fit")
    if table is None or group not in hyper_format.GROUPS or len(extent) != 2:
        raise ValueError(f"there is no table, or no group of {group}")
    bits, states = codes.shape[2] * 32 // group, len(table).bit_length() - 1
    rows, length = (int(size) for size in extent)
    keys = hyper_format.shared_tensors(bits, states, group, rows, length)
    attributes: dict[str, Attribute] = {"group": group, "extent": (rows, length)}
    if "precision" in payload.attributes:
        attributes["precision"] = payload.attributes["precision"]
    return Payload(
        {key: payload.tensors[f"{part}.{key}"] for key in ("codes", "scales")},
        {key: payload.shared[key] for key in keys},
        attributes,
    )


class LowRankHyperCodec(FactorPairCodec):
    """``x W^T -> HyperMatMul(HyperMatMul(x, right), left)``."""

    name: ClassVar[str] = "lowrank+hyper"
    summary: ClassVar[str] = "two thin matrices in 1 to 6 bits per weight: rank times bits"
    params_type: ClassVar[type[Params]] = LowRankHyperParams
    inner: ClassVar[InnerCodec] = HyperCodec()

    def coding(self, params: Params) -> HyperParams:
        """Settings of both factors."""
        given = LowRankHyperParams.of(params)
        return HyperParams(given.bits, given.state_bits, given.group)

    def rank(self, params: Params) -> int:
        """Columns of the first factor and rows of the second one."""
        return LowRankHyperParams.of(params).rank

    def offers(self, rank: int) -> Sequence[LowRankHyperParams]:
        """Settings of a rank, from more to fewer bits."""
        return [LowRankHyperParams(rank, bits, 8 if bits == 6 else 7) for bits in _BITS]

    def part_of(self, payload: Payload, part: str) -> Payload:
        """One factor of a payload, as the hyper codec knows it."""
        return part_of(payload, part)
