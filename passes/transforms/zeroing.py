"""Which elements of a weight become zero, and how the others make up for them.

A goal is a share of the elements, or n of every m elements of a row that are kept. Without inputs,
the smallest elements go. With the second moments ``G = E[x x^T]`` of the inputs of its products,
the columns of a weight are gone through from the left, as SparseGPT does (Frantar and Alistarh,
arXiv 2301.00774): of the columns at hand those elements go that harm the products least, and the
columns to the right take over what was lost.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs.held_out import held_out_error
from onnxcomp.passes.codecs.moments import damped
from onnxcomp.passes.weight import Array, Stats

__all__ = ["ZeroingGoal", "by_inputs", "by_size"]

# Columns that are gone through together; all patterns divide it.
_BLOCK = 128


@dataclasses.dataclass(frozen=True, slots=True)
class ZeroingGoal:
    """How many elements become zero.

    Attributes:
        share: Of all elements; 0 for a pattern.
        kept: Elements that are kept of each `of` elements of a row; 0 for a share.
        of: Elements of a group; 0 for a share.
    """

    share: float
    kept: int = 0
    of: int = 0

    @classmethod
    def of_text(cls, text: str) -> ZeroingGoal:
        """The goal that ``"0.5"`` or ``"2:4"`` stands for, as the option `sparsity` checked it."""
        if ":" not in text:
            return cls(float(text))
        kept, of = (int(part) for part in text.split(":"))
        return cls(0.0, kept, of)

    def held(self, scores: Array, first: int = 0) -> Array:
        """Which elements are kept, bool ``(rows, n)``: those with the highest scores.

        Args:
            scores: Of some columns.
            first: Columns before these: rounding is that of the whole weight.
        """
        if self.of:
            return self._held_of_groups(scores)
        held = np.ones(scores.size, bool)
        before = first * len(scores)
        gone = round(self.share * (before + scores.size)) - round(self.share * before)
        held[np.argsort(scores, axis=None, kind="stable")[:gone]] = False
        return held.reshape(scores.shape)

    def _held_of_groups(self, scores: Array) -> Array:
        rows, length = scores.shape
        wide = np.pad(scores, ((0, 0), (0, -length % self.of)), constant_values=-1.0)
        groups = wide.reshape(rows, -1, self.of)
        order = np.argsort(groups, axis=2, kind="stable")[..., : self.of - self.kept]
        held = np.ones(groups.shape, bool)
        np.put_along_axis(held, order, False, axis=2)
        return held.reshape(rows, -1)[:, :length]


def by_size(weight: Array, goal: ZeroingGoal) -> Array:
    """The weight without its smallest elements: float32 ``(rows, length)``."""
    return np.where(goal.held(np.abs(weight)), weight, np.float32(0))


def by_inputs(weight: Array, goal: ZeroingGoal, stats: Stats) -> Array:
    """The weight with zeros that harm its products least, the others changed to make up for them.

    Where that does worse on inputs that were set aside, it is `by_size`.

    Args:
        weight: float32 ``(rows, length)``.
        goal: How many elements become zero.
        stats: Second moments of the inputs.
    """
    plain, fitted = by_size(weight, goal), _swept(weight, goal, stats)
    errors = [held_out_error(weight, found, stats) for found in (plain, fitted)]
    if errors[0] is not None and errors[1] is not None and not errors[1] < errors[0]:
        return plain
    return fitted


def _swept(weight: Array, goal: ZeroingGoal, stats: Stats) -> Array:
    """The columns from left to right, errors handed on to those that follow."""
    # Row j of the factor says how columns from j on make up for an error in column j.
    factor = np.linalg.cholesky(np.linalg.inv(damped(stats))).T.astype(np.float32)
    left = np.array(weight, np.float32)
    result = np.zeros_like(left)
    for start in range(0, left.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, left.shape[1]))
        parts = left[:, block], result[:, block], factor[block, block]
        errors = _sweep_block(*parts, goal, start)
        left[:, block.stop :] -= errors @ factor[block, block.stop :]
    return result


def _sweep_block(left: Array, result: Array, factor: Array, goal: ZeroingGoal, first: int) -> Array:
    """One block, in place: ``left (rows, n)`` changes, ``result`` is filled; the errors."""
    errors = np.zeros_like(left)
    diagonal = np.diag(factor)
    step = goal.of or left.shape[1]
    for start in range(0, left.shape[1], step):
        stop = min(start + step, left.shape[1])
        scores = np.square(left[:, start:stop] / diagonal[start:stop])
        held = goal.held(scores, first + start)
        for column in range(start, stop):
            here = held[:, column - start]
            result[here, column] = left[here, column]
            errors[:, column] = np.where(here, 0, left[:, column]) / diagonal[column]
            left[:, column:] -= errors[:, column, None] * factor[column, column:]
    return errors
