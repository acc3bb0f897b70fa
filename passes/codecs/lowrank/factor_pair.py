"""Low-rank factors that are stored by another codec: rank times bits.

The weight becomes ``left right``, both encoded. The second factor is fitted to what the first one
gives after coding, so that only what lies outside its rows is lost twice.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.lowrank import factors as lowrank_factors
from onnxcomp.passes.codecs.lowrank.codec import fitting_target
from onnxcomp.passes.codecs.lowrank.ranks import GOALS, rank_for
from onnxcomp.passes.codecs.moments import damped
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    LoadMemory,
    Payload,
    RankGoals,
    TensorLayout,
)
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, Use, WeightSite

__all__ = ["FactorPairCodec", "PartBuilder"]

V = TypeVar("V")

_PARTS = ("right", "left")

# Ranks offered: multiples of the smallest group of weights with one scale.
STEP = 32
_OFFERS = 8

# Share of the mean diagonal that is added to the moments of what the first factor gives.
_RIDGE = 1e-9


def _factor_site(site: WeightSite, part: str, rank: int) -> WeightSite:
    """One factor as a weight of its own: ``right (rank, length)`` or ``left (rows, rank)``."""
    rows, length = (rank, site.length) if part == "right" else (site.rows, rank)
    use = Use("", "MatMul", 1, "matmul")
    return WeightSite(
        f"{site.name}.{part}", (rows, length), site.dtype, (use,), "", rows, length, False
    )


@dataclasses.dataclass(frozen=True, slots=True)
class PartBuilder(Generic[V]):
    """The builder of one part of a payload, whose own tensors have the part's name in front.

    Attributes:
        whole: The builder of the whole payload.
        part: Name of the part.
        payload: The part.
    """

    whole: Builder[V]
    part: str
    payload: Payload

    @property
    def opset(self) -> int:
        """As of the whole."""
        return self.whole.opset

    def tensor(self, key: str) -> V:
        """One of the part's own, or a shared tensor."""
        own = key in self.payload.tensors
        return self.whole.tensor(f"{self.part}.{key}" if own else key)

    def constant(self, key: str, array: Array) -> V:
        """As of the whole."""
        return self.whole.constant(key, array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[V],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> V:
        """As of the whole."""
        return self.whole.node(op_type, inputs, attributes, domain=domain)

    def outputs(self, op_type: str, inputs: Sequence[V], count: int) -> Sequence[V]:
        """As of the whole."""
        return self.whole.outputs(op_type, inputs, count)


def _rank_of(payload: Payload) -> int:
    extent = payload.attributes["right_extent"]
    if isinstance(extent, (int, float, str)):
        raise ValueError(f"extent {extent} is not a pair")
    return int(extent[0])


class InnerCodec(Codec, Protocol):
    """What stores the factors: a codec that can encode them for their inputs."""

    @abc.abstractmethod
    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """`encode` for inputs with the second moments of `stats`."""


class FactorPairCodec(Codec):
    """Two products with the operators of an inner codec, and the tensors of both factors.

    Attributes:
        inner: How a factor is stored.
    """

    composite: ClassVar[bool] = True
    inner: ClassVar[InnerCodec]

    @property
    def calibration(self) -> CalibratedEncoding:
        """For inputs with known moments, towards the outputs of the dense model."""
        return CalibratedEncoding(self.encode_calibrated, anchored=True)

    @property
    def ranks(self) -> RankGoals:
        """The goals of all low-rank codecs."""
        return RankGoals(GOALS, self.energies, self.rank_for)

    @abc.abstractmethod
    def coding(self, params: Params) -> Params:
        """Settings of both factors."""

    @abc.abstractmethod
    def rank(self, params: Params) -> int:
        """Columns of the first factor and rows of the second one."""

    @abc.abstractmethod
    def offers(self, rank: int) -> Sequence[Params]:
        """Settings of a rank, from more to fewer bits."""

    @abc.abstractmethod
    def part_of(self, payload: Payload, part: str) -> Payload:
        """One factor of a payload, as the inner codec knows it.

        Raises:
            ValueError: Tensors and attributes contradict each other.
        """

    def refuse(self, site: WeightSite) -> str | None:
        """Why no setting of this codec suits the site; None when one does."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        if min(site.rows, site.length) <= STEP:
            return f"{site.rows} x {site.length} has no rank of {STEP} below its own"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        rank = self.rank(params)
        if rank < 1:
            raise UsageError(f"{self.name}: rank={rank}", hint="ranks are 1 or more")
        self.inner.check(self.coding(params))

    def candidates(self, site: WeightSite) -> Sequence[Params]:
        """Ranks below that of the weight by bits, smaller than the dense tensor."""
        if self.refuse(site) is not None:
            return []
        ranks = range(STEP, min(site.rows, site.length), STEP)
        ranks = ranks[:: -(-len(ranks) // _OFFERS)]
        found = [params for rank in ranks for params in self.offers(rank)]
        smaller = [params for params in found if self.size(site, params) < site.nbytes]
        return sorted(smaller, key=lambda params: -self.size(site, params))

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Codes and scales of both factors."""
        return {
            f"{part}.{key}": layout
            for part, factor in self._sites(site, params)
            for key, layout in self.inner.layout(factor, self.coding(params)).items()
        }

    def _sites(self, site: WeightSite, params: Params) -> list[tuple[str, WeightSite]]:
        return [(part, _factor_site(site, part, self.rank(params))) for part in _PARTS]

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Tables and constants of both factors."""
        found: dict[str, Array] = {}
        for _, factor in self._sites(site, params):
            found.update(self.inner.shared(factor, self.coding(params)))
        return found

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """Group and extent of both factors."""
        return {
            f"{part}_{key}": value
            for part, factor in self._sites(site, params)
            for key, value in self.inner.attributes(factor, self.coding(params)).items()
        }

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of both factors."""
        return sum(
            self.inner.size(factor, self.coding(params)) for _, factor in self._sites(site, params)
        )

    def predict(self, site: WeightSite, params: Params) -> float:
        """Expected relative error for weights without structure."""
        rank = min(self.rank(params), site.rows, site.length)
        cut = lowrank_factors.expected_error(site.rows, site.length, rank)
        evenness = lowrank_factors.expected_evenness(site.rows, site.length, rank)
        return self._error(site, params, cut, evenness)

    def measure(
        self, site: WeightSite, weight: Array, params: Sequence[Params], stats: Stats | None = None
    ) -> list[float]:
        """Relative errors of the weight at several settings; with inputs the same numbers.

        Calibration lowers the noise of codes as well as what is cut off. What `hyper` expects does
        not count that in, and the two are compared: with what is cut off of the products instead, a
        plan for a small language model took factors for 24 of 42 weights and was worse.
        """
        del stats
        energies = lowrank_factors.spectrum(weight)
        found = []
        for item in params:
            rank = self.rank(item)
            kept = np.sqrt(energies[:rank])
            power = float(np.sum(kept**2))
            evenness = float(np.sum(kept)) ** 2 / (len(kept) * power) if power > 0.0 else 1.0
            cut = lowrank_factors.truncation_error(energies, rank)
            found.append(self._error(site, item, cut, evenness))
        return found

    def _error(self, site: WeightSite, params: Params, cut: float, evenness: float) -> float:
        """What is cut off, and the noise of both factors on what is kept.

        Noise of `right` within the span of its rows is made up for by `left`. A row of `left` has
        noise as large for small singular values as for large ones: that counts by how even they
        are, ``(sum s)^2 / (r sum s^2)``. A full rank cannot be stored.
        """
        if self.rank(params) >= min(site.rows, site.length):
            return math.inf
        (_, right), (_, left) = self._sites(site, params)
        coding = self.coding(params)
        noise = self.inner.predict(right, coding) ** 2 * (1.0 - min(1.0, right.rows / right.length))
        noise += self.inner.predict(left, coding) ** 2 * evenness
        return math.sqrt(cut**2 + (1.0 - cut**2) * noise)

    def energies(self, weight: Array, stats: Stats | None = None) -> Array:
        """Squared singular values of ``(rows, length)``, or of its products, largest first."""
        return lowrank_factors.spectrum(weight, None if stats is None else stats.gram)

    def rank_for(self, site: WeightSite, goal: str, value: object, energies: Array) -> int:
        """The multiple of `STEP` that reaches a goal; see `GOALS`."""
        return rank_for(site, goal, value, energies, STEP)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Code `right`, fit `left` to it, and code that.

        Raises:
            UsageError: The rank is not below that of the weight.
            ModelError: Values too large for float16 scales.
        """

        def code(factor: WeightSite, matrix: Array, gram: Array | None) -> Payload:
            del gram
            return self.inner.encode(factor, matrix, self.coding(params), threads=threads)

        return self._encoded(site, weight, params, None, code)

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """The same for inputs with the moments of `stats`; each factor for what it is given."""
        moments = damped(stats)

        def code(factor: WeightSite, matrix: Array, gram: Array | None) -> Payload:
            assert gram is not None
            own = Stats(factor, stats.tokens, gram, np.zeros(len(gram)))
            return self.inner.encode_calibrated(
                factor, matrix, self.coding(params), own, threads=threads
            )

        return self._encoded(site, fitting_target(weight, stats, moments), params, moments, code)

    def _encoded(
        self,
        site: WeightSite,
        target: Array,
        params: Params,
        moments: Array | None,
        code: Callable[[WeightSite, Array, Array | None], Payload],
    ) -> Payload:
        """Code `right`, fit `left` to what it gives by least squares, and code that.

        Args:
            site: The weight.
            target: What to approximate, ``(rows, length)``.
            params: Settings.
            moments: Second moments of the inputs; None for ``1``.
            code: Codes a factor for inputs with some moments.
        """
        rank = self.rank(params)
        if rank >= min(site.rows, site.length):
            raise UsageError(
                f"{self.name}: rank={rank} for {site.name!r}, {site.rows} x {site.length}",
                hint=f"the codec {self.inner.name} stores a weight of full rank",
            )
        factors = lowrank_factors.factorize(target, rank, moments)
        (_, first), (_, second) = self._sites(site, params)
        right = code(first, factors.right.astype(np.float32), moments)
        decoded = self.inner.decode(first, right).astype(np.float64)
        weighted = decoded if moments is None else decoded @ moments
        inner = weighted @ decoded.T
        inner += np.eye(len(inner)) * max(_RIDGE * float(np.trace(inner)) / len(inner), 1e-30)
        fitted = np.linalg.solve(inner, weighted @ target.T.astype(np.float64)).T
        left = code(second, np.ascontiguousarray(fitted, np.float32), inner)
        tensors = {f"right.{key}": tensor for key, tensor in right.tensors.items()}
        tensors |= {f"left.{key}": tensor for key, tensor in left.tensors.items()}
        return Payload(tensors, self.shared(site, params), self.attributes(site, params))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The product of the decoded factors in float32."""
        rank = _rank_of(payload)
        right, left = (
            self.inner.decode(_factor_site(site, part, rank), self.part_of(payload, part))
            for part in _PARTS
        )
        return np.asarray(left @ right)

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products where the site has such uses; the dense weight always."""
        product = any(use.need == "matmul" for use in site.uses)
        return frozenset({"weight", "decode", "matmul"} if product else {"weight", "decode"})

    def _emit(
        self,
        builder: Builder[V],
        site: WeightSite,
        payload: Payload,
        part: str,
        kind: Kind,
        x: V | None,
    ) -> V:
        factor = _factor_site(site, part, _rank_of(payload))
        stored = self.part_of(payload, part)
        own: Builder[V] = PartBuilder(builder, part, stored)
        return self.inner.emit(own, factor, stored, kind, x)

    def factors(self, builder: Builder[V], site: WeightSite, payload: Payload) -> tuple[V, V]:
        """Both factors, decoded when a session starts."""
        left = self._emit(builder, site, payload, "left", "weight", None)
        return left, self._emit(builder, site, payload, "right", "weight", None)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """``x W^T``: the product by `right`, then by `left`; ``W -> MatMul(left, right)``."""
        if kind == "matmul":
            thin = self._emit(builder, site, payload, "right", "matmul", x)
            return self._emit(builder, site, payload, "left", "matmul", thin)
        parts = [self._emit(builder, site, payload, part, kind, None) for part in ("left", "right")]
        return builder.node("MatMul", parts)

    @property
    def pacing(self) -> str | None:
        """That of the inner codec."""
        return self.inner.pacing

    @property
    def calls(self) -> int:
        """One for each factor."""
        return 2

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the bodies of both factors takes, and the product where it is wanted."""
        needs = [
            self.inner.load_memory(factor, self.coding(params), kind)
            for _, factor in self._sites(site, params)
        ]
        product = 0 if kind == "matmul" else site.nbytes
        kept = sum(need.kept for need in needs) + product
        result = sum(need.result for need in needs) + product
        return LoadMemory(kept, max(need.working for need in needs), result)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Those of the inner codec."""
        return self.inner.functions(opset)
