"""Codes of the hyper codec with a low-rank repair: ``W = base + left right``, all in few bits.

The repair is the best product of a rank for the error of the base codes, weighed by the inputs:
its directions are the first eigenvectors of ``E G E^T`` (EoRA, Liu et al., arXiv 2410.21271).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.lowrank.codec import fitting_target
from onnxcomp.passes.codecs.lowrank.factor_pair import PartBuilder
from onnxcomp.passes.codecs.lowrank.lowrank_hyper import (
    LowRankHyperCodec,
    LowRankHyperParams,
    part_of,
)
from onnxcomp.passes.codecs.moments import damped
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    LoadMemory,
    Payload,
    TensorLayout,
)
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite

__all__ = ["HyperLowRankCodec", "HyperLowRankParams"]

V = TypeVar("V")

_HYPER, _REPAIR = HyperCodec(), LowRankHyperCodec()
_BASE = "base"


@dataclasses.dataclass(frozen=True, slots=True)
class HyperLowRankParams(Params):
    """Settings of codes with a low-rank repair.

    Attributes:
        bits: Bits per weight of the base codes, 1..6.
        rank: Rank of the repair; multiples of 32 need no padding.
        repair_bits: Bits per weight of its factors, 1..6.
        state_bits: Bits of a state, as for `hyper`.
        group: Largest group of weights with one scale, as for `hyper`.
    """

    bits: int = 2
    rank: int = 32
    repair_bits: int = 4
    state_bits: int = 7
    group: int = 128


def _base(params: Params) -> HyperParams:
    given = HyperLowRankParams.of(params)
    return HyperParams(given.bits, given.state_bits, given.group)


def _repair(params: Params) -> LowRankHyperParams:
    given = HyperLowRankParams.of(params)
    return LowRankHyperParams(given.rank, given.repair_bits, given.state_bits, given.group)


def _whole(site: WeightSite) -> WeightSite:
    """The weight with a product as its only use: rows of it are rows of the codes."""
    use = dataclasses.replace(site.uses[0], need="matmul") if site.uses else None
    return dataclasses.replace(site, uses=() if use is None else (use,))


def _factors_of(payload: Payload) -> Payload:
    """The repair, as the codec lowrank+hyper knows it."""
    own = {key: t for key, t in payload.tensors.items() if not key.startswith(f"{_BASE}.")}
    return Payload(own, payload.shared, payload.attributes)


class HyperLowRankCodec(Codec):
    """HyperMatMul, and two thin ones added to it."""

    name: ClassVar[str] = "hyper+lowrank"
    summary: ClassVar[str] = "codes of 1 to 6 bits and a low-rank repair of their error"
    params_type: ClassVar[type[Params]] = HyperLowRankParams
    composite: ClassVar[bool] = True

    @property
    def calibration(self) -> CalibratedEncoding:
        """For inputs with known moments, towards the outputs of the dense model."""
        return CalibratedEncoding(self.encode_calibrated, anchored=True)

    def refuse(self, site: WeightSite) -> str | None:
        """Why no setting of this codec suits the site; None when one does."""
        refusal = _REPAIR.refuse(site)
        if refusal is not None:
            return refusal.replace(_REPAIR.name, self.name)
        if not self._smaller(site):
            return f"{site.rows} x {site.length} is smaller than codes with a repair"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        _HYPER.check(_base(params))
        _REPAIR.check(_repair(params))

    def _smaller(self, site: WeightSite) -> list[HyperLowRankParams]:
        found = [
            HyperLowRankParams(bits, rank)
            for bits in (4, 3, 2, 1)
            for rank in (64, 32)
            if rank * 2 <= min(site.rows, site.length)
        ]
        return [params for params in found if self.size(site, params) < site.nbytes]

    def candidates(self, site: WeightSite) -> Sequence[HyperLowRankParams]:
        """Few bits with a repair of rank 32 or 64, from most to fewest bytes."""
        if self.refuse(site) is not None:
            return []
        return sorted(self._smaller(site), key=lambda params: -self.size(site, params))

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Codes and scales of the base and of both factors."""
        base = _HYPER.layout(_whole(site), _base(params))
        found = {f"{_BASE}.{key}": layout for key, layout in base.items()}
        return {**found, **_REPAIR.layout(site, _repair(params))}

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Tables and constants of all three."""
        base = _HYPER.shared(_whole(site), _base(params))
        return {**base, **_REPAIR.shared(site, _repair(params))}

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """Group and extent of all three."""
        base = _HYPER.attributes(_whole(site), _base(params))
        found = {f"{_BASE}_{key}": value for key, value in base.items()}
        return {**found, **_REPAIR.attributes(site, _repair(params))}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of all three."""
        base = _HYPER.size(_whole(site), _base(params))
        return base + _REPAIR.size(site, _repair(params))

    def predict(self, site: WeightSite, params: Params) -> float:
        """The error of the base times that of the repair: the error of codes is like noise."""
        base = _HYPER.predict(_whole(site), _base(params))
        return base * _REPAIR.predict(site, _repair(params))

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Code the weight, then the best factors of what is missing.

        Raises:
            UsageError: The rank is not below that of the weight.
            ModelError: Values too large for float16 scales.
        """
        weight = np.asarray(weight, np.float32)
        base = _HYPER.encode(_whole(site), weight, _base(params), threads=threads)
        error = weight - _HYPER.decode(_whole(site), base)
        repair = _REPAIR.encode(site, error, _repair(params), threads=threads)
        return self._joined(site, params, base, repair)

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """The same for inputs with the moments of `stats`."""
        weight = np.asarray(weight, np.float32)
        own = dataclasses.replace(stats.without_reference(), last=False)
        base = _HYPER.encode_calibrated(_whole(site), weight, _base(params), own, threads=threads)
        missing = fitting_target(weight, stats, damped(stats)) - _HYPER.decode(_whole(site), base)
        repair = _REPAIR.encode_calibrated(
            site, missing.astype(np.float32), _repair(params), own, threads=threads
        )
        return self._joined(site, params, base, repair)

    def _joined(self, site: WeightSite, params: Params, base: Payload, repair: Payload) -> Payload:
        tensors = {f"{_BASE}.{key}": tensor for key, tensor in base.tensors.items()}
        return Payload(
            {**tensors, **repair.tensors},
            self.shared(site, params),
            self.attributes(site, params),
        )

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The sum of both in float32."""
        base = _HYPER.decode(_whole(site), part_of(payload, _BASE))
        return np.asarray(base + _REPAIR.decode(site, _factors_of(payload)))

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products where the site has such uses; the dense weight always."""
        return _REPAIR.kinds(site)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """``x W^T -> Add(HyperMatMul(x, base), HyperMatMul(HyperMatMul(x, right), left))``."""
        part = part_of(payload, _BASE)
        own: Builder[V] = PartBuilder(builder, _BASE, part)
        base = _HYPER.emit(own, _whole(site), part, kind, x)
        repair = _REPAIR.emit(builder, site, _factors_of(payload), kind, x)
        return builder.node("Add", [base, repair])

    @property
    def pacing(self) -> str | None:
        """That of the codec hyper."""
        return _HYPER.pacing

    @property
    def calls(self) -> int:
        """One for the base, one for each factor of the repair."""
        return 1 + _REPAIR.calls

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the bodies of all three takes."""
        base = _HYPER.load_memory(_whole(site), _base(params), kind)
        repair = _REPAIR.load_memory(site, _repair(params), kind)
        working, result = max(base.working, repair.working), base.result + repair.result
        return LoadMemory(base.kept + repair.kept, working, result)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Those of the hyper codec."""
        return _HYPER.functions(opset)
