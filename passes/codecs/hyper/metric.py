"""What errors of a weight cost: the second moments of its inputs, in the forms the encoder reads.

With ``H = R R^T``, R upper triangular, the objective ``tr(E H E^T)`` is a sum over the columns in
order, each of which is judged with the errors of those before it in view (LDLQ: Chee et al., arXiv
2307.13304; the same as GPTQ: Frantar et al., arXiv 2210.17323). One factorisation of H gives it
all: no inverse of H is formed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs.cholesky import factorize
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.survivors import Prices
from onnxcomp.passes.weight import Array

__all__ = ["Metric"]

# Cost of an error on the padding of a group, in mean costs of its weights.
_PADDING = 1e-3

# How often the diagonal is raised when the moments cannot be factored.
_ESCALATIONS = 5

# Smallest pivot over the mean diagonal; below it, pivots of a singular matrix are rounding errors.
_LEAST_PIVOT = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """The objective and what follows from it, for all rows alike.

    Arrays are float32 and padded with zeros to G groups of g columns, N in all.

    Attributes:
        group: Columns of a group, g.
        moments: H ``(N, N)``.
        behind: ``(N, N)``: what an error in each column before its group asks of a column.
        inverse: Inverses of the diagonal blocks of H ``(G, g, g)``.
        ahead: Cost of each group's errors when the columns after it make up for them
            ``(G, g, g)``.
        alone: Cost of each group's errors when all other columns are fixed ``(G, g, g)``.
        pulls: `Prices.pull` of searches in each group: ahead from the first and the middle
            weight, alone from both ``(G, 4, g, g)``.
        prices: `Prices.prices` of the same ``(G, 4, g)``.
    """

    group: int
    moments: Array
    behind: Array
    inverse: Array
    ahead: Array
    alone: Array
    pulls: Array
    prices: Array

    @property
    def groups(self) -> int:
        """Number of groups, G."""
        return len(self.ahead)

    @classmethod
    def of(cls, moments: Array, group: int) -> Metric:
        """The metric of inputs with second moments ``(length, length)``.

        Moments of float32 that need no padding are taken as they are, and may be changed. Beside
        them there is one matrix of that size.
        """
        length, groups = len(moments), -(-len(moments) // group)
        found = cls.empty(groups, group, _padded(moments, groups * group))
        _factor(found.moments[:length, :length], found.behind[:length, :length])
        for index in range(groups):
            start, stop = index * group, min((index + 1) * group, length)
            # The factor's columns go where what follows from them comes to lie.
            corner = found.behind[start:stop, start:stop].astype(np.float64)
            above = found.behind[:start, start:stop]
            found.behind[start:stop, :start] = (above @ np.linalg.inv(corner)).T
            own = found.moments[start:stop, start:stop].astype(np.float64)
            found.set_costs(index, corner @ corner.T, own)
        for index in range(groups):
            start, stop = index * group, (index + 1) * group
            found.behind[start:stop, start:] = 0.0
        return found

    @classmethod
    def empty(cls, groups: int, group: int, moments: Array) -> Metric:
        """A metric of zeros but for its moments, which are padded."""
        blocks = (groups, group, group)
        return cls(
            group,
            moments=moments,
            behind=np.zeros_like(moments),
            inverse=np.zeros(blocks, np.float32),
            ahead=np.zeros(blocks, np.float32),
            alone=np.zeros(blocks, np.float32),
            pulls=np.zeros((groups, 4, group, group), np.float32),
            prices=np.zeros((groups, 4, group), np.float32),
        )

    def set_costs(self, index: int, ahead: Array, alone: Array) -> None:
        """Put in what follows from two costs of one group, float64 ``(width, width)``."""
        width = len(alone)
        self.ahead[index, :width, :width] = ahead
        self.alone[index, :width, :width] = alone
        self.inverse[index, :width, :width] = np.linalg.inv(alone)
        for number, cost in enumerate((ahead, alone)):
            rotated = _rotated(cost, self.group)
            for start in range(2):
                found = Prices.of(rotated, start * self.group // 2)
                self.pulls[index, 2 * number + start] = found.pull
                self.prices[index, 2 * number + start] = found.prices

    def searches(self, index: int, *, ahead: bool) -> tuple[Prices, Prices]:
        """Costs of both searches of one group."""
        first = 0 if ahead else 2
        return (
            Prices(0, self.pulls[index, first], self.prices[index, first]),
            Prices(self.group // 2, self.pulls[index, first + 1], self.prices[index, first + 1]),
        )


def _rotated(cost: Array, group: int) -> Array:
    """The cost of errors in table values ``(g, g)``; those on the padding cost next to nothing."""
    width = len(cost)
    whole = np.eye(group) * (float(np.trace(cost)) / width * _PADDING)
    whole[:width, :width] = cost
    turned = hyper_format.signs(group)[:, None] * hyper_format.hadamard(group)
    rotation = turned.astype(np.float64) / np.sqrt(group)
    return np.asarray(rotation.T @ whole @ rotation)


def _padded(moments: Array, size: int) -> Array:
    """Moments in float32 with zeros behind them, up to a size."""
    if len(moments) == size:
        return np.ascontiguousarray(moments, np.float32)
    found = np.zeros((size, size), np.float32)
    found[: len(moments), : len(moments)] = moments
    return found


def _factor(moments: Array, factor: Array) -> None:
    """Factor a matrix, or one near it that is positive definite and takes its place.

    Args:
        moments: The matrix.
        factor: Becomes the upper factor R.
    """
    diagonal = np.arange(len(moments))
    mean = float(np.trace(moments, dtype=np.float64)) / len(moments)
    raised = mean * 1e-6
    for _ in range(_ESCALATIONS):
        factor[:] = moments
        try:
            factorize(factor)
            if np.square(np.diag(factor)).min() >= mean * _LEAST_PIVOT:
                return
        except np.linalg.LinAlgError:
            pass  # the diagonal is raised as for pivots of rounding errors
        moments[diagonal, diagonal] += raised
        raised *= 10.0
    moments[:], factor[:] = np.eye(len(moments)) * mean, np.eye(len(moments)) * np.sqrt(mean)
