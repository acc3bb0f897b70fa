"""Sums of ``g g^T`` over gradients that come back, for all weights at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from onnxcomp.passes.calibration.filed_values import filed, let_go
from onnxcomp.passes.calibration.second_moments import add_products, mirror
from onnxcomp.passes.weight import Array

__all__ = ["HELD", "Curvature", "GradientSums"]

# Bytes of vectors that come back from samples which run together, that are held before they are
# summed up, and of sums that are not in files. What a run takes besides is in proportion to them.
HELD = 1 << 28


@dataclasses.dataclass(slots=True)
class Curvature:
    """The curvature of the loss by vectors of one kind.

    Attributes:
        moments: Mean over inputs of the sums of ``g g^T``, float64 ``(width, width)``.
        vectors: How many vectors were looked at.
    """

    moments: Array
    vectors: int


class GradientSums:
    """Sums of ``g g^T``, of all weights at once.

    Vectors are held until they are many, so that few of them do not touch all of the sums. Where
    the sums of all weights are large, they lie in files.

    Args:
        widths: Of vectors, by name of the weight.
        folder: Where the files lie.
    """

    def __init__(self, widths: Mapping[str, int], folder: Path) -> None:
        self._widths, self._folder = widths, folder
        self._large = sum(8 * width * width for width in widths.values()) > HELD
        self._held: dict[str, list[Array]] = {}
        self._bytes = 0
        self._totals: dict[str, Curvature] = {}

    def add(self, found: Iterable[tuple[str, Array]]) -> None:
        """Take in vectors ``(n, width)`` by name; a name may come several times."""
        for name, vectors in found:
            self._held.setdefault(name, []).append(vectors)
            self._bytes += vectors.nbytes
        if self._bytes > HELD:
            self._sum_up()

    def _sum_up(self) -> None:
        for name in list(self._held):
            vectors = np.concatenate(self._held.pop(name))
            total = self._totals.get(name) or self._totals.setdefault(name, self._zeros(name))
            with np.errstate(over="ignore", invalid="ignore"):
                add_products(total.moments, vectors, vectors, lower=True)
            total.vectors += len(vectors)
            let_go(total.moments)
        self._bytes = 0

    def _zeros(self, name: str) -> Curvature:
        moments = np.zeros((self._widths[name],) * 2)
        return Curvature(filed(moments, self._folder) if self._large else moments, 0)

    def means(self, count: int) -> dict[str, Curvature]:
        """Means over so many inputs, of those weights that the loss feels at all."""
        self._sum_up()
        for name, total in list(self._totals.items()):
            total.moments /= count
            mirror(total.moments)
            if not _known(total.moments):
                del self._totals[name]
            let_go(total.moments)
        return self._totals


def _known(total: Array) -> bool:
    return bool(np.isfinite(total).all()) and float(np.trace(total)) > 0.0
