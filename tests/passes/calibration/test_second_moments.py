"""Sums of outer products do not depend on threads, and linear algebra runs on one."""

import mmap
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcomp.errors import CompressionError
from onnxcomp.passes.calibration import blas_threads
from onnxcomp.passes.calibration.blas_threads import on_one_blas_thread, one_blas_thread
from onnxcomp.passes.calibration.second_moments import (
    Moments,
    add_products,
    mirror,
    sparse_zeros,
    stripes,
)
from onnxcomp.passes.codecs.hyper import native

Array = npt.NDArray[Any]

needs_library = pytest.mark.skipif(
    not native.available(), reason="the encoder library is not built"
)


def vectors(count: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, length)).astype(np.float32)


@needs_library
@pytest.mark.parametrize(
    ("count", "rows", "columns"), [(1, 1, 1), (300, 40, 7), (70, 200, 209), (0, 5, 3)]
)
def test_sums_are_those_of_numpy(
    count: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = vectors(count, rows), vectors(count, columns, 1)
    found, wanted = (np.ones((rows, columns)) for _ in range(2))
    add_products(found, a, b)
    np.testing.assert_allclose(found, 1 + a.astype(float).T @ b.astype(float), atol=2e-4)
    monkeypatch.setattr(native, "available", lambda: False)
    add_products(wanted, a, b)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@needs_library
@pytest.mark.parametrize("isa", native.ISAS)
def test_sums_depend_on_neither_threads_nor_instruction_set(isa: str) -> None:
    a, b = vectors(530, 250), vectors(530, 100, 1)
    wanted, found = (np.zeros((250, 100)) for _ in range(2))
    native.add_moments(wanted, a, b, lower=False)
    try:
        native.add_moments(found, a, b, lower=False, threads=3, isa=isa)
    except CompressionError:
        pytest.skip(f"this machine has no {isa}")
    np.testing.assert_array_equal(found, wanted)


@needs_library
@pytest.mark.parametrize("lower", [False, True])
def test_rows_that_are_summed_up_apart(lower: bool) -> None:
    a, b = vectors(300, 500), vectors(300, 500, 1)
    whole, found = np.zeros((500, 500)), np.zeros((500, 500))
    add_products(whole, a, b, lower=lower)
    cuts = stripes(500, 3)
    assert len(cuts) == 3 and cuts[0].start == 0 and cuts[-1].stop == 500
    assert all(one.stop == other.start for one, other in pairwise(cuts))
    for rows in cuts:
        part = np.zeros((500, 500))
        add_products(part, a, b, lower=lower, rows=rows)
        assert not part[: rows.start].any() and not part[rows.stop :].any()
        found[rows] = part[rows]
    assert np.array_equal(found, whole)


def test_the_lower_half_is_mirrored() -> None:
    a = vectors(50, 1100)
    half, whole = (np.zeros((1100, 1100)) for _ in range(2))
    add_products(half, a, a, lower=True)
    add_products(whole, a, a)
    mirror(half)
    np.testing.assert_allclose(half, whole, atol=1e-5)
    np.testing.assert_array_equal(half, half.T)


def test_linear_algebra_runs_on_one_thread_and_then_on_as_many_as_before() -> None:
    found = blas_threads._openblas()
    if found is None:
        pytest.skip("numpy came without OpenBLAS")
    count, put = found
    before = count()
    put(2)
    try:
        with pytest.raises(KeyError), one_blas_thread():
            assert count() == 1
            raise KeyError
        assert count() == 2
        assert [count() for _ in on_one_blas_thread("ab")] == [1, 1]
        assert count() == 2
    finally:
        put(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are counted by Linux")
def test_of_a_symmetric_sum_only_half_is_in_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    x = np.ones((4, 3000), np.float32)
    before, total = resident(), sparse_zeros((3000, 3000))
    add_products(total, x, x, lower=True)
    if native.available():
        assert resident() - before < 0.75 * total.nbytes
    assert total[2999, 0] == 4.0


def test_sums_in_float32_are_those_of_float64() -> None:
    x, other = (np.random.default_rng(n).standard_normal((50, 700), np.float32) for n in (1, 2))
    found = {}
    for dtype in (np.float32, np.float64):
        sums = Moments((700,), cross=True)
        sums.add(x, other)
        sums.close(dtype)
        found[dtype] = sums
    one, two = found.values()
    assert one.square.dtype == np.float32
    assert np.array_equal(one.square, two.square.astype(np.float32))
    assert np.array_equal(one.square, one.square.T)
    assert one.cross is not None and two.cross is not None
    assert np.array_equal(one.cross, two.cross.astype(np.float32))
