"""Calibrated encoding keeps errors of products small, whatever the inputs look like."""

import tracemalloc
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import CompressionError, ModelError
from onnxcomp.passes.calibration.blas_threads import one_blas_thread
from onnxcomp.passes.codecs.anchoring import anchored
from onnxcomp.passes.codecs.hyper import (
    feedback as hyper_feedback,
)
from onnxcomp.passes.codecs.hyper import (
    survivors as hyper_survivors,
)
from onnxcomp.passes.codecs.hyper.codec import (
    HyperCodec,
    HyperParams,
    native,
)
from onnxcomp.passes.codecs.hyper.feedback import Coder
from onnxcomp.passes.codecs.hyper.metric import Metric
from onnxcomp.passes.codecs.hyper.survivors import Prices
from onnxcomp.passes.codecs.hyper.tables import table
from onnxcomp.passes.codecs.moments import (
    LOOK_UPS,
    damped,
    output_error,
    with_weight_error,
)
from onnxcomp.passes.weight import Stats, Use, WeightSite

Array = npt.NDArray[Any]
CODEC = HyperCodec()


def moments_of(length: int, seed: int = 0, tokens: int = 4096) -> Array:
    """Second moments of correlated inputs with a few strong columns."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((length, length)) / np.sqrt(length) + np.eye(length)
    x = rng.standard_normal((tokens, length)) @ mixing
    x[:, rng.choice(length, 3, replace=False)] *= 6.0
    return np.asarray(x.T @ x / tokens)


def weight_of(rows: int, length: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, length)).astype(np.float32) * 0.1


def cost(weight: Array, decoded: Array, moments: Array) -> Array:
    error = weight.astype(np.float64) - decoded
    return np.asarray(((error @ moments) * error).sum(axis=1))


def both(weight: Array, coder: Coder, moments: Array) -> tuple[Array, Array]:
    """The weight after plain and after calibrated encoding."""
    plain = coder.decode(*coder.encode(weight), weight.shape)
    return plain, coder.decode(*hyper_feedback.encode(weight, coder, moments), weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_correlated_inputs_gain_much(native_library: None, bits: int) -> None:
    weight, moments = weight_of(64, 256), moments_of(256)
    plain, calibrated = both(weight, Coder(bits, 7, 64), moments)
    before, after = (output_error(weight, decoded, moments) for decoded in (plain, calibrated))
    assert after < 0.7 * before


def test_uncorrelated_inputs_lose_nothing(native_library: None) -> None:
    weight, moments = weight_of(64, 256), np.eye(256)
    plain, calibrated = both(weight, Coder(3, 7, 128), moments)
    assert cost(weight, calibrated, moments).sum() <= cost(weight, plain, moments).sum()


@given(
    bits=st.integers(1, 6),
    group=st.sampled_from([32, 64]),
    rows=st.integers(1, 40),
    length=st.integers(1, 150),
    rank=st.integers(1, 200),
)
@settings(deadline=None, max_examples=25)
def test_any_shape_and_any_rank_of_moments_can_be_encoded(
    bits: int, group: int, rows: int, length: int, rank: int
) -> None:
    if not native.available():
        pytest.skip("the encoder library is not built: set ONNXCOMP_ENCODERS_LIBRARY")
    coder = Coder(bits, 8, group)
    weight = weight_of(rows, length)
    x = np.random.default_rng(2).standard_normal((rank, length))
    moments = x.T @ x / rank
    codes, scales = hyper_feedback.encode(weight, coder, moments)
    geometry = coder.geometry(rows, length)
    assert (codes.shape, codes.dtype) == (geometry.codes_shape, np.uint8)
    assert (scales.shape, scales.dtype) == (geometry.scales_shape, np.float16)
    assert np.isfinite(coder.decode(codes, scales, (rows, length))).all()


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(
    "coder",
    [
        Coder(1, 6, 64),
        Coder(2, 7, 32),
        Coder(3, 7, 64),
        Coder(4, 7, 128),
        Coder(4, 6, 32),
        Coder(6, 8, 32),
        Coder(2, 10, 32),
        Coder(2, 8, 64, kind="structured"),
        Coder(3, 10, 32, kind="structured"),
        Coder(4, 8, 32, kind="structured"),
    ],
    ids=str,
)
def test_native_encoder_gives_the_bytes_of_the_reference(
    native_library: None, coder: Coder, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments = weight_of(19, coder.group + 9), moments_of(coder.group + 9)
    weight[3], weight[4, : coder.group] = 0, 0
    weight[5] *= 1e-7
    metric = Metric.of(moments, coder.group)
    geometry = coder.geometry(*weight.shape)
    try:
        found = [
            native.hyper_feedback(
                weight, geometry, metric, coder.code, sweeps=1, threads=threads, isa=isa
            )
            for threads in (1, 4)
        ]
    except CompressionError:
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setattr(native, "available", lambda: False)
    codes, scales = hyper_feedback.encode(weight, coder, moments)
    for other in found:
        np.testing.assert_array_equal(other[0], codes)
        np.testing.assert_array_equal(other[1], scales)


def test_calls_for_some_rows_at_a_time_give_the_same_bytes(
    native_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moments, coder = weight_of(50, 96), moments_of(96), Coder(3, 7, 32)
    whole = hyper_feedback.encode(weight, coder, moments)
    monkeypatch.setattr(native, "_WEIGHTS_AT_ONCE", 16 * 96)
    monkeypatch.setattr(hyper_feedback, "_CHUNK", 16 * 96)
    np.testing.assert_array_equal(hyper_feedback.encode(weight, coder, moments)[0], whole[0])
    monkeypatch.setattr(native, "available", lambda: False)
    np.testing.assert_array_equal(hyper_feedback.encode(weight, coder, moments)[0], whole[0])


def test_weights_that_are_too_large_are_refused(native_library: None) -> None:
    with pytest.raises(ModelError, match="float16"):
        hyper_feedback.encode(weight_of(16, 64) * 1e6, Coder(4, 7, 64), moments_of(64))


def test_the_metric_adds_up_to_the_objective() -> None:
    length, group = 80, 32
    moments, error = moments_of(length), weight_of(5, length)
    metric = Metric.of(moments, group)
    padded = np.zeros((5, metric.groups * group))
    padded[:, :length] = error
    # What is left of each group's error once those before it are made up for, at its price.
    left = (padded + padded @ metric.behind.T).reshape(5, metric.groups, group)
    costs = np.einsum("rgi,gij,rgj->r", left, metric.ahead, left)
    np.testing.assert_allclose(costs, cost(error, np.zeros_like(error), moments), rtol=1e-4)


def test_no_single_scale_can_be_improved(native_library: None) -> None:
    weight, moments, coder = weight_of(32, 256), moments_of(256), Coder(2, 7, 128)
    codes, scales = hyper_feedback.encode(weight, coder, moments)
    best = cost(weight, coder.decode(codes, scales, weight.shape), moments)
    for group in range(2):
        for factor in (0.98, 1.02):
            other = scales.copy()
            other[:, group] = (other[:, group] * factor).astype(np.float16)
            worse = cost(weight, coder.decode(codes, other, weight.shape), moments)
            assert (worse >= best).all()


def test_dead_columns_are_free_and_the_others_gain(native_library: None, make_site: Any) -> None:
    weight, moments = weight_of(48, 128), moments_of(128)
    dead = np.arange(0, 128, 4)
    moments[dead] = moments[:, dead] = 0.0
    site = make_site(48, 128)
    stats = Stats(site, 10_000, moments, np.zeros(128))
    params = HyperParams(3, 7, 64)
    payload = CODEC.encode_calibrated(site, weight, params, stats)
    decoded = CODEC.decode(site, payload)
    plain = CODEC.decode(site, CODEC.encode(site, weight, params))
    assert np.isfinite(decoded).all()
    assert output_error(weight, decoded, moments) < 0.7 * output_error(weight, plain, moments)


def test_inputs_that_are_all_zero_give_plain_quality(native_library: None, make_site: Any) -> None:
    weight, site = weight_of(32, 128), make_site(32, 128)
    stats = Stats(site, 1000, np.zeros((128, 128)), np.zeros(128))
    payload = CODEC.encode_calibrated(site, weight, HyperParams(), stats)
    error = np.linalg.norm(CODEC.decode(site, payload) - weight) / np.linalg.norm(weight)
    assert error < 0.08


def test_the_payload_has_the_planned_layout(native_library: None, make_site: Any) -> None:
    weight, site, params = weight_of(33, 100), make_site(33, 100), HyperParams(4, 7, 64)
    stats = Stats(site, 1000, moments_of(100), np.zeros(100))
    payload = CODEC.encode_calibrated(site, weight, params, stats)
    assert payload.nbytes == CODEC.size(site, params)
    assert dict(payload.attributes) == dict(CODEC.attributes(site, params))
    for name, layout in CODEC.layout(site, params).items():
        assert payload.tensors[name].shape == layout.shape


def test_look_ups_keep_the_weight_itself_close(native_library: None, make_site: Any) -> None:
    weight, site, params = weight_of(64, 128), make_site(64, 128), HyperParams(3, 7, 128)
    product = Stats(site, 10_000, moments_of(128), np.zeros(128))
    looked_up = Stats(site, 10_000, product.gram, product.mean, frequencies=np.ones(64))
    errors = [
        np.linalg.norm(
            CODEC.decode(site, CODEC.encode_calibrated(site, weight, params, s)) - weight
        )
        for s in (product, looked_up)
    ]
    assert errors[1] < errors[0]


def test_flat_weights_are_calibrated_where_few_rows_are_whole_groups(make_site: Any) -> None:
    for rows, length in ((64, 128), (64, 8192)):
        assert CODEC.calibration.suits(make_site(rows, length), HyperParams())
    assert CODEC.calibration.suits(make_site(128, 9, need="dense"), HyperParams())
    assert not CODEC.calibration.suits(make_site(128, 63, need="dense"), HyperParams())


def test_without_a_reference_or_with_equal_inputs_the_weight_is_the_target() -> None:
    gram, weight = moments_of(16), weight_of(10, 16)
    site: Any = None
    assert anchored(weight, Stats(site, 1000, gram, np.zeros(16))) is weight
    same = anchored(weight, Stats(site, 1000, gram, np.zeros(16), drift=np.zeros_like(gram)))
    np.testing.assert_allclose(same, weight, atol=1e-6)
    nothing = np.zeros_like(gram)
    assert anchored(weight, Stats(site, 9, nothing, np.zeros(16), drift=nothing)) is weight


def test_the_target_makes_up_for_errors_of_earlier_weights() -> None:
    rng, site = np.random.default_rng(4), cast(Any, None)
    exact = rng.standard_normal((20_000, 24)) @ (rng.standard_normal((24, 24)) / 5 + np.eye(24))
    # A loss of a third in every direction, as rounding of earlier weights may cause, and noise.
    x = exact @ (np.eye(24) * 0.7) + rng.standard_normal(exact.shape) * 0.1
    weight = weight_of(10, 24)
    drift = (exact - x).T @ x / len(x)
    stats = Stats(site, len(x), x.T @ x / len(x), np.zeros(24), drift=drift)
    wanted = exact @ weight.T
    before, after = (
        float(np.linalg.norm(x @ w.T - wanted)) for w in (weight, anchored(weight, stats))
    )
    assert after < 0.75 * before


def test_scarce_data_is_damped_more() -> None:
    gram = moments_of(16)
    site: Any = None
    least = [
        np.linalg.eigvalsh(damped(Stats(site, tokens, gram, np.zeros(16))) - gram).min()
        for tokens in (1000, 40, 1)
    ]
    assert 0 < least[0] < least[1] < least[2]


def test_errors_of_tables_count_beside_those_of_products() -> None:
    weight, moments = weight_of(10, 16), moments_of(16)
    joint = with_weight_error(moments, weight)
    assert np.trace(weight @ joint @ weight.T) == pytest.approx(
        (1 + LOOK_UPS) * np.trace(weight @ moments @ weight.T)
    )


@pytest.mark.parametrize(
    ("bits", "state_bits", "group"),
    [(1, 6, 32), (1, 8, 32), (2, 7, 64), (3, 6, 64), (4, 7, 128), (4, 12, 64), (5, 7, 32)],
)
def test_native_and_numpy_searches_find_equal_paths(
    native_library: None, bits: int, state_bits: int, group: int
) -> None:
    rng = np.random.default_rng(bits)
    values = table(bits, state_bits)
    prices = Prices.of(moments_of(group), group // 2)
    targets = (rng.standard_normal((37, group)) * values.std()).astype(np.float32)
    stems = rng.integers(0, len(values) >> bits, 37)
    wanted = hyper_survivors.search(targets, stems, prices, values, bits)
    for threads in (1, 4):
        found = native.hyper_survivors(targets, stems, prices, values, bits, threads=threads)
        np.testing.assert_array_equal(found, wanted)


def test_paths_are_cycles_through_their_stem() -> None:
    rng, values, bits = np.random.default_rng(0), table(2, 6), 2
    prices = Prices.of(moments_of(32), 0)
    stems = rng.integers(0, 16, 9)
    targets = (rng.standard_normal((9, 32)) * values.std()).astype(np.float32)
    path = hyper_survivors.search(targets, stems, prices, values, bits).astype(int)
    before = np.roll(path, 1, axis=1)
    np.testing.assert_array_equal(path & 15, before >> bits)
    np.testing.assert_array_equal(path[:, -1] >> bits, stems)


def test_the_search_lowers_what_it_is_asked_to_lower() -> None:
    rng, values, bits, group = np.random.default_rng(1), table(3, 7), 3, 64
    moments = moments_of(group)
    targets = (rng.standard_normal((20, group)) * values.std()).astype(np.float32)
    stems = np.zeros(20, np.int64)
    costs = []
    for metric in (np.eye(group), moments):
        prices = Prices.of(metric, 0)
        path = hyper_survivors.search(targets, stems, prices, values, bits)
        costs.append(cost(targets, values.astype(float)[path], moments).sum())
    assert costs[1] < 0.8 * costs[0]


def test_prices_rebuild_the_moments_they_came_from() -> None:
    moments = moments_of(32)
    prices = Prices.of(moments, 8)
    order = (8 + np.arange(32)) % 32
    rebuilt = (prices.pull * prices.prices) @ prices.pull.T
    wanted = moments[np.ix_(order, order)]
    np.testing.assert_allclose(rebuilt / rebuilt[-1, -1], wanted / wanted[-1, -1], atol=1e-4)


@pytest.mark.parametrize("extent", [(40, 160), (64, 24), (33, 128), (128, 27)])
def test_filters_that_are_stored_flat_are_calibrated(extent: tuple[int, int]) -> None:
    """Rows are no whole groups, or their padding would cost more than to read them as one."""
    rows, length = extent
    use = Use("n", "Conv", 1, "dense")
    site = WeightSite("w", (*extent, 1, 1), "float32", (use,), "", rows, length, False)
    weight, moments, params = weight_of(rows, length), moments_of(length), HyperParams(3)
    assert CODEC.calibrates(site, params)
    stats = Stats(site, 100_000, moments, np.zeros(length))
    plain = CODEC.encode(site, weight, params)
    found = CODEC.encode_calibrated(site, weight, params, stats)
    assert found.tensors["codes"].shape == plain.tensors["codes"].shape
    before, after = (
        output_error(weight, CODEC.decode(site, payload), moments) for payload in (plain, found)
    )
    assert after < 0.9 * before


@pytest.mark.parametrize("drifts", [False, True])
def test_beside_the_statistics_there_are_two_matrices_of_the_square_of_the_length(
    drifts: bool,
) -> None:
    if not native.available():
        pytest.skip("without native code rows take memory of their own")
    rows, length = 16, 2048
    site = WeightSite(
        "w", (rows, length), "float32", (Use("n", "MatMul", 1, "matmul"),), "", rows, length, False
    )
    gram = np.eye(length, dtype=np.float32)
    lack = np.full((rows, length), 0.01, np.float32)
    drift = 0.01 * gram if drifts else None
    stats = Stats(site, 100_000, gram, np.zeros(length), drift=drift, lack=lack)
    weight = weight_of(rows, length)
    tracemalloc.start()
    try:
        with one_blas_thread():
            CODEC.encode_calibrated(site, weight, HyperParams(4), stats)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * gram.nbytes  # costs of groups are the rest
