"""Error metrics and tolerances."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.passes.verification.numerics import Comparison, fidelity_tolerance, metrics

FINITE = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=5),
    elements=st.floats(-1e6, 1e6, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x),
)


def test_metrics_of_a_known_pair() -> None:
    found = metrics(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    assert found.rel_l2 == pytest.approx(0.1)
    assert found.max_abs == 0.5
    assert found.snr_db == pytest.approx(20.0)
    assert found.cosine == pytest.approx((9 + 14) / (5 * math.hypot(3, 3.5)))
    assert found.agreement is None


@given(FINITE)
@settings(deadline=None)
def test_a_value_equals_itself(array: np.ndarray) -> None:
    found = metrics(array, array.copy())
    assert (found.rel_l2, found.max_abs, found.snr_db) == (0.0, 0.0, None)
    assert found.cosine == pytest.approx(1.0)


@given(FINITE, st.floats(0.01, 0.5))
@settings(deadline=None)
def test_a_scaled_value_has_the_scale_as_its_error(array: np.ndarray, part: float) -> None:
    wide = array.astype(np.float64)
    found = metrics(wide, wide * (1.0 + part))
    if array.any():
        assert found.rel_l2 == pytest.approx(part, rel=1e-6)
        assert found.cosine == pytest.approx(1.0)
        assert found.snr_db == pytest.approx(-20 * math.log10(part), abs=1e-4)
    else:
        assert found.rel_l2 == 0.0


def test_pairs_add_up_to_one_comparison() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 6, 5)).astype(np.float32)
    split = Comparison()
    split.add(a[:2], b[:2])
    split.add(a[2:], b[2:])
    assert split.result().rel_l2 == pytest.approx(metrics(a, b).rel_l2)


def test_sums_are_exact_where_float16_would_overflow() -> None:
    large = np.full(1000, 60000, np.float16)
    assert metrics(large, large * np.float16(0.5)).rel_l2 == pytest.approx(0.5)


def test_nan_counts_only_where_the_reference_has_none() -> None:
    nan, inf = math.nan, math.inf
    same = metrics(np.array([1.0, nan, inf, -inf]), np.array([1.0, nan, inf, -inf]))
    assert same.rel_l2 == 0.0
    assert same.problem == ""
    for bad in ([nan, 2.0], [inf, 2.0]):
        found = metrics(np.array([1.0, 2.0]), np.array(bad))
        assert found.rel_l2 == math.inf
        assert "1 values are NaN or infinite" in found.problem
    assert metrics(np.array([inf]), np.array([-inf])).problem
    assert metrics(np.array([nan]), np.array([1.0])).problem


def test_zero_references_have_no_relative_error_but_zero_or_infinity() -> None:
    zero = np.zeros(3)
    assert metrics(zero, zero).rel_l2 == 0.0
    assert metrics(zero, zero).cosine == 1.0
    assert metrics(zero, np.ones(3)).rel_l2 == math.inf
    assert metrics(zero, np.ones(3)).cosine == 0.0
    assert metrics(np.zeros((0, 3)), np.zeros((0, 3))).rel_l2 == 0.0


def test_shapes_and_types_must_match() -> None:
    assert metrics(np.zeros((2, 3)), np.zeros((3, 2))).problem == "shape (3, 2) instead of (2, 3)"
    found = metrics(np.zeros(2, np.float32), np.zeros(2))
    assert found.problem == "type float64 instead of float32"


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])),
        (np.array([True, True, False, True]), np.array([True, True, False, False])),
        (np.array(["a", "b", "c", "d"], object), np.array(["a", "b", "c", "x"], object)),
    ],
)
def test_what_is_no_float_is_compared_exactly(reference: np.ndarray, value: np.ndarray) -> None:
    assert metrics(reference, value).agreement == 0.75
    assert metrics(reference, value).rel_l2 > 0
    assert metrics(reference, reference).agreement == 1.0
    assert metrics(reference, reference).rel_l2 == 0.0


def test_narrow_types_are_floats() -> None:
    a = np.array([1.0, 2.0], ml_dtypes.bfloat16)
    found = metrics(a, (a * ml_dtypes.bfloat16(1.5)).astype(ml_dtypes.bfloat16))
    assert found.rel_l2 == 0.5
    assert found.agreement is None


def test_scores_of_classes_have_an_agreement_of_labels() -> None:
    scores = np.array([[1.0, 2.0], [3.0, 0.0]])
    other = np.array([[1.5, 2.0], [0.0, 3.0]])
    assert metrics(scores, other, "logits").label_agreement == 0.5
    assert metrics(scores, other, "embedding").label_agreement is None
    assert metrics(scores.reshape(2, 2, 1, 1), other.reshape(2, 2, 1, 1), "prob").label_agreement
    softmax = np.array([[0.25, 0.75], [1.0, 0.0]])
    assert metrics(softmax, softmax, "y").label_agreement == 1.0
    assert metrics(np.zeros((1, 3, 8, 8)), np.zeros((1, 3, 8, 8)), "scores").label_agreement is None


def test_json_has_no_infinities() -> None:
    found = metrics(np.zeros(1), np.ones(1)).to_json()
    assert found == {"rel_l2": None, "max_abs": 1.0, "cosine": 0.0, "snr_db": None}
    json.dumps(metrics(np.ones(2), np.ones(3)).to_json(), allow_nan=False)


def test_the_tolerance_grows_with_depth_length_and_coarser_types() -> None:
    base = fidelity_tolerance(1, 256)
    assert fidelity_tolerance(4, 256) == pytest.approx(2 * base)
    assert fidelity_tolerance(1, 1024) == pytest.approx(2 * base)
    assert base < fidelity_tolerance(1, 256, "float16") < fidelity_tolerance(1, 256, "bfloat16")
    assert fidelity_tolerance(1, 256, int8=True) > 0.01
    assert fidelity_tolerance(40, 1536) < 1e-3


def test_two_orders_of_summation_differ_less_than_the_tolerance_and_not_much_less() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 1024)).astype(np.float32)
    w = rng.standard_normal((1024, 64)).astype(np.float32)
    forwards = np.zeros((64, 64), np.float32)
    for index in range(1024):
        forwards += np.outer(x[:, index], w[index])
    difference = metrics(x @ w, forwards).rel_l2
    assert difference < fidelity_tolerance(1, 1024) < 1000 * difference


def test_values_that_leave_the_domain_where_others_do_are_a_loss() -> None:
    reference = np.array([np.nan, 3.0, 4.0], np.float32)
    found = Comparison("y")
    found.add(reference, np.array([np.nan, np.nan, 4.0], np.float32))
    assert not found.result().problem
    assert found.result().rel_l2 == pytest.approx(3 / 5)
    other = Comparison("y")
    other.add(np.array([1.0, 3.0], np.float32), np.array([1.0, np.nan], np.float32))
    assert other.result().problem
