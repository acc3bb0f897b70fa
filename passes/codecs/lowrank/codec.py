"""The low-rank codec: a weight as the product of two thin matrices, in standard operators.

``x W^T`` becomes ``(x down) up``: fewer multiplications and fewer bytes as soon as the rank is
below ``rows * length / (rows + length)``. Any runtime that can multiply matrices runs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.anchoring import lacking, objective
from onnxcomp.passes.codecs.lowrank import factors as lowrank_factors
from onnxcomp.passes.codecs.lowrank.factors import Factors
from onnxcomp.passes.codecs.lowrank.ranks import GOALS, rank_for
from onnxcomp.passes.codecs.moments import output_root
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    Payload,
    RankGoals,
    TensorLayout,
)
from onnxcomp.passes.weight import DTYPES, Array, Kind, Stats, WeightSite

__all__ = [
    "ANCHORING",
    "LowRankCodec",
    "LowRankParams",
    "break_even",
    "fitting_target",
    "offered_ranks",
]

V = TypeVar("V")

# Relative error of rounding the factors: below this, losses are not told apart.
_ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# Ranks offered are multiples of this: kernels work on blocks of 8 columns and more.
STEP = 8
_OFFERS = 24

# Input vectors for each column from which on a weight is fitted to the outputs of the dense model:
# with 3 a small language model was worse than without, with 23 it was better.
ANCHORING = 10


@dataclasses.dataclass(frozen=True, slots=True)
class LowRankParams(Params):
    """Settings of the low-rank codec.

    Attributes:
        rank: Columns of the first factor and rows of the second one, 1 or more.
    """

    rank: int = 64


def break_even(rows: int, length: int) -> int:
    """The largest rank at which two factors have fewer elements than the matrix."""
    return (rows * length - 1) // (rows + length)


def offered_ranks(rows: int, length: int) -> list[int]:
    """Multiples of `STEP` up to `break_even`, all or an even choice, from high to low."""
    ranks = range(STEP, break_even(rows, length) + 1, STEP)
    if len(ranks) <= _OFFERS:
        return list(reversed(ranks))
    # Denser among the low ranks: their neighbours differ by a larger share of bytes.
    shares = (np.arange(_OFFERS) / (_OFFERS - 1)) ** 1.5
    chosen = {ranks[round(share * (len(ranks) - 1))] for share in shares}
    return sorted(chosen, reverse=True)


class LowRankCodec(Codec):
    """Two factors in the dtype of the site.

    A weight with products is stored as ``down (length, rank)`` and ``up (rank, rows)``, ready to be
    multiplied with; any other one as ``left (rows, rank)`` and ``right (rank, length)``.
    """

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = (
        "two thin matrices: smaller and faster with standard operators, by values or for inputs"
    )
    params_type: ClassVar[type[Params]] = LowRankParams
    # Plans look at every weight's singular values: that is done where it is asked for.
    automatic: ClassVar[bool] = False
    trainable: ClassVar[bool] = True

    @property
    def calibration(self) -> CalibratedEncoding:
        """For inputs with known moments, towards the outputs of the dense model."""
        return CalibratedEncoding(self.encode_calibrated, anchored=True, streams=True, outputs=True)

    @property
    def ranks(self) -> RankGoals:
        """The goals of all low-rank codecs."""
        return RankGoals(GOALS, self.energies, self.rank_for)

    def refuse(self, site: WeightSite) -> str | None:
        """Why no rank of this codec suits the site; None when one does."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        if break_even(site.rows, site.length) < STEP:
            least = STEP * (site.rows + site.length)
            shape = f"{site.rows} x {site.length}"
            return f"{shape} has {site.size} weights, factors of rank {STEP} have {least}"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the rank is out of range."""
        rank = LowRankParams.of(params).rank
        if rank < 1:
            raise UsageError(f"lowrank: rank={rank}", hint="ranks are 1 or more")

    def candidates(self, site: WeightSite) -> Sequence[LowRankParams]:
        """Ranks at which the factors are smaller than the weight, from most to fewest bytes."""
        if self.refuse(site) is not None:
            return []
        ranks = offered_ranks(site.rows, site.length)
        if site.rank is not None:
            ranks = [site.rank, *(rank for rank in ranks if rank < site.rank)]
        return [LowRankParams(rank) for rank in ranks]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """The two factors."""
        rank, dtype = LowRankParams.of(params).rank, DTYPES[site.dtype]
        if _multiplied(site):
            shapes = {"down": (site.length, rank), "up": (rank, site.rows)}
        else:
            shapes = {"left": (site.rows, rank), "right": (rank, site.length)}
        return {key: TensorLayout(shape, dtype) for key, shape in shapes.items()}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of both factors."""
        return LowRankParams.of(params).rank * (site.rows + site.length) * site.itemsize

    def predict(self, site: WeightSite, params: Params) -> float:
        """Relative error for weights without structure; `measure` looks at them."""
        return lowrank_factors.expected_error(site.rows, site.length, LowRankParams.of(params).rank)

    def measure(
        self, site: WeightSite, weight: Array, params: Sequence[Params], stats: Stats | None = None
    ) -> list[float]:
        """Relative errors of the weight, or of its products, exactly, at several ranks at once.

        Args:
            site: The weight.
            weight: Its values ``(rows, length)``.
            params: Settings to judge.
            stats: Inputs to judge products by, and what the outputs of the model feel of them; None
                to judge the weight itself.
        """
        energies = self.energies(weight, stats)
        cut = [lowrank_factors.truncation_error(energies, LowRankParams.of(p).rank) for p in params]
        return [math.hypot(error, _ROUNDING[site.dtype]) for error in cut]

    def spectrum(self, weight: Array) -> Array:
        """All singular values of ``(rows, length)``, largest first."""
        return np.sqrt(lowrank_factors.spectrum(weight))

    def energies(self, weight: Array, stats: Stats | None = None) -> Array:
        """Squared singular values of ``(rows, length)``, or of its products, largest first."""
        if stats is None:
            return lowrank_factors.spectrum(weight)
        if stats.outputs is not None:
            weight = output_root(stats.outputs) @ weight
        return lowrank_factors.spectrum(weight, stats.gram)

    def rank_for(self, site: WeightSite, goal: str, value: object, energies: Array) -> int:
        """The multiple of 8 that reaches a goal; see `GOALS`."""
        return rank_for(site, goal, value, energies, STEP)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """The truncated singular value decomposition.

        Raises:
            UsageError: The factors would have as many elements as the weight, or more.
        """
        rank = _checked(site, params)
        return _stored(site, lowrank_factors.factorize(weight, rank))

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """The product that changes the outputs of the model least, as far as `stats` tell.

        Errors of products count by what the loss of the outputs feels of them, or all alike where
        that is not known. Where the dense model was observed as well, it aims at its outputs:
        errors of earlier weights are made up for as far as held-out inputs say that it helps.
        Rows that are looked up as well count a little for themselves, too.

        Raises:
            UsageError: The factors would have as many elements as the weight, or more.
        """
        rank = _checked(site, params)
        target, moments = objective(weight, stats)
        scales = None if stats.outputs is None else output_root(stats.outputs)
        return _stored(site, lowrank_factors.factorize(target, rank, moments, scales))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The product of the factors in float32."""
        left, right = _factors(payload)
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(f"factors {left.shape} and {right.shape} do not fit")
        return np.asarray(left.astype(np.float32) @ right.astype(np.float32))

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products and look-ups where the site has such uses; the dense weight always."""
        return site.kinds

    def factors(self, builder: Builder[V], site: WeightSite, payload: Payload) -> tuple[V, V]:
        """``left (rows, rank)`` and ``right (rank, length)``, whose product is the weight."""
        if "left" in payload.tensors:
            return builder.tensor("left"), builder.tensor("right")
        swap = {"perm": (1, 0)}
        down, up = builder.tensor("down"), builder.tensor("up")
        return builder.node("Transpose", [up], swap), builder.node("Transpose", [down], swap)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """Two products.

        ``x W^T -> MatMul(MatMul(x, down), up)``, ``W[i] -> MatMul(Gather(left, i), right)``, and
        ``W -> MatMul(left, right)``, which is constant.
        """
        if kind == "matmul":
            assert x is not None
            thin = builder.node("MatMul", [x, builder.tensor("down")])
            return builder.node("MatMul", [thin, builder.tensor("up")])
        left, right = self.factors(builder, site, payload)
        if kind == "gather":
            assert x is not None
            left = builder.node("Gather", [left, x], {"axis": 0})
        return builder.node("MatMul", [left, right])


