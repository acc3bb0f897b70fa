"""What is set aside stays vectors where there are few, and becomes sums where there are many."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcomp.passes.calibration.groups import Rows
from onnxcomp.passes.calibration.held_out import HeldOutSums
from onnxcomp.passes.codecs.held_out import HeldOut
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Held, HeldMoments, HeldVectors, Stats, WeightSite

Array = npt.NDArray[Any]
ROWS, LENGTH = 24, 200


def parts(count: int) -> list[tuple[Array, Array, Array]]:
    """Inputs of both models and what a stream lacks, of several runs of a model."""
    rng = np.random.default_rng(1)
    exact = rng.standard_normal((count, LENGTH), np.float32)
    found = exact + np.float32(0.1) * rng.standard_normal((count, LENGTH), np.float32)
    lost = rng.standard_normal((count, ROWS), np.float32)
    cut = (np.array_split(array, 5) for array in (found, exact, lost))
    return list(zip(*cut, strict=True))


def summed(count: int, rows: Rows | None = None) -> HeldOutSums:
    sums = HeldOutSums((LENGTH,), ROWS, paired=True, rows=rows)
    for part in parts(count):
        sums.add(*part)
    sums.cut()
    return sums


def error(held: Held | None) -> float:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((ROWS, LENGTH), np.float32)
    site = WeightSite("w", weight.shape, "float32", (), "", ROWS, LENGTH, False)
    judge = HeldOut(weight, Stats(site, 1, np.eye(LENGTH), np.zeros(LENGTH), held=held))
    found = judge.error(weight + 0.1 * rng.standard_normal(weight.shape, np.float32))
    assert found is not None
    return found


@pytest.mark.parametrize("count", [2 * LENGTH, 2 * LENGTH + 1])
def test_both_forms_give_the_error_of_the_vectors(count: int) -> None:
    found, exact, lost = (np.concatenate(arrays) for arrays in zip(*parts(count), strict=True))
    held = summed(count).held(means=False)
    assert isinstance(held, HeldVectors if count == 2 * LENGTH else HeldMoments)
    assert error(held) == pytest.approx(error(HeldVectors(found, exact, lost)), rel=1e-5)


@pytest.mark.parametrize("count", [50, 1000])
def test_rows_that_are_summed_up_apart_are_the_same(count: int) -> None:
    if not native.available():
        pytest.skip("without native code rows are not summed up apart")
    cuts = [
        Rows(slice(0, 192), slice(0, ROWS), vectors=True),
        Rows(slice(192, LENGTH), slice(0, 0), vectors=False),
    ]
    joined = HeldOutSums((LENGTH,), ROWS, paired=True)
    joined.join([summed(count, rows) for rows in cuts])
    assert error(joined.held(means=False)) == error(summed(count).held(means=False))


def test_what_a_stream_lacks_is_not_known_where_it_is_not_known_once() -> None:
    sums = HeldOutSums((LENGTH,), ROWS, paired=True)
    for number, (found, exact, lost) in enumerate(parts(50)):
        sums.add(found, exact, None if number == 3 else lost)
    held = sums.held(means=False)
    assert isinstance(held, HeldVectors)
    assert held.missing is None
    assert len(held.inputs) == 50


def test_values_that_are_not_finite_are_seen_in_both_forms() -> None:
    for count in (50, 1000):
        sums = HeldOutSums((LENGTH,))
        for found, _, _ in parts(count):
            sums.add(found, None, None)
            assert sums.finite
        sums.add(np.full((1, LENGTH), np.inf, np.float32), None, None)
        assert not sums.finite
