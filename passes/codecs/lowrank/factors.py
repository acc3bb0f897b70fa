"""Factors of a weight: the nearest product ``left @ right`` of a given rank.

All of it is one problem: for a weight ``W (rows, length)`` and inputs with second moments ``G`` the
product that changes the outputs least, ``min tr((W - W') G (W - W')^T)`` over rank `r`, is
``W' = U U^T W`` with the first eigenvectors ``U`` of ``W G W^T``; what is lost is the sum of the
other eigenvalues. For ``G = 1`` that is the truncated singular value decomposition. It equals the
decomposition of ``W L`` with ``G = L L^T`` (SVD-LLM, Wang et al., arXiv 2403.07378) and needs
neither a Cholesky factor nor an inverse, so that singular moments are no special case. Where errors
of outputs count unequally, by a symmetric ``H``, it is the same problem for ``H^1/2 W``.

Everything is computed in float64. ``W`` is read in pieces and never copied as a whole.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = [
    "Factors",
    "Subspace",
    "expected_error",
    "expected_evenness",
    "factorize",
    "leading_eigenvectors",
    "spectrum",
    "truncation_error",
]

# Elements of a weight that are worked on at a time.
_CHUNK = 1 << 20

# Up to this size all eigenvectors are computed; above it only the leading ones, where they are few.
EXACT = 3072
_FEW = 3

# Randomised subspaces: vectors beyond the rank, and multiplications by the matrix at most. Halko,
# Martinsson, Tropp: Finding structure with randomness, arXiv 0909.4061, section 4.5.
_OVERSAMPLING = 16
_ROUNDS = 6
_SETTLED = 1e-4
_SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Factors:
    """A matrix of low rank.

    Attributes:
        left: ``(rows, rank)`` float64.
        right: ``(rank, length)`` float64.
    """

    left: Array
    right: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Subspace:
    """Leading eigenvectors of a positive semidefinite matrix ``M``.

    Attributes:
        vectors: Orthonormal, ``(n, rank)``.
        missed: ``tr(M) - tr(V^T M V)``: what a projection on them loses, exactly.
        excess: Most by which `missed` can be above the least that any subspace of this rank misses;
            0 where all eigenvectors were computed.
    """

    vectors: Array
    missed: float
    excess: float = 0.0


def _pieces(weight: Array) -> list[slice]:
    """Parts of the longer axis."""
    long, short = max(weight.shape), max(1, min(weight.shape))
    step = max(1, _CHUNK // short)
    return [slice(start, start + step) for start in range(0, long, step)]


def _inner(weight: Array) -> Array:
    """``W W^T`` of a wide matrix, ``W^T W`` of a tall one: float64 ``(n, n)``, n the short side."""
    rows, length = weight.shape
    total = np.zeros((min(rows, length),) * 2)
    for part in _pieces(weight):
        piece = (weight[part].T if rows > length else weight[:, part]).astype(np.float64)
        total += piece @ piece.T
    return total


def _times(weight: Array, matrix: Array) -> Array:
    """``W @ matrix`` in float64."""
    matrix = np.asarray(matrix, np.float64)
    result = np.empty((len(weight), matrix.shape[1]))
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        result[part] = weight[part].astype(np.float64) @ matrix
    return result


def _root(moments: Array) -> Array:
    """The symmetric square root of positive semidefinite moments."""
    values, vectors = np.linalg.eigh(np.asarray(moments, np.float64))
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def _energy_matrix(weight: Array, moments: Array | None) -> Array:
    """A matrix on the short side whose eigenvalues are the energies of output directions.

    ``W G W^T`` of a wide matrix, ``G^1/2 W^T W G^1/2`` of a tall one.
    """
    if moments is None:
        return _inner(weight)
    if weight.shape[0] <= weight.shape[1]:
        weighted = _times(weight, moments)
        return _symmetric(_times(weight, weighted.T))
    root = _root(moments)
    return _symmetric(root @ _inner(weight) @ root)


def _symmetric(matrix: Array) -> Array:
    return np.asarray((matrix + matrix.T) / 2)


def spectrum(weight: Array, moments: Array | None = None) -> Array:
    """Energies of all directions, largest first: eigenvalues of ``W G W^T``.

    Args:
        weight: ``(rows, length)``.
        moments: Second moments ``G`` of its inputs, ``(length, length)``; None for ``1``:
            then they are the squared singular values of the weight.

    Returns:
        Float64 ``(min(rows, length),)``, not negative.
    """
    values = np.linalg.eigvalsh(_energy_matrix(weight, moments))
    return np.maximum(values[::-1], 0.0)


def truncation_error(energies: Array, rank: int) -> float:
    """Relative error of the best matrix of a rank: what is left of the energies, as a root.

    Returns:
        A number from 0 to 1; 0 where there is no energy at all.
    """
    total = float(energies.sum())
    return float(np.sqrt(max(0.0, energies[rank:].sum()) / total)) if total > 0.0 else 0.0


def leading_eigenvectors(matrix: Array, rank: int) -> Subspace:
    """The first `rank` eigenvectors of a positive semidefinite matrix ``(n, n)``.

    Large matrices of which few are wanted are searched with a random subspace that is multiplied by
    the matrix until what it catches settles; the error is known afterwards all the same: `missed`
    exactly, `excess` by Ky Fan's inequality, for the energy of the best subspace is at most what
    the whole searched space holds and what is outside it.
    """
    size, total = len(matrix), float(np.trace(matrix))
    if size <= EXACT or rank * _FEW > size:
        values, vectors = np.linalg.eigh(matrix)
        vectors = vectors[:, ::-1][:, :rank]
        return Subspace(_signed(vectors), max(0.0, total - float(values[-rank:].sum())))
    width = min(size, rank + max(_OVERSAMPLING, rank // 8))
    basis = np.random.default_rng(_SEED).standard_normal((size, width))
    caught, before = 0.0, -np.inf
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(matrix @ basis)
        inner = _symmetric(basis.T @ (matrix @ basis))
        values, turned = np.linalg.eigh(inner)
        caught = float(values[-rank:].sum())
        if caught - before <= _SETTLED * total:
            break
        before = caught
    vectors = basis @ turned[:, ::-1][:, :rank]
    outside = max(0.0, total - float(np.trace(inner)))
    return Subspace(_signed(vectors), max(0.0, total - caught), outside)


def _signed(vectors: Array) -> Array:
    """The vectors with their largest entry positive, so that equal input gives equal bytes."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return np.asarray(vectors * np.where(signs == 0.0, 1.0, signs))


