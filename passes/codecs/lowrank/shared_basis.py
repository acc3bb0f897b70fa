"""The codec `shared_basis`: small factors of each weight behind a basis that several share.

``x W_i^T`` becomes ``(x basis) up_i`` with one `basis` for several weights, which is stored once:
an initializer that several nodes read. Weights whose products read the same value, such as those of
queries, keys and values, then also share the product with it: ONNX Runtime computes equal nodes
once. The idea is that of Basis Sharing (Wang et al., arXiv 2410.03765) and FiPS (arXiv 2411.09816).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.anchoring import anchored
from onnxcomp.passes.codecs.bases import SharedBases
from onnxcomp.passes.codecs.lowrank.codec import (
    STEP,
    LowRankCodec,
    LowRankParams,
    break_even,
    offered_ranks,
)
from onnxcomp.passes.codecs.lowrank.ranks import GOALS
from onnxcomp.passes.codecs.moments import damped, output_root
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Payload, RankGoals, TensorLayout
from onnxcomp.passes.weight import DTYPES, Array, Kind, Stats, WeightSite

__all__ = ["SharedBasisCodec", "SharedBasisParams"]

V = TypeVar("V")

# Share of the mean diagonal that is added where factors are fitted to a basis.
_RIDGE = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class SharedBasisParams(LowRankParams):
    """Settings of the codec for shared bases.

    Attributes:
        rank: Columns of the basis and rows of each weight's own factor, 1 or more.
        basis: Name of the basis. Weights with the same name, rank and length share one. Without a
            name it is one for the weights whose products read the same value.
    """

    basis: str = ""


class _Sums:
    """Sums over the weights that share a basis; a `BasisSums`.

    With the moments ``G`` of all inputs together the best row space is that of the first
    eigenvectors ``V`` of ``G^1/2 (sum of W^T H W) G^1/2``, taken back by ``G^-1/2``.
    """

    def __init__(self, length: int) -> None:
        self._energy = np.zeros((length, length))
        self._moments = np.zeros((length, length))
        self._used = np.zeros(length, bool)

    def add(self, weight: Array, stats: Stats | None = None) -> None:
        """Add a weight ``(rows, length)``, and what is known of its inputs and outputs."""
        rows = np.asarray(weight, np.float64)
        if stats is not None and stats.outputs is not None:
            rows = output_root(stats.outputs) @ rows
        self._energy += rows.T @ rows
        self._moments += np.eye(weight.shape[1]) if stats is None else damped(stats)
        self._used |= np.any(weight, axis=0)

    def basis(self, rank: int) -> Array:
        """The best basis for all weights: float64 ``(rank, length)``."""
        values, vectors = np.linalg.eigh(self._moments / np.trace(self._moments))
        sizes = np.sqrt(np.maximum(values, values[-1] * 1e-12))
        root, inverse = (vectors * sizes) @ vectors.T, (vectors / sizes) @ vectors.T
        energies, found = np.linalg.eigh(root @ self._energy @ root)
        energies, found = energies[::-1][:rank], found[:, ::-1][:, :rank]
        largest = np.abs(found).argmax(axis=0)
        signs = np.where(found[largest, np.arange(rank)] < 0.0, -1.0, 1.0)
        # As large as the factors behind it: both take half of the singular values.
        halves = np.sqrt(np.sqrt(np.maximum(energies, energies[0] * 1e-12)))
        result = (found * (signs * halves)).T @ inverse
        result[:, ~self._used] = 0.0
        return np.asarray(result)


class SharedBasisCodec(LowRankCodec):
    """A basis ``(length, rank)`` for several weights, and a factor ``up (rank, rows)`` for each.

    Args:
        basis: ``(rank, length)``; None to find one for each weight alone.
    """

    name: ClassVar[str] = "shared_basis"
    summary: ClassVar[str] = (
        "thin matrices, of which weights with equal inputs (or of one name) share the first; "
        "in plans for a size lowrank loses less"
    )
    params_type: ClassVar[type[Params]] = SharedBasisParams

    def __init__(self, basis: Array | None = None) -> None:
        self._basis = basis

    @property
    def bases(self) -> SharedBases[SharedBasisCodec]:
        """Weights share the basis of their name, rank and length."""
        return SharedBases(_key, _Sums, lambda p: LowRankParams.of(p).rank, SharedBasisCodec)

    @property
    def ranks(self) -> RankGoals:
        """By the share of weights alone: others would give weights of a basis several ranks."""
        return RankGoals({"kept": GOALS["kept"]}, self.energies, self.rank_for)

    def rank_for(self, site: WeightSite, goal: str, value: object, energies: Array) -> int:
        """The multiple of 8 that reaches a goal for all weights of a family together."""
        whole = dataclasses.replace(site, rows=_family_rows(site))
        return super().rank_for(whole, goal, value, energies)

    def refuse(self, site: WeightSite) -> str | None:
        """Why the site cannot share a basis; None when it can."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        if all(use.need != "matmul" for use in site.uses):
            return "no product reads it"
        if site.length <= STEP or break_even(_family_rows(site), site.length) < STEP:
            return f"{site.rows} x {site.length} is too small for a basis of rank {STEP}"
        return None

    def candidates(self, site: WeightSite) -> Sequence[SharedBasisParams]:
        """Ranks at which a basis and the factors of its weights are smaller than these."""
        if self.refuse(site) is not None:
            return []
        ranks = offered_ranks(_family_rows(site), site.length)
        return [SharedBasisParams(rank, site.family.name if site.family else "") for rank in ranks]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """The weight's own factor."""
        shape = (LowRankParams.of(params).rank, site.rows)
        return {"up": TensorLayout(shape, DTYPES[site.dtype])}

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """A basis of the right shape that takes no memory."""
        shape = (site.length, LowRankParams.of(params).rank)
        return {_key(site, params): np.broadcast_to(np.zeros((), DTYPES[site.dtype]), shape)}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of the weight's own factor; the basis is counted once for all."""
        return LowRankParams.of(params).rank * site.rows * site.itemsize

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """The factor that comes nearest to the weight.

        Raises:
            UsageError: The factor would have as many elements as the weight, or more.
        """
        return self._encoded(site, weight, params, None)

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """The factor that comes nearest to the outputs for inputs with the moments of `stats`.

        Raises:
            UsageError: The factor would have as many elements as the weight, or more.
        """
        return self._encoded(site, weight, params, stats)

    def _encoded(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats | None
    ) -> Payload:
        rank = LowRankParams.of(params).rank
        if not 1 <= rank < site.length:
            raise UsageError(
                f"shared_basis: rank={rank} for {site.name!r}, rows of {site.length}",
                hint=f"ranks of 1 to {site.length - 1} make it smaller",
            )
        basis = self._basis
        if basis is None:
            sums = _Sums(site.length)
            sums.add(weight, stats)
            basis = sums.basis(rank)
        dtype = DTYPES[site.dtype]
        down = np.ascontiguousarray(basis.T.astype(dtype))
        up = _fitted(weight, down.T.astype(np.float64), stats)
        return Payload({"up": up.T.astype(dtype, order="C")}, {_key(site, params): down})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The product of the factor and the basis in float32."""
        up, (down,) = payload.tensors["up"], payload.shared.values()
        if up.ndim != 2 or down.ndim != 2 or up.shape[0] != down.shape[1]:
            raise ValueError(f"a factor {up.shape} and a basis {down.shape} do not fit")
        return np.asarray(up.T.astype(np.float32) @ down.T.astype(np.float32))

    def factors(self, builder: Builder[V], site: WeightSite, payload: Payload) -> tuple[V, V]:
        """``left (rows, rank)`` and ``right (rank, length)``, whose product is the weight."""
        swap = {"perm": (1, 0)}
        up, down = builder.tensor("up"), builder.tensor(next(iter(payload.shared)))
        return builder.node("Transpose", [up], swap), builder.node("Transpose", [down], swap)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """``x W^T -> MatMul(MatMul(x, basis), up)``; all else as of `lowrank`."""
        if kind != "matmul":
            return super().emit(builder, site, payload, kind, x)
        assert x is not None
        thin = builder.node("MatMul", [x, builder.tensor(next(iter(payload.shared)))])
        return builder.node("MatMul", [thin, builder.tensor("up")])


def _family_rows(site: WeightSite) -> int:
    return site.rows if site.family is None else site.family.rows


def _key(site: WeightSite, params: Params) -> str:
    """Name of the basis, with what its shape and type follow from."""
    given = SharedBasisParams.of(params)
    kind = "" if site.dtype == "float32" else f".{site.dtype}"
    return f"basis.{given.basis or site.name}.{site.length}x{given.rank}{kind}"


def _fitted(weight: Array, basis: Array, stats: Stats | None) -> Array:
    """``U (rows, rank)`` with the least error of ``U basis``, or of its products with inputs."""
    moments, target = np.eye(weight.shape[1]), weight
    if stats is not None:
        moments, target = damped(stats), anchored(weight, stats)
    seen = moments @ basis.T
    inner = basis @ seen
    inner += np.eye(len(inner)) * (_RIDGE * np.trace(inner) / len(inner) + np.finfo(float).tiny)
    return np.asarray(np.linalg.solve(inner, seen.T @ np.asarray(target, np.float64).T).T)
