"""The worst slice of an output, and detections that are found again."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.verification.detections import DetectionAgreement
from onnxcomp.passes.verification.numerics import Comparison, Sizes, metrics


def test_scores_beside_boxes_count_for_themselves() -> None:
    """One output: four numbers of hundreds, and a score below 1 that is off by 40 %."""
    rng = np.random.default_rng(0)
    reference = np.concatenate([rng.uniform(0, 640, (50, 4)), rng.uniform(0, 1, (50, 1))], axis=1)
    value = reference.copy()
    value[:, :4] *= 1.01
    value[:, 4] *= 1.4
    found = metrics(reference, value)
    assert found.rel_l2 == pytest.approx(0.01, rel=1e-3)
    assert found.worst_slice is not None
    assert (found.worst_slice.axis, found.worst_slice.indices) == (1, (4,))
    assert found.worst_slice.rel_l2 == pytest.approx(0.4, rel=1e-6)
    assert found.judged == found.worst_slice.rel_l2
    assert found.to_json()["worst_slice"] == {
        "axis": 1,
        "indices": [4],
        "rel_l2": pytest.approx(0.4),
    }


def test_many_classes_of_one_scale_are_one_slice() -> None:
    """Eighty columns of scores, one of which nothing belongs to, behind four of boxes."""
    rng = np.random.default_rng(1)
    reference = np.concatenate(
        [rng.uniform(0, 640, (1, 4, 300)), rng.uniform(0, 1, (1, 80, 300))], 1
    )
    reference[:, 9] *= 1e-3
    value = reference * 1.0
    value[:, 4:] += 0.02 * rng.standard_normal((1, 80, 300))
    found = metrics(reference, value).worst_slice
    assert found is not None and found.axis == 1
    assert found.indices == (*range(4, 9), *range(10, 84)) or len(found.indices) == 1
    scores = metrics(reference[:, 10:], value[:, 10:])
    assert scores.worst_slice is None  # one scale: the whole output says it


def test_an_axis_of_probabilities_is_not_cut() -> None:
    logits = np.random.default_rng(2).standard_normal((40, 6)) * 9
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    other = np.exp(logits * 1.1) / np.exp(logits * 1.1).sum(axis=1, keepdims=True)
    assert metrics(shares, other).worst_slice is None


def test_axes_whose_size_changes_and_free_axes_are_not_cut() -> None:
    comparison = Comparison("y", Sizes((None, 3)))
    for rows in (2, 5):
        comparison.add(np.ones((rows, 3)), np.ones((rows, 3)) * [1.0, 1.0, 1.2])
    worst = comparison.result().worst_slice
    assert worst is not None and (worst.axis, worst.indices) == (1, (2,))
    assert worst.rel_l2 == pytest.approx(0.2)
    moving = Comparison("y", Sizes((2, None)))
    for size in (3, 4):
        moving.add(np.ones((2, size)), np.ones((2, size)))
    assert moving.result().worst_slice is not None  # the first axis is fixed


def test_a_channel_that_is_empty_is_measured_by_its_neighbours() -> None:
    reference = np.ones((10, 2)) * [3.0, 0.0]
    found = metrics(reference, reference + np.array([0.0, 1e-4])).worst_slice
    assert found is not None
    assert found.rel_l2 < 0.01


def quiet_detector(scale: float, dtype: type = np.float32) -> np.ndarray:
    """What a head of four numbers of hundreds and ten classes gives where it finds nothing."""
    rng = np.random.default_rng(3)
    scores = rng.uniform(0.1, 1.0, (1, 10, 300)) * scale
    return np.concatenate([rng.uniform(100, 640, (1, 4, 300)), scores], 1).astype(dtype)


@pytest.mark.parametrize("turned", [False, True])
def test_scores_of_a_detector_that_finds_nothing_count_however_small(turned: bool) -> None:
    """Scores of 1e-7 beside boxes of 640 pixels; those of the other are off by 30 %."""
    reference = quiet_detector(1e-7)
    value = reference.copy()
    value[:, 4:] *= np.float32(1.3)
    if turned:
        reference, value = reference.transpose(0, 2, 1), value.transpose(0, 2, 1)
    comparison = Comparison("y")
    for _ in range(2):
        comparison.add(reference, value)
    found = comparison.result().worst_slice
    assert found is not None
    assert (found.axis, found.indices) == (2 if turned else 1, tuple(range(4, 14)))
    assert found.rel_l2 == pytest.approx(0.3, rel=1e-3)
    close = metrics(reference, reference * np.float32(1.001)).worst_slice
    assert close is not None and close.rel_l2 < 0.002


def test_what_is_too_small_to_tell_from_rounding_is_still_not_judged() -> None:
    reference = quiet_detector(1e-7, np.float16)  # one or two steps of the type
    value = reference.copy()
    value[:, 4:] = 0
    assert metrics(reference, value).judged < 1e-3
    nothing = quiet_detector(0.0)
    other = nothing.copy()
    other[:, 4:] = 1e-9
    assert metrics(nothing, other).judged < 1e-6
    channels = quiet_detector(1e-7) - np.float32(2e-8)  # of both signs: no scores
    noisy = channels.copy()
    noisy[:, 4:] *= -1
    assert metrics(channels, noisy).judged < 1e-6


def boxes(count: int) -> np.ndarray:
    corners = np.arange(count)[:, None] * [100.0, 0.0, 100.0, 0.0] + [0.0, 0.0, 50.0, 50.0]
    return corners[None].astype(np.float32)


def test_detections_are_found_by_box_and_class() -> None:
    scores = np.zeros((1, 20, 3), np.float32)
    scores[0, :10, 1] = 0.9
    other = scores.copy()
    other[0, 0] = [0.9, 0.1, 0.0]  # another class
    other[0, 1] = 0.0  # lost
    moved = boxes(20)
    moved[0, 2, ::2] += 40.0  # an IoU of 1/9
    moved[0, 3, ::2] += 10.0  # of 2/3
    agreement = DetectionAgreement()
    agreement.add({"boxes": boxes(20), "scores": scores}, {"boxes": moved, "scores": other})
    found = agreement.result()
    assert found is not None
    assert (found.reference, found.found, found.added) == (10, 7, 2)
    assert found.to_json()["share"] == pytest.approx(0.7)


def test_one_output_of_boxes_and_scores_is_told_either_way_round() -> None:
    scores = np.zeros((1, 20, 3), np.float32)
    scores[0, :5, 2] = 0.8
    rows = np.concatenate([boxes(20), scores], axis=2)
    for output in (rows.transpose(0, 2, 1), np.insert(rows, 4, 1.0, axis=2)):
        agreement = DetectionAgreement()
        agreement.add({"out": output}, {"out": output})
        found = agreement.result()
        assert found is not None and (found.reference, found.found) == (5, 5)


def test_other_models_have_no_detections() -> None:
    agreement = DetectionAgreement()
    agreement.add(
        {"logits": np.ones((2, 10), np.float32)}, {"logits": np.ones((2, 10), np.float32)}
    )
    assert agreement.result() is None
