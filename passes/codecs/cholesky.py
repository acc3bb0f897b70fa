"""Factors of large positive definite matrices, and what is solved with them, in place.

LAPACK as numpy calls it copies a matrix twice, and general solvers take twice the operations. Here
nothing is held beside the matrix but a block of its columns. Products have the type of the matrix;
blocks of them are summed up in float64, as those of the moments themselves are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["divide", "factorize"]

# Columns of a block, which is also how many products are summed up in the type of the matrix.
_BLOCK = 256

# Rows of a block that are worked on together: they stay in the cache.
_ROWS = 1024


def factorize(matrix: Array) -> None:
    """Replace a positive definite matrix ``H`` by ``R``, upper triangular with ``H = R R^T``.

    Args:
        matrix: ``(n, n)``, float32 or float64. What is below the diagonal is not read, and is
            replaced by zeros.

    Raises:
        LinAlgError: It is not positive definite.
    """
    for columns in reversed(_blocks(len(matrix))):
        start = columns.start
        corner = _rest(matrix, columns, columns)
        # The upper factor is the lower one of the matrix read backwards.
        corner = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
        matrix[columns, columns] = corner
        inverse = np.linalg.inv(corner)
        for rows in _parts(start):
            matrix[rows, columns] = _rest(matrix, rows, columns) @ inverse.T
        matrix[columns, :start] = 0.0


def _rest(matrix: Array, rows: slice, columns: slice) -> Array:
    """What is left of a block when the columns behind it have been factored: float64."""
    rest = matrix[rows, columns].astype(np.float64)
    for later in _blocks(len(matrix), columns.stop):
        rest -= matrix[rows, later] @ matrix[columns, later].T
    return rest


def divide(right: Array, factor: Array) -> None:
    """Replace ``B (rows, n)`` by ``B (R R^T)^-1``.

    Args:
        right: B, of the type of the factor.
        factor: R, from `factorize`.
    """
    blocks = _blocks(len(factor))
    inverses = [np.linalg.inv(factor[part, part].astype(np.float64)) for part in blocks]
    for rows in _parts(len(right)):
        found = right[rows]
        for number in reversed(range(len(blocks))):
            own = blocks[number]
            rest = found[:, own].astype(np.float64)
            for later in blocks[number + 1 :]:
                rest -= found[:, later] @ factor[own, later].T
            found[:, own] = rest @ inverses[number].T
        for number, own in enumerate(blocks):
            rest = found[:, own].astype(np.float64)
            for earlier in blocks[:number]:
                rest -= found[:, earlier] @ factor[earlier, own]
            found[:, own] = rest @ inverses[number]


def _blocks(count: int, first: int = 0) -> list[slice]:
    return [slice(start, min(start + _BLOCK, count)) for start in range(first, count, _BLOCK)]


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
