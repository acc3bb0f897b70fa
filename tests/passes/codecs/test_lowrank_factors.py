"""The mathematics of low-rank factors: identities, exact losses, and matrices that are no fun."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codecs.lowrank import factors as lowrank_factors
from onnxcomp.passes.codecs.lowrank.factors import (
    expected_error,
    factorize,
    leading_eigenvectors,
    spectrum,
    truncation_error,
)
from onnxcomp.passes.weight import Array

SHAPES = pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)


def weight_of(rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, length)).astype(np.float32)


def moments_of(length: int, seed: int = 1, tokens: int = 500) -> Array:
    """Second moments of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((length, length)) * np.geomspace(10.0, 0.01, length)
    x = rng.standard_normal((tokens, length)) @ mixing.T
    return np.asarray(x.T @ x / tokens)


def loss(weight: Array, product: Array, moments: Array) -> float:
    error = product - weight.astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, moments, error))


def product_of(weight: Array, rank: int, moments: Array | None = None) -> Array:
    factors = factorize(weight, rank, moments)
    assert factors.left.shape == (len(weight), rank)
    assert factors.right.shape == (rank, weight.shape[1])
    return np.asarray(factors.left @ factors.right)


def by_cholesky(weight: Array, rank: int, moments: Array) -> Array:
    """SVD-LLM: truncate ``W L`` with ``G = L L^T``, then undo ``L``."""
    whitening = np.linalg.cholesky(moments)
    left, values, right = np.linalg.svd(weight.astype(np.float64) @ whitening, full_matrices=False)
    kept = (left[:, :rank] * values[:rank]) @ right[:rank]
    return np.asarray(np.linalg.solve(whitening.T, kept.T).T)


@SHAPES
def test_without_inputs_it_is_the_truncated_singular_value_decomposition(
    shape: tuple[int, int],
) -> None:
    weight = weight_of(*shape)
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    for rank in (1, 7, 20):
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        np.testing.assert_allclose(product_of(weight, rank), expected, atol=1e-9)
    np.testing.assert_allclose(spectrum(weight), values**2, rtol=1e-9)


@SHAPES
def test_whitened_factors_equal_those_of_the_cholesky_form(shape: tuple[int, int]) -> None:
    weight, moments = weight_of(*shape), moments_of(shape[1])
    for rank in (1, 7, 20):
        expected = by_cholesky(weight, rank, moments)
        np.testing.assert_allclose(product_of(weight, rank, moments), expected, atol=1e-6)


@SHAPES
def test_the_loss_is_the_sum_of_the_energies_cut_off(shape: tuple[int, int]) -> None:
    weight, moments = weight_of(*shape), moments_of(shape[1])
    energies = spectrum(weight, moments)
    power = loss(weight, np.zeros(shape), moments)
    assert energies.sum() == pytest.approx(power)
    for rank in (1, 7, 20):
        measured = loss(weight, product_of(weight, rank, moments), moments)
        assert measured == pytest.approx(energies[rank:].sum(), rel=1e-6)
        assert truncation_error(energies, rank) == pytest.approx(np.sqrt(measured / power), 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    rank=st.integers(1, 24),
    seed=st.integers(0, 99),
)
def test_no_other_product_of_the_rank_changes_outputs_less(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    weight, moments = weight_of(*shape, seed), moments_of(shape[1], seed)
    rank = min(rank, *shape)
    best = loss(weight, product_of(weight, rank, moments), moments)
    power = loss(weight, np.zeros(shape), moments)
    rng = np.random.default_rng(seed)
    factors = factorize(weight, rank, moments)
    for scale in (1e-3, 1e-1):
        left = factors.left + scale * rng.standard_normal(factors.left.shape)
        assert loss(weight, left @ factors.right, moments) >= best - 1e-12 * power


def test_both_factors_are_of_one_size() -> None:
    factors = factorize(weight_of(30, 50) * np.float32(1e-3), 12, moments_of(50))
    np.testing.assert_allclose(
        np.linalg.norm(factors.left, axis=0), np.linalg.norm(factors.right, axis=1), rtol=1e-6
    )


def test_singular_moments_and_directions_nobody_uses_are_no_special_case() -> None:
    weight, moments = weight_of(20, 30), np.zeros((30, 30))
    assert np.isfinite(product_of(weight, 8, moments)).all()  # inputs are always zero
    x = np.random.default_rng(2).standard_normal((5, 30))  # fewer inputs than columns
    moments = x.T @ x
    product = product_of(weight, 8, moments)
    assert np.isfinite(product).all()
    np.testing.assert_allclose(product @ x.T, weight @ x.T, atol=1e-8)
    np.testing.assert_allclose(spectrum(weight, moments)[5:], 0.0, atol=1e-8)


def test_matrices_of_lower_rank_than_asked_for_are_kept_exactly() -> None:
    weight = (weight_of(20, 3) @ weight_of(3, 30, 1)).astype(np.float32)
    for moments in (None, moments_of(30)):
        factors = factorize(weight, 10, moments)
        assert np.isfinite(factors.left).all()
        assert np.isfinite(factors.right).all()
        np.testing.assert_allclose(factors.left @ factors.right, weight, atol=1e-5)


def test_rows_and_columns_of_zeros_stay_zeros() -> None:
    weight = weight_of(20, 30)
    weight[4] = 0.0
    weight[:, 7] = 0.0
    for moments in (None, moments_of(30)):
        product = product_of(weight, 6, moments)
        assert not product[4].any()
        assert not product[:, 7].any()
    assert not product_of(np.zeros((20, 30), np.float32), 6).any()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0], ids="energy ~ 1/i^{}".format)
def test_a_random_subspace_knows_its_error(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    rng = np.random.default_rng(0)
    vectors, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    energies = np.arange(1, 301.0) ** -decay
    matrix = (vectors * energies) @ vectors.T
    least = energies[30:].sum()
    assert leading_eigenvectors(matrix, 30).missed == pytest.approx(least)
    monkeypatch.setattr(lowrank_factors, "EXACT", 100)
    found = leading_eigenvectors(matrix, 30)
    identity = found.vectors.T @ found.vectors
    np.testing.assert_allclose(identity, np.eye(30), atol=1e-9)
    caught = np.trace(found.vectors.T @ matrix @ found.vectors)
    assert found.missed == pytest.approx(energies.sum() - caught)
    assert least - 1e-9 <= found.missed <= least + found.excess
    assert found.missed <= 1.02 * least


def test_large_weights_are_factored_by_a_random_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(300, 12) @ weight_of(12, 260, 1) + 0.1 * weight_of(300, 260, 2)
    moments = moments_of(260)
    for inputs, judge in ((None, np.eye(260)), (moments, moments)):
        exact = loss(weight, product_of(weight, 16, inputs), judge)
        with monkeypatch.context() as patch:
            patch.setattr(lowrank_factors, "EXACT", 100)
            near = product_of(weight, 16, inputs)
        assert loss(weight, near, judge) <= 1.02 * exact


@pytest.mark.parametrize("shape", [(64, 64), (64, 512), (512, 64), (96, 200)], ids=str)
def test_expected_errors_are_those_of_normal_weights(shape: tuple[int, int]) -> None:
    energies = spectrum(weight_of(*shape))
    for rank in (1, 8, 24, 48, 63):
        measured = truncation_error(energies, rank)
        assert expected_error(*shape, rank) == pytest.approx(measured, rel=0.03, abs=0.01)
    assert expected_error(*shape, min(shape)) == 0.0
