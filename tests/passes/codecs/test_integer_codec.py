"""The integer codec by numbers: its grid, its errors, GPTQ, and damaged payloads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.codecs.integer.grid import Grid, gptq, nibbles, rounded, unpacked
from onnxcomp.passes.codecs.moments import damped, output_error
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import Array, Stats, WeightSite

SiteMaker = Callable[..., WeightSite]

CODEC = IntegerCodec()
FLOAT = np.dtype(np.float32)


def correlated(length: int, tokens: int = 4096) -> Array:
    """Inputs whose columns depend on one another, as those of networks do."""
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((length, length)) * np.geomspace(1, 0.01, length)[:, None]
    return np.asarray(rng.standard_normal((tokens, length)) @ mixing)


@given(count=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_two_integers_share_a_byte_and_come_back(count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (3, count)).astype(np.uint8)
    packed = nibbles(codes)
    assert packed.shape == (3, -(-count // 2))
    assert np.array_equal(packed[:, 0] & 15, codes[:, 0])
    assert np.array_equal(unpacked(packed, count), codes)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_value_is_further_than_half_a_step_away(bits: int, zero_points: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((20, 256), np.float32)
    found = rounded(weight, Grid(bits, 64, zero_points, FLOAT))
    steps = np.abs(np.repeat(found.scales, 64, axis=1))
    error = np.abs(found.decode(256) - weight)
    # A zero point that is rounded itself, or a symmetric range's shorter side, costs a step.
    assert (error <= 1.01 * steps).all()
    assert np.mean(error <= 0.5001 * steps) > 0.98


def test_a_symmetric_grid_maps_the_extreme_to_its_end() -> None:
    weight = np.array([[1.0, -2.0, 0.5, 8.0]], np.float32)
    found = rounded(np.tile(weight, (1, 4)), Grid(4, 16, False, FLOAT))
    assert found.scales[0, 0] == -1.0 and found.zeros[0, 0] == 8
    assert found.decode(4)[0, 3] == 8.0


@pytest.mark.parametrize("params", [IntegerParams(b, g) for b in (4, 8) for g in (32, 128)])
def test_gptq_has_less_output_error_than_rounding(
    params: IntegerParams, make_site: SiteMaker
) -> None:
    site = make_site(48, 192)
    weight = np.random.default_rng(1).standard_normal((48, 192), np.float32)
    x = correlated(192)
    gram = x.T @ x / len(x)
    stats = Stats(site, len(x), gram, x.mean(axis=0))
    plain = CODEC.decode(site, CODEC.encode(site, weight, params))
    better = CODEC.decode(site, CODEC.encode_calibrated(site, weight, params, stats))
    assert output_error(weight, better, gram) < 0.7 * output_error(weight, plain, gram)


def test_gptq_with_inputs_that_do_not_correlate_is_rounding() -> None:
    weight = np.random.default_rng(2).standard_normal((9, 100), np.float32)
    grid = Grid(4, 32, True, FLOAT)
    one, two = gptq(weight, grid, np.eye(100)), rounded(weight, grid)
    assert np.array_equal(one.decode(100), two.decode(100))


def test_inputs_that_are_always_zero_do_no_harm(make_site: SiteMaker) -> None:
    site = make_site(8, 64)
    weight = np.random.default_rng(3).standard_normal((8, 64), np.float32)
    x = correlated(64)
    x[:, 10] = 0
    stats = Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))
    decoded = CODEC.decode(site, CODEC.encode_calibrated(site, weight, IntegerParams(), stats))
    assert np.isfinite(decoded).all() and np.isfinite(damped(stats)).all()


def test_the_measured_error_tells_outliers_from_normal_data(make_site: SiteMaker) -> None:
    site = make_site(64, 512)
    weight = np.random.default_rng(4).standard_t(2.5, (64, 512)).astype(np.float32)
    offered = CODEC.candidates(site)
    for params, guess in zip(offered, CODEC.measure(site, weight, offered), strict=True):
        decoded = CODEC.decode(site, CODEC.encode(site, weight, params))
        error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
        assert guess == pytest.approx(error, rel=1e-5)
        least = 1.1 if params.block == 16 else 1.2  # short blocks keep outliers to themselves
        assert guess > least * CODEC.predict(site, params)


def test_blocks_of_16_are_offered_beside_the_usual_ones_only(make_site: SiteMaker) -> None:
    assert IntegerParams(8, 16) in CODEC.candidates(make_site(64, 512))
    assert IntegerParams(8, 16) not in CODEC.candidates(make_site(256, 704))


def test_the_measured_error_of_products_weighs_the_inputs(make_site: SiteMaker) -> None:
    site = make_site(64, 128)
    weight = np.random.default_rng(4).standard_normal((64, 128)).astype(np.float32)
    x = correlated(128)
    stats = Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))
    (guess,) = CODEC.measure(site, weight, [IntegerParams()], stats)
    decoded = CODEC.decode(site, CODEC.encode(site, weight, IntegerParams()))
    found = np.linalg.norm(x @ (decoded - weight).T) / np.linalg.norm(x @ weight.T)
    assert guess == pytest.approx(found, rel=1e-4)


def test_short_rows_that_are_used_dense_are_read_flat(make_site: SiteMaker) -> None:
    site = make_site(64, 9, need="dense")
    assert CODEC.size(site, IntegerParams(8, 64)) == 64 * 9 + 9 * (4 + 1)
    product = make_site(64, 9)
    assert CODEC.size(product, IntegerParams(8, 16)) == 64 * (16 + 4 + 2)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [({"bits": 5}, "4 or 8"), ({"block": 48}, "16, 32"), ({"zero_points": 2}, "0 or 1")],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        CODEC.check(IntegerParams(**wrong))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 3},
        {"block": 1},
        {"block": "x"},
        {"extent": [20, 999]},
        {"extent": "no"},
        {"extent": [1]},
    ],
)
def test_a_damaged_payload_is_an_error(make_site: SiteMaker, change: dict[str, object]) -> None:
    site = make_site(20, 256)
    payload = CODEC.encode(site, np.ones((20, 256), np.float32), IntegerParams())
    damaged = Payload(payload.tensors, payload.shared, {**payload.attributes, **change})  # type: ignore[dict-item]
    with pytest.raises(ValueError):
        CODEC.decode(site, damaged)
