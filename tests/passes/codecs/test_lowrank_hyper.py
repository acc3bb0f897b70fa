"""Low-rank factors in few bits: what they lose is known, and the second mends the first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.lowrank.lowrank_hyper import LowRankHyperCodec, LowRankHyperParams
from onnxcomp.passes.codecs.lowrank.lowrank_int import LowRankIntCodec, LowRankIntParams
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.weight import Array, Stats, WeightSite

SiteMaker = Callable[..., WeightSite]
CODEC = LowRankHyperCodec()


def weight_of(rows: int, length: int, rank: int, noise: float = 0.1) -> Array:
    rng = np.random.default_rng(0)
    product = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, length))
    weight = product / np.sqrt(rank) + noise * rng.standard_normal((rows, length))
    return weight.astype(np.float32)


def stats_of(site: WeightSite) -> Stats:
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((site.length,) * 2) * np.geomspace(3.0, 0.1, site.length)
    x = rng.standard_normal((4000, site.length)) @ mixing.T
    return Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))


def test_measured_errors_are_near_those_of_the_encoded_weight(make_site: SiteMaker) -> None:
    site, weight = make_site(160, 224), weight_of(160, 224, 24)
    params = CODEC.candidates(site)
    for item, expected in zip(params, CODEC.measure(site, weight, params), strict=True):
        decoded = CODEC.decode(site, CODEC.encode(site, weight, item))
        error = float(np.linalg.norm(decoded - weight) / np.linalg.norm(weight))
        # Two bits for directions far below the others' noise do worse than the estimate.
        assert (
            0.98 * expected
            < error
            < (1.02 if item.rank <= 64 and item.bits > 2 else 1.3) * expected
        )


def test_errors_of_factors_in_integers_are_near_the_measured_ones(make_site: SiteMaker) -> None:
    codec, site, weight = LowRankIntCodec(), make_site(160, 224), weight_of(160, 224, 24)
    params = codec.candidates(site)
    assert {(item.bits, item.block) for item in params} == {(8, 32), (8, 128), (4, 32), (4, 128)}
    for item, expected in zip(params, codec.measure(site, weight, params), strict=True):
        decoded = codec.decode(site, codec.encode(site, weight, item))
        error = float(np.linalg.norm(decoded - weight) / np.linalg.norm(weight))
        # Small directions in a block with large ones do worse than the estimate in 4 bits.
        assert (
            0.98 * expected
            < error
            < (1.05 if item.rank == 32 or item.bits == 8 else 1.5) * expected
        )


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"block": 48}, {"rank": 0}])
def test_integers_there_are_not_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="int"):
        LowRankIntCodec().check(LowRankIntParams(**wrong))


def test_calibration_lowers_the_error_of_products(make_site: SiteMaker) -> None:
    site, weight = make_site(96, 128), weight_of(96, 128, 96)
    stats, params = stats_of(site), LowRankHyperParams(64, 3)
    plain = CODEC.decode(site, CODEC.encode(site, weight, params))
    fitted = CODEC.decode(site, CODEC.encode_calibrated(site, weight, params, stats))
    assert output_error(weight, fitted, stats.gram) < 0.7 * output_error(weight, plain, stats.gram)


def test_fitting_the_second_factor_makes_up_for_a_part_of_the_first_ones_noise(
    make_site: SiteMaker,
) -> None:
    site, weight = make_site(128, 96), weight_of(128, 96, 64, noise=0.0)
    params = LowRankHyperParams(64, 2)
    payload = CODEC.encode(site, weight, params)
    error = np.linalg.norm(CODEC.decode(site, payload) - weight) / np.linalg.norm(weight)
    hyper, coding = HyperCodec(), HyperParams(2)
    noise = sum(hyper.predict(make_site(*shape), coding) ** 2 for shape in ((64, 96), (128, 64)))
    assert error < 0.95 * np.sqrt(noise)


def test_a_weight_of_low_rank_is_better_off_than_with_all_its_ranks(make_site: SiteMaker) -> None:
    site, weight = make_site(256, 256), weight_of(256, 256, 30, noise=0.01)
    hyper = HyperCodec()
    whole = hyper.decode(site, hyper.encode(site, weight, HyperParams(2)))
    params = LowRankHyperParams(32, 6, 8)
    assert CODEC.size(site, params) < hyper.size(site, HyperParams(2))
    thin = CODEC.decode(site, CODEC.encode(site, weight, params))
    assert np.linalg.norm(thin - weight) < 0.3 * np.linalg.norm(whole - weight)


@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_below_one_are_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=f"rank={rank}"):
        CODEC.check(LowRankHyperParams(rank))


def test_a_full_rank_is_refused_with_the_codec_that_stores_it(make_site: SiteMaker) -> None:
    with pytest.raises(UsageError, match="rank=64") as caught:
        CODEC.encode(make_site(64, 96), weight_of(64, 96, 8), LowRankHyperParams(64))
    assert "hyper" in (caught.value.hint or "")


def test_weights_that_have_no_lower_rank_to_offer_are_refused(make_site: SiteMaker) -> None:
    assert CODEC.refuse(make_site(32, 500)) == "32 x 500 has no rank of 32 below its own"
    with pytest.raises(UsageError, match="bits=9"):
        CODEC.check(LowRankHyperParams(32, 9))


def test_damaged_payloads_are_value_errors(make_site: SiteMaker) -> None:
    site = make_site(64, 96)
    payload = CODEC.encode(site, weight_of(64, 96, 8), LowRankHyperParams(32))
    tensors = {**payload.tensors, "right.codes": payload.tensors["right.codes"][0]}
    for broken in (
        type(payload)(tensors, payload.shared, payload.attributes),
        type(payload)(payload.tensors, {}, payload.attributes),
        type(payload)(payload.tensors, payload.shared, {**payload.attributes, "left_group": 5}),
        type(payload)(payload.tensors, payload.shared, {**payload.attributes, "right_extent": 5}),
    ):
        with pytest.raises(ValueError, match=r"fit|table|pair"):
            CODEC.decode(site, broken)
