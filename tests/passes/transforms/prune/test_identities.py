"""The mathematics of scores and fits, on random moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.transforms.prune.compensate import (
    Sums,
    best_fit,
    fitted,
    masked,
    temper,
    tempered,
)
from onnxcomp.passes.transforms.prune.obs import Surgeon, damping
from onnxcomp.passes.transforms.prune.scores import PENALTY, mask_matrix, newton, numerical, wanda

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed: int, rows: int = 7, length: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A weight ``(rows, length)`` and second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((length, length)) / np.sqrt(length)
    x = rng.standard_normal((40 * length, length)) @ (mixing + 0.5 * np.eye(length))
    return rng.standard_normal((rows, length)), x.T @ x / len(x)


def loss(weight: np.ndarray, other: np.ndarray, gram: np.ndarray) -> float:
    """``tr(E G E^T)``."""
    error = weight - other
    return float(np.einsum("ij,ij->", error @ gram, error))


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(0.05, 0.9))
def test_one_newton_step_equals_fifty_and_the_closed_form(seed: int, ratio: float) -> None:
    weight, gram = problem(seed)
    matrix = mask_matrix(weight, gram)
    penalty = PENALTY * np.trace(matrix) / len(matrix)
    one, fifty = (newton(matrix, penalty, ratio, steps) for steps in (1, 50))
    closed = numerical(weight, gram, ratio)
    np.testing.assert_allclose(one, fifty, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(one, closed, rtol=1e-6, atol=1e-6)
    assert closed.mean() == pytest.approx(1 - ratio, abs=1e-3)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_the_ranking_of_the_mask_depends_on_neither_ratio_nor_penalty(seed: int) -> None:
    weight, gram = problem(seed)
    order = np.argsort(numerical(weight, gram, 0.2))
    np.testing.assert_array_equal(order, np.argsort(numerical(weight, gram, 0.7)))


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 8))
def test_the_published_compensation_equals_least_squares_on_the_kept_set(
    seed: int, count: int
) -> None:
    weight, gram = problem(seed)
    gone = np.sort(np.random.default_rng(seed).choice(12, count, replace=False))
    # dW = -(G^-1 M_p) (M_p^T G^-1 M_p)^-1 M_p^T W in the orientation of the paper.
    inverse = np.linalg.inv(gram)
    block = inverse[np.ix_(gone, gone)]
    published = weight - weight[:, gone] @ np.linalg.solve(block, inverse[gone])
    np.testing.assert_allclose(
        published, fitted(weight, gram, weight @ gram, gone, 0.0), rtol=1e-7, atol=1e-8
    )


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_predicted_losses_add_up_to_the_measured_one(seed: int, sizes: list[int]) -> None:
    weight, gram = problem(seed)
    gamma = damping(gram)
    surgeon = Surgeon(weight, gram, gamma)
    order = np.random.default_rng(seed).permutation(12)
    gone = np.split(order[: sum(sizes)], np.cumsum(sizes)[:-1])
    predicted = sum(surgeon.remove(np.sort(columns)) for columns in gone)
    damped = gram + gamma * np.eye(12)
    assert predicted == pytest.approx(loss(weight, surgeon.weight, damped), rel=1e-7)
    # What is left is the fit shrunk towards the weight.
    lost = np.sort(np.concatenate(gone))
    direct = fitted(weight, gram, weight @ gram, lost, gamma)
    np.testing.assert_allclose(surgeon.weight, direct, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_the_loss_of_a_candidate_is_what_its_removal_costs(seed: int) -> None:
    weight, gram = problem(seed)
    surgeon = Surgeon(weight, gram, damping(gram))
    pairs = np.arange(12).reshape(6, 2)
    predicted = surgeon.losses(pairs)
    least = int(predicted.argmin())
    assert surgeon.remove(pairs[least]) == pytest.approx(predicted[least], rel=1e-9)
    singles = Surgeon(weight, gram, 1e-9).losses(np.arange(12)[:, None])
    assert (singles <= wanda(weight, gram) * (1 + 1e-6)).all()


def sums(weight: np.ndarray, x: np.ndarray, target: np.ndarray) -> Sums:
    found = Sums(weight.shape[1], len(weight))
    found.add(x, target)
    return found.means()


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_a_fit_is_never_worse_on_held_out_data_than_leaving_columns_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, 10))
    x = rng.standard_normal((24, 10)) @ rng.standard_normal((10, 10))
    data = [sums(weight, part, part @ weight.T) for part in (x[:16], x[16:])]
    fit = best_fit(weight, np.zeros(5), np.array([1, 4]), data[0], data[1])
    assert fit.after <= fit.before
    assert not fit.weight[:, [1, 4]].any()


def test_errors_from_sums_equal_errors_of_vectors() -> None:
    rng = np.random.default_rng(3)
    weight, other, bias = rng.standard_normal((4, 6)), rng.standard_normal((4, 6)), rng.random(4)
    x, target = rng.standard_normal((50, 6)), rng.standard_normal((50, 4))
    direct = np.square(target - x @ other.T - bias).sum(axis=1).mean()
    assert sums(weight, x, target).error(other, bias) == pytest.approx(direct, rel=1e-5)


def test_masks_keep_everything_else() -> None:
    weight = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(masked(weight, np.array([2]))[:, [0, 1, 3]], weight[:, [0, 1, 3]])


def test_moments_without_full_rank_are_inverted_with_more_damping() -> None:
    surgeon = Surgeon(np.ones((2, 3)), np.zeros((3, 3)), 0.0)
    assert np.isfinite(surgeon.losses(np.arange(3)[:, None])).all()


def few(seed: int, count: int, rank: int) -> tuple[np.ndarray, Sums, Sums]:
    """A weight, and moments of a few vectors with `rank` independent directions and noise."""
    rng = np.random.default_rng(seed)
    weight, mixing = rng.standard_normal((6, 64)), rng.standard_normal((rank, 64))
    x = rng.standard_normal((count + 40, rank)) @ mixing + 0.1 * rng.standard_normal((1, 64))
    x += 0.05 * rng.standard_normal(x.shape)
    parts = (x[:count], x[count:])
    seen, held = (sums(weight, part, part @ weight.T) for part in parts)
    return weight, seen, held


def test_moments_of_few_vectors_are_drawn_to_their_diagonal() -> None:
    independent = [temper(*few(seed, 30, 64)) for seed in range(5)]
    related = [temper(*few(seed, 30, 4)) for seed in range(5)]
    assert min(independent) >= 0.3 > max(related)
    assert temper(*few(0, 640, 64)) == 0.0  # as many as fits trust
    weight, seen, _ = few(0, 30, 64)
    assert 0.5 < temper(weight, seen, Sums(64, 6)) < 1.0
    drawn = tempered(seen.gram, 1.0)
    np.testing.assert_array_equal(drawn, np.diag(np.diag(seen.gram)))


def test_fits_to_few_vectors_use_what_held_out_ones_allow() -> None:
    gone = np.arange(0, 64, 4)
    for seed in range(3):
        weight, seen, held = few(seed, 30, 64)
        fit = best_fit(weight, np.zeros(6), gone, seen, held)
        plain = fitted(weight, seen.gram, weight @ seen.gram, gone, damping(seen.gram))
        assert fit.used in ("mask", "bias", "fit")
        assert fit.after <= held.error(plain) / held.power


def alike(seed: int, weight: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Twenty vectors from each of some groups, alike inside of a group, and noisy targets."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((groups, weight.shape[1])), 20, axis=0)
    x = centres + 0.1 * rng.standard_normal(centres.shape)
    noise = np.repeat(rng.standard_normal((groups, len(weight))), 20, axis=0)
    return x, x @ weight.T + 3.0 * noise


def test_many_vectors_of_few_inputs_are_shrunk_further() -> None:
    """Twenty vectors for each column are few, where they come from as many inputs as columns."""
    for seed in range(3):
        weight = np.random.default_rng(seed).standard_normal((6, 32))
        parts = [alike(seed + place, weight, count) for place, count in ((10, 32), (20, 16))]
        seen, held = (sums(weight, x, target) for x, target in parts)
        gone = np.arange(0, 32, 4)
        fit = best_fit(weight, np.zeros(6), gone, seen, held)
        x, target = alike(seed + 30, weight, 64)
        fresh = sums(weight, x, target)
        bias = np.zeros(6) if fit.bias is None else fit.bias
        plain = fitted(weight, seen.gram, seen.cross, gone, damping(seen.gram))
        assert fresh.error(fit.weight, bias) < 0.9 * fresh.error(plain)
        assert temper(weight, seen, held) == 0.0 < temper(weight, seen, held, apart=True)


def test_a_bias_makes_up_for_the_mean_of_what_a_surgeon_takes() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((5, 12))
    x = rng.standard_normal((400, 12)) + 3.0
    x[:, 2] = 7.0  # says nothing that a bias could not say
    found = sums(weight, x, x @ weight.T)
    gram = found.moments_about(found.mean)
    np.testing.assert_allclose(gram, np.cov(x.T, bias=True), atol=1e-4)
    surgeon = Surgeon(weight, gram, damping(gram), mean=found.mean)
    assert surgeon.losses(np.arange(12)[:, None]).argmin() == 2
    surgeon.remove(np.array([2]))
    np.testing.assert_allclose(x @ surgeon.weight.T + surgeon.shift, x @ weight.T, atol=1e-3)
    assert not Surgeon(weight, gram, damping(gram)).shift.any()