def _multiplied(site: WeightSite) -> bool:
    return any(use.need == "matmul" for use in site.uses)


def _checked(site: WeightSite, params: Params) -> int:
    """The rank, when the factors are smaller than the weight."""
    rank, most = LowRankParams.of(params).rank, break_even(site.rows, site.length)
    if not 1 <= rank <= most:
        raise UsageError(
            f"lowrank: rank={rank} for {site.name!r}, a weight of {site.rows} x {site.length}",
            hint=f"ranks of 1 to {most} make it smaller" if most else "use another codec",
        )
    return rank


def _stored(site: WeightSite, factors: Factors) -> Payload:
    dtype = DTYPES[site.dtype]
    left, right = factors.left.astype(dtype), factors.right.astype(dtype)
    if _multiplied(site):
        return Payload({"down": np.ascontiguousarray(right.T), "up": np.ascontiguousarray(left.T)})
    return Payload({"left": left, "right": right})


def _factors(payload: Payload) -> tuple[Array, Array]:
    """``left (rows, rank)`` and ``right (rank, length)`` of a payload."""
    if "left" in payload.tensors:
        return payload.tensors["left"], payload.tensors["right"]
    return payload.tensors["up"].T, payload.tensors["down"].T


def fitting_target(weight: Array, stats: Stats, moments: Array) -> Array:
    """What factors approximate: the weight, or with enough inputs the dense model's outputs.

    Args:
        weight: ``(rows, length)``.
        stats: Moments of the inputs.
        moments: ``G`` with what was added to its diagonal; as much is added to ``C``, so that the
            least-squares fit shrinks to the weight.
    """
    lack = lacking(weight, stats)
    if lack is None or stats.tokens < ANCHORING * weight.shape[1]:
        return weight
    return np.asarray(weight + np.linalg.solve(moments, lack.T.astype(np.float64)).T)
