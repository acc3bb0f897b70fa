"""Trellis search for errors that are weighed together, in numpy: the definition of the native one.

The plain search (`hyper_viterbi`) weighs the errors ``e`` of a group alike. Here their cost is
``e D e^T`` with any positive definite ``D``. With ``D = U diag(d) U^T``, U unit upper triangular,
the cost of a path is a sum over its weights, ``d_t (e_t + sum_{s < t} e_s U_st)^2``: each weight is
judged against a target that the errors before it have moved. Every survivor of the search keeps
the targets its own past has led to (per-survivor processing: Raheli, Polydoros and Tzou, IEEE
Trans. Communications 43, 1995). All is float32 in a fixed order, and products are added with one
rounding, so that native code gives equal bits.

Names: states, stems and branches are those of `hyper_viterbi`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs.hyper.fused import fused
from onnxcomp.passes.weight import Array

__all__ = ["Prices", "search"]

# Cost of a forbidden start.
_FAR = np.float32(1e30)

# Floats of the survivors' targets that are worked on at a time.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """What the errors of a group cost, in the order of the search.

    Attributes:
        start: Weight with which the search begins; it goes around the group.
        pull: ``U``: by row, how an error moves the targets behind it; float32 ``(g, g)``.
        prices: ``d``, with mean 1; float32 ``(g,)``.
    """

    start: int
    pull: Array
    prices: Array

    @classmethod
    def of(cls, moments: Array, start: int) -> Prices:
        """Factor ``D`` (float64 ``(g, g)``, positive definite) for a search from `start`.

        Raises:
            numpy.linalg.LinAlgError: `moments` are not positive definite.
        """
        order = (start + np.arange(len(moments))) % len(moments)
        # The upper factor is the lower one of the matrix read backwards.
        backwards = order[::-1]
        factor = np.linalg.cholesky(moments[np.ix_(backwards, backwards)])
        root = np.diag(factor)
        pull = (factor / root)[::-1, ::-1]
        prices = np.square(root)[::-1]
        return cls(
            start,
            np.ascontiguousarray(pull, np.float32),
            np.ascontiguousarray(prices / prices.mean(), np.float32),
        )


def search(targets: Array, stems: Array, prices: Prices, table: Array, bits: int) -> Array:
    """Find the cheapest cyclic paths through given stems.

    Args:
        targets: In table units and in the order of the search, float32 ``(n, g)``.
        stems: Stem before the first weight, which is that after the last one, ``(n,)``.
        prices: The cost.
        table: int8 ``(2**state_bits,)``.
        bits: Bits per weight.

    Returns:
        States in the order of the search, uint16 ``(n, g)``.
    """
    count, group = targets.shape
    result = np.empty((count, group), np.uint16)
    step = max(1, _CHUNK // (group * (len(table) >> bits)))
    for first in range(0, count, step):
        part = slice(first, first + step)
        result[part] = _search(targets[part], stems[part], prices, table, bits)
    return result


def _search(targets: Array, stems: Array, prices: Prices, table: Array, bits: int) -> Array:
    count, group = targets.shape
    kept = len(table) >> bits
    values = table.astype(np.float32)
    origin = np.arange(len(table)) & (kept - 1)
    first_state = np.arange(kept) << bits
    rows = np.arange(count)
    cost = np.full((count, kept), _FAR)
    cost[rows, stems] = 0
    moved = np.repeat(targets[:, None, :], kept, axis=1)
    history = np.empty((group, count, kept), np.uint8)
    for t in range(group):
        error = moved[:, origin, t] - values
        total = fused(prices.prices[t], error * error, cost[:, origin])
        total = total.reshape(count, kept, -1)
        branch = total.argmin(axis=2)
        cost = total.min(axis=2)
        history[t] = branch
        state = first_state + branch
        made = targets[:, t, None] - values[state]
        moved = moved[rows[:, None], state & (kept - 1)]
        behind = moved[:, :, t + 1 :]
        behind[:] = fused(made[:, :, None], prices.pull[t, t + 1 :], behind)
    path = np.empty((count, group), np.uint16)
    stem = np.asarray(stems)
    for t in range(group - 1, -1, -1):
        state = (stem << bits) | history[t, rows, stem]
        path[:, t] = state
        stem = state & (kept - 1)
    return path
