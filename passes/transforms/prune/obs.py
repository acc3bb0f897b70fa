"""Removing columns of a product at the least loss, with the rest fitted again.

For ``y = W x`` with damped second moments ``H = E[x x^T] + g I``, taking out the columns S and
fitting the others again costs ``tr(W_S (H^-1_SS)^-1 W_S^T)`` (the group form of Optimal Brain
Surgeon, Hassibi and Stork 1993). After a removal both the weight and ``H^-1`` are brought up to
date, so that greedy removal sees the fitted weight. What is left is the least-squares fit shrunk
towards the original weight, the same matrix `compensate.fitted` returns.
"""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["Surgeon", "Unseen", "damping", "inverse"]

# Share of the mean diagonal of the moments that is added to it.
DAMPING = 0.01


def damping(gram: Array, share: float = DAMPING) -> float:
    """What is added to the diagonal of second moments; 1 where all inputs are zero."""
    mean = float(np.trace(gram)) / max(1, len(gram))
    return share * mean if mean > 0.0 else 1.0


def inverse(matrix: Array) -> Array:
    """Inverse of a symmetric positive definite matrix; grows the diagonal until it is one."""
    extra = 0.0
    for _ in range(5):
        try:
            np.linalg.cholesky(matrix + extra * np.eye(len(matrix)))
        except np.linalg.LinAlgError:
            extra = max(10 * extra, 1e-8 * float(np.trace(matrix)) / len(matrix) + 1e-30)
            continue
        return np.asarray(np.linalg.inv(matrix + extra * np.eye(len(matrix))))
    return np.asarray(np.linalg.pinv(matrix, hermitian=True))


# Rows or columns of a weight whose squares are summed at a time.
_ROWS = 256


class Unseen:
    """One product of whose inputs nothing is known: all are taken for alike and independent.

    What `Surgeon` says for moments ``I``, in memory of one number for each column: no column can
    make up for another one.

    Args:
        weight: ``(rows, length)``; of any width.
        alike: How many products like this one there are, such as groups of a convolution.
    """

    def __init__(self, weight: Array, alike: int = 1) -> None:
        own = np.zeros(weight.shape[1])
        turned = weight.strides[0] < weight.strides[1]  # read in the order of memory
        for start in range(0, weight.shape[turned], _ROWS):
            some = slice(start, start + _ROWS)
            part = np.asarray(weight[:, some] if turned else weight[some], np.float64)
            power = np.einsum("ij,ij->j", part, part)
            own[some if turned else slice(None)] += power
        self.energy = max(alike * float(own.sum()), 1e-30)
        self._losses = own * (1.0 + DAMPING)

    def losses(self, columns: Array) -> Array:
        """As `Surgeon.losses`."""
        return np.asarray(self._losses[columns].sum(axis=1))

    def remove(self, columns: Array) -> float:
        """As `Surgeon.remove`."""
        loss = float(self._losses[columns].sum())
        self._losses[columns] = 0.0
        return loss


class Surgeon:
    """One product while it loses columns.

    Args:
        weight: float64 ``(rows, length)``.
        gram: Second moments of the inputs, float64 ``(length, length)``.
        gamma: What is added to their diagonal.
        energy: Mean square of what losses are relative to; None for the outputs.
        mean: Mean of the inputs ``(length,)``, where a bias makes up for what it loses.
    """

    def __init__(
        self,
        weight: Array,
        gram: Array,
        gamma: float,
        energy: float | None = None,
        mean: Array | None = None,
    ) -> None:
        self.weight = weight.copy()
        self._dense: Array | None = weight if mean is not None else None
        self._mean = mean
        self._inverse = inverse(gram + gamma * np.eye(len(gram)))
        own = energy or float(np.einsum("ij,ij->", weight @ gram, weight))
        self.energy = max(own, 1e-30)

    @property
    def shift(self) -> Array:
        """What is added to the bias ``(rows,)``; zeros without a mean."""
        if self._dense is None or self._mean is None:
            return np.zeros(len(self.weight))
        return np.asarray((self._dense - self.weight) @ self._mean)

    def losses(self, columns: Array) -> Array:
        """Loss of each candidate on its own.

        Args:
            columns: Columns of each candidate, ``(candidates, columns)``.

        Returns:
            float64 ``(candidates,)``, in units of the squared output.
        """
        if columns.shape[1] == 1:
            flat = columns[:, 0]
            power = np.einsum("ij,ij->j", self.weight[:, flat], self.weight[:, flat])
            return np.asarray(power / self._inverse[flat, flat])
        blocks = self._inverse[columns[:, :, None], columns[:, None, :]]
        own = self.weight[:, columns].transpose(1, 2, 0)
        return np.asarray(np.einsum("csr,csr->c", np.linalg.solve(blocks, own), own))

    def remove(self, columns: Array) -> float:
        """Take columns out, fit the others; the loss that adds."""
        block = self._inverse[np.ix_(columns, columns)]
        across = self._inverse[columns]
        own = self.weight[:, columns]
        solved = np.linalg.solve(block, own.T)
        loss = float(np.einsum("sr,rs->", solved, own))
        self.weight -= solved.T @ across
        self._inverse -= across.T @ np.linalg.solve(block, across)
        self.weight[:, columns] = 0.0
        # Removed columns keep an inert unit so that no later block is singular.
        self._inverse[columns] = 0.0
        self._inverse[:, columns] = 0.0
        self._inverse[columns, columns] = 1.0
        return loss