def _output_directions(weight: Array, moments: Array | None, rank: int) -> Array:
    """Orthonormal ``U (rows, rank)`` that ``U U^T W`` projects on."""
    found = leading_eigenvectors(_energy_matrix(weight, moments), rank).vectors
    if weight.shape[0] <= weight.shape[1]:
        return found
    inputs = found if moments is None else _root(moments) @ found
    directions, _ = np.linalg.qr(_times(weight, inputs))
    return _signed(directions)


def factorize(
    weight: Array, rank: int, moments: Array | None = None, scales: Array | None = None
) -> Factors:
    """The best product of a rank for inputs with these second moments.

    Rows and columns of zeros stay zeros exactly. Both factors take half of the singular values of
    the product, so that neither is small where the other is large.

    Args:
        weight: ``(rows, length)``.
        rank: From 1 to the shorter side.
        moments: Second moments ``G`` of the inputs, float64 ``(length, length)``; None for ``1``.
        scales: ``S``, symmetric and invertible, for the product that keeps ``S (W - W')`` small:
            that of ``S W``, times the inverse; None for ``1``.
    """
    if scales is None:
        left = _output_directions(weight, moments, rank)
        right = _times(np.asarray(weight).T, left).T
    else:
        scaled = scales @ weight
        left = _output_directions(scaled, moments, rank)
        right = _times(scaled.T, left).T
        left, turned = np.linalg.qr(np.linalg.solve(scales, left))
        right = turned @ right
    # The same product in its own singular vectors: right = Q S P^T.
    values, turned = np.linalg.eigh(_symmetric(right @ right.T))
    root = np.sqrt(np.sqrt(np.maximum(values[::-1], 0.0)))
    turned = _signed(turned[:, ::-1])
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > root[0] * 1e-8)
    left = (left @ turned) * root
    right = inverse[:, None] * (turned.T @ right)
    left[~np.any(weight, axis=1)] = 0.0
    right[:, ~np.any(weight, axis=0)] = 0.0
    return Factors(left, right)


def _law(short: int, long: int) -> tuple[Array, Array]:
    """Energies of independent normal weights from large to small, and how frequent they are.

    Marchenko and Pastur's law: energies over the longer side lie between ``(1 - sqrt(b))^2`` and
    ``(1 + sqrt(b))^2`` with ``b = short / long``.
    """
    root = np.sqrt(short / long)
    angles = (np.arange(4096) + 0.5) * (np.pi / 4096)
    energies = 1.0 + root * root + 2.0 * root * np.cos(angles)
    # Density sqrt((b - x)(x - a)) / x, with the substitution's own sine.
    density = np.sin(angles) ** 2 / energies
    return energies, density / density.sum()


@functools.lru_cache(maxsize=4096)
def expected_error(rows: int, length: int, rank: int) -> float:
    """Relative error of the best matrix of a rank for independent normal weights.

    Trained weights have more structure and lose less.
    """
    short, long = sorted((rows, length))
    if rank >= short:
        return 0.0
    energies, density = _law(short, long)
    energy = np.cumsum(density * energies)
    return float(np.sqrt(1.0 - np.interp(rank / short, np.cumsum(density), energy / energy[-1])))


@functools.lru_cache(maxsize=4096)
def expected_evenness(rows: int, length: int, rank: int) -> float:
    """``(sum s)^2 / (r sum s^2)`` of the first singular values of independent normal weights."""
    short, long = sorted((rows, length))
    energies, density = _law(short, long)
    kept = np.cumsum(density) <= max(rank, 1) / short
    kept[0] = True
    values, weights = np.sqrt(energies[kept]), density[kept]
    return float(np.sum(values * weights) ** 2 / (weights.sum() * np.sum(values**2 * weights)))
