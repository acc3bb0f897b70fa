"""The low-rank codec: ranks it offers and refuses, its forms, and calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.lowrank.codec import (
    LowRankCodec,
    LowRankParams,
    break_even,
    offered_ranks,
)
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.weight import Array, HeldMoments, Missing, Stats, Use, WeightSite

SiteMaker = Callable[..., WeightSite]
CODEC = LowRankCodec()


def weight_of(rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, length)).astype(np.float32)


def stats_of(site: WeightSite, tokens: int = 4000, **other: Array) -> Stats:
    rng = np.random.default_rng(5)
    scale = np.geomspace(5.0, 0.02, site.length)
    x = rng.standard_normal((tokens, site.length)) * scale @ rng.standard_normal((site.length,) * 2)
    gram = x.T @ x / tokens
    return Stats(site, tokens, gram, x.mean(axis=0), held=HeldMoments(gram), **other)


@pytest.mark.parametrize("extent", [(256, 688), (384, 384), (4096, 4096), (8, 4000), (17, 40)])
def test_ranks_offered_are_multiples_of_eight_that_pay(extent: tuple[int, int]) -> None:
    rows, length = extent
    ranks = offered_ranks(rows, length)
    assert len(ranks) <= 24
    assert all(rank % 8 == 0 and rank * (rows + length) < rows * length for rank in ranks)
    assert ranks == sorted(set(ranks), reverse=True)
    if ranks:
        assert min(ranks) == 8
        assert max(ranks) == break_even(rows, length) // 8 * 8


def test_a_weight_too_small_for_rank_eight_is_refused(make_site: SiteMaker) -> None:
    reason = CODEC.refuse(make_site(16, 16))
    assert reason == "16 x 16 has 256 weights, factors of rank 8 have 256"
    assert CODEC.candidates(make_site(16, 16)) == []


@pytest.mark.parametrize("rank", [0, -8])
def test_ranks_below_one_are_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=f"rank={rank}"):
        CODEC.check(LowRankParams(rank))


@pytest.mark.parametrize("rank", [32, 64, 1000])
def test_a_rank_that_does_not_pay_is_refused_with_the_ranks_that_do(
    make_site: SiteMaker, rank: int
) -> None:
    with pytest.raises(UsageError, match=f"rank={rank} .*64 x 64") as caught:
        CODEC.encode(make_site(64, 64), weight_of(64, 64), LowRankParams(rank))
    assert "1 to 31" in (caught.value.hint or "")


def test_measured_errors_are_those_of_the_encoded_weight(make_site: SiteMaker) -> None:
    site, weight = make_site(96, 160), weight_of(96, 4) @ weight_of(4, 160, 1)
    weight += 0.3 * weight_of(96, 160, 2)
    params = CODEC.candidates(site)
    for stats in (None, stats_of(site)):
        moments = np.eye(160) if stats is None else stats.gram
        for item, expected in zip(params, CODEC.measure(site, weight, params, stats), strict=True):
            payload = (
                CODEC.encode(site, weight, item)
                if stats is None
                else CODEC.encode_calibrated(site, weight, item, stats)
            )
            error = output_error(weight, CODEC.decode(site, payload), moments)
            # A hundredth of damping moves the optimum a little.
            assert error == pytest.approx(expected, rel=1e-4 if stats is None else 0.03)


def test_calibration_helps_on_the_inputs_there_are(make_site: SiteMaker) -> None:
    site, weight = make_site(64, 96), weight_of(64, 96)
    stats = stats_of(site)
    plain = CODEC.decode(site, CODEC.encode(site, weight, LowRankParams(16)))
    payload = CODEC.encode_calibrated(site, weight, LowRankParams(16), stats)
    fitted = CODEC.decode(site, payload)
    assert output_error(weight, fitted, stats.gram) < 0.5 * output_error(weight, plain, stats.gram)


@pytest.mark.parametrize("tokens", [1, 3, 4000])
def test_singular_moments_and_few_inputs_give_finite_factors(
    make_site: SiteMaker, tokens: int
) -> None:
    site, weight = make_site(64, 96), weight_of(64, 96)
    payload = CODEC.encode_calibrated(site, weight, LowRankParams(16), stats_of(site, tokens))
    assert all(np.isfinite(tensor).all() for tensor in payload.tensors.values())


def test_tables_that_are_looked_up_keep_their_rows_near(make_site: SiteMaker) -> None:
    site, weight = make_site(200, 64, need="gather"), weight_of(200, 64)
    bare = stats_of(site)
    counted = stats_of(site, frequencies=np.ones(200))
    errors = [
        output_error(
            weight,
            CODEC.decode(site, CODEC.encode_calibrated(site, weight, LowRankParams(16), stats)),
            np.eye(64),
        )
        for stats in (bare, counted)
    ]
    assert errors[1] < errors[0]


def test_anchoring_reaches_the_dense_outputs_from_distorted_inputs(make_site: SiteMaker) -> None:
    site, weight = make_site(48, 32), weight_of(48, 32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5000, 32))
    seen = x @ (np.eye(32) + 0.2 * rng.standard_normal((32, 32))).T
    gram = seen.T @ seen / len(x)

    def distance(drift: Array | None) -> float:
        stats = Stats(site, len(x), gram, seen.mean(axis=0), drift=drift)
        payload = CODEC.encode_calibrated(site, weight, LowRankParams(16), stats)
        return float(np.linalg.norm(seen @ CODEC.decode(site, payload).T - x @ weight.T))

    assert distance((x - seen).T @ seen / len(x)) < 0.9 * distance(None)


def test_products_and_other_uses_are_stored_in_their_own_form(make_site: SiteMaker) -> None:
    weight = weight_of(64, 96)
    product, table = make_site(64, 96), make_site(64, 96, need="gather")
    stored = CODEC.encode(product, weight, LowRankParams(16)).tensors
    assert {key: array.shape for key, array in stored.items()} == {"down": (96, 16), "up": (16, 64)}
    kept = CODEC.encode(table, weight, LowRankParams(16)).tensors
    assert {key: array.shape for key, array in kept.items()} == {
        "left": (64, 16),
        "right": (16, 96),
    }
    np.testing.assert_array_equal(stored["up"].T, kept["left"])


def test_half_precision_factors_lose_what_rounding_loses() -> None:
    use = Use("node", "MatMul", 1, "matmul")
    weight = weight_of(64, 16) @ weight_of(16, 96, 1) / 16
    for dtype, limit in (("float16", 1e-3), ("bfloat16", 8e-3)):
        site = WeightSite("w", (64, 96), dtype, (use,), "", 64, 96, False)
        payload = CODEC.encode(site, weight, LowRankParams(16))
        assert payload.nbytes == 2 * 16 * (64 + 96)
        error = output_error(weight, CODEC.decode(site, payload), np.eye(96))
        assert 0.0 < error < limit


def test_factors_that_do_not_fit_are_damaged(make_site: SiteMaker) -> None:
    site = make_site(64, 96)
    payload = CODEC.encode(site, weight_of(64, 96), LowRankParams(16))
    payload.tensors["up"].resize((64, 16), refcheck=False)
    with pytest.raises(ValueError, match="do not fit"):
        CODEC.decode(site, payload)


def test_errors_that_the_loss_does_not_feel_cost_nothing(make_site: SiteMaker) -> None:
    """The optimum for both sides loses what is left of the spectrum of ``H^1/2 W G^1/2``."""
    site, weight = make_site(48, 64), weight_of(48, 64)
    slopes = weight_of(48, 48, 7) * np.geomspace(3.0, 0.01, 48)
    curvature = (slopes @ slopes.T).astype(np.float64)
    stats = stats_of(site)
    seen = dataclasses.replace(stats, outputs=curvature)

    def loss(known: Stats) -> float:
        decoded = CODEC.decode(site, CODEC.encode_calibrated(site, weight, LowRankParams(8), known))
        error = (decoded - weight).astype(np.float64)
        return float(np.einsum("ij,ij->", curvature @ error, error @ stats.gram))

    root = np.linalg.cholesky(curvature + 1e-9 * np.eye(48)).T
    values = np.linalg.svd(root @ weight @ np.linalg.cholesky(stats.gram), compute_uv=False)
    least = float(np.square(values[8:]).sum())
    assert loss(seen) < 0.8 * loss(stats)
    assert loss(seen) == pytest.approx(least, rel=0.1)
    power = float(np.square(values).sum())
    (told,) = CODEC.measure(site, weight, [LowRankParams(8)], seen)
    assert told == pytest.approx(np.sqrt(least / power), rel=0.05)


def test_what_a_stream_lacks_is_added(make_site: SiteMaker) -> None:
    site, weight = make_site(32, 40), weight_of(32, 4) @ weight_of(4, 40, 1)
    stats = stats_of(site)
    lost = weight_of(32, 3, 2) @ weight_of(3, 40, 3)
    asked = lost @ stats.gram
    missing = Missing(asked, asked, float(np.einsum("ij,ij->", asked, lost)), np.zeros(32))
    held = HeldMoments(stats.gram, stats.gram, stats.gram, missing)
    own = dataclasses.replace(stats, lack=asked, held=held)
    decoded = CODEC.decode(site, CODEC.encode_calibrated(site, weight, LowRankParams(8), own))
    assert output_error(weight + lost, decoded, stats.gram) < 0.2
    assert output_error(weight, decoded, stats.gram) > 0.3
