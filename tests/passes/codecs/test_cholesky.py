"""Large matrices are factored and divided by in place."""

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcomp.passes.calibration.blas_threads import one_blas_thread
from onnxcomp.passes.codecs.cholesky import divide, factorize

Array = npt.NDArray[Any]


def matrix_of(size: int) -> Array:
    """Moments of inputs of very different sizes, with common parts, that are a little damped."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal((2 * size, size)) * np.geomspace(10.0, 0.1, size) + 3.0
    gram = x.T @ x / len(x)
    return np.asarray(gram + np.eye(size) * 0.01 * np.trace(gram) / size)


@pytest.mark.parametrize("size", [1, 7, 256, 257, 600])
@pytest.mark.parametrize(("dtype", "exact"), [(np.float32, 3e-7), (np.float64, 1e-14)])
def test_the_product_of_the_factor_is_the_matrix(
    size: int, dtype: npt.DTypeLike, exact: float
) -> None:
    matrix = matrix_of(size)
    factor = matrix.astype(dtype)
    factorize(factor)
    assert not np.tril(factor, -1).any()
    wide = factor.astype(np.float64)
    assert np.abs(wide @ wide.T - matrix).max() < exact * np.abs(matrix).max()


@pytest.mark.parametrize("size", [1, 7, 256, 257, 1100])
def test_what_is_divided_is_what_was_multiplied(size: int) -> None:
    matrix = matrix_of(size)
    factor, wanted = matrix.copy(), np.random.default_rng(1).standard_normal((1030, size))
    factorize(factor)
    found = wanted @ matrix
    divide(found, factor)
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-9)


def test_small_eigenvalues_are_right_in_float32() -> None:
    """The smallest one is a ten thousandth of the largest."""
    matrix = matrix_of(600)
    right = np.random.default_rng(1).standard_normal((5, 600))
    factor, found = matrix.astype(np.float32), right.astype(np.float32)
    factorize(factor)
    divide(found, factor)
    wanted = np.linalg.solve(matrix, right.T).T
    assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_what_is_not_positive_definite_is_refused() -> None:
    matrix = np.eye(600, dtype=np.float32)
    matrix[300, 300] = -1.0
    with pytest.raises(np.linalg.LinAlgError):
        factorize(matrix)


def test_no_copy_is_made() -> None:
    size = 1536
    matrix = np.eye(size, dtype=np.float32) * 2
    right = np.ones((size, size), np.float32)
    tracemalloc.start()
    try:
        with one_blas_thread():
            factorize(matrix)
            divide(right, matrix)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.9 * matrix.nbytes
    assert np.allclose(right, 0.5)
