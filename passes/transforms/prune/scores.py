"""How much each candidate is worth, by rules that look at one product at a time.

`wanda`, `flap` and `numerical` follow Sun et al. (arXiv 2306.11695) in its structured form, An et
al. (arXiv 2312.11983) and "Numerical Pruning for Efficient Autoregressive Models" (arXiv
2412.12441).
A score belongs to a column of a product; the score of a candidate joins those of its columns.
"""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.transforms.prune.obs import inverse
from onnxcomp.passes.weight import Array

__all__ = ["flap", "magnitude", "mask_matrix", "newton", "numerical", "wanda"]

# Added to the diagonal of the mask problem, as a share of its mean. Without any the ranking hangs
# on noise: the condition of the matrix reaches 1e7 on trained models.
DAMP = 0.01

# Weight of the penalty on the number of kept columns, as a share of the mean diagonal.
PENALTY = 1e4


def magnitude(weight: Array) -> Array:
    """``sum_i W_ij^2`` of each column."""
    return np.asarray(np.einsum("ij,ij->j", weight, weight))


def wanda(weight: Array, gram: Array) -> Array:
    """``|W_j|^2 E[x_j^2]``: output energy a column makes on its own."""
    return np.asarray(magnitude(weight) * np.diag(gram))


def flap(weight: Array, gram: Array, mean: Array) -> Array:
    """``|W_j|^2 Var[x_j]``: what a bias cannot make up for."""
    return np.asarray(magnitude(weight) * np.maximum(np.diag(gram) - mean * mean, 0.0))


def mask_matrix(weight: Array, gram: Array, damp: float = DAMP) -> Array:
    """``A = (W^T W) o G`` with damping: the loss of a mask z is ``(1-z)^T A (1-z)``."""
    matrix = (weight.T @ weight) * gram
    scale = float(np.trace(matrix)) / max(1, len(matrix))
    return np.asarray(matrix + damp * max(scale, 1e-30) * np.eye(len(matrix)))


def numerical(
    weight: Array, gram: Array, ratio: float, *, damp: float = DAMP, steps: int = 0
) -> Array:
    """The relaxed mask of the smallest loss: one Newton step, in closed form.

    The objective ``(1-z)^T A (1-z) / 2 + l (1^T z - (1-p) D)^2 / 2`` is quadratic, so one step
    from anywhere is exact: ``z = 1 - l p D / (1 + l s) u`` with ``u = A^-1 1`` and ``s = 1^T u``.

    Args:
        weight: float64 ``(rows, D)``.
        gram: float64 ``(D, D)``.
        ratio: Share p of the columns that is to go.
        damp: See `mask_matrix`.
        steps: Newton steps as published, in the place of the closed form; 0 for that.

    Returns:
        z, float64 ``(D,)``; it may leave [0, 1].
    """
    matrix = mask_matrix(weight, gram, damp)
    penalty = PENALTY * float(np.trace(matrix)) / len(matrix)
    if steps:
        return newton(matrix, penalty, ratio, steps)
    direction = inverse(matrix).sum(axis=1)
    scale = penalty * ratio * len(matrix) / (1.0 + penalty * float(direction.sum()))
    return np.asarray(1.0 - scale * direction)


def newton(matrix: Array, penalty: float, ratio: float, steps: int) -> Array:
    """The same mask by Newton's method as published, from ``z = 1``.

    Args:
        matrix: ``A``, float64 ``(D, D)``.
        penalty: Weight l of the penalty.
        ratio: Share of the columns that is to go.
        steps: Iterations; the published count is 50, one is enough.
    """
    size = len(matrix)
    ones = np.ones(size)
    hessian = matrix + penalty * np.outer(ones, ones)
    mask = ones.copy()
    for _ in range(steps):
        gradient = matrix @ (mask - 1.0) + penalty * (mask.sum() - (1.0 - ratio) * size) * ones
        mask = mask - np.linalg.solve(hessian, gradient)
    return mask
