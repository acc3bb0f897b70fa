"""Inputs that are set aside to judge by: the vectors themselves, or sums over many of them.

Of language models there are fewer such vectors than twice the columns of a weight, and then they
take less memory than sums of their products do, and fewer operations. Of convolutions there are
many.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcomp.passes.calibration.groups import MOST_HELD, Rows
from onnxcomp.passes.calibration.residual_streams import MissingSums
from onnxcomp.passes.calibration.second_moments import Moments
from onnxcomp.passes.weight import Array, Held, HeldMoments, HeldVectors

__all__ = ["HeldOutSums"]


class HeldOutSums:
    """What is known of inputs that are set aside.

    Args:
        shape: Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups.
        lacking: Rows of the weight, where it is known what the stream behind its product lacks;
            else None.
        paired: Whether there is a reference model.
        rows: Rows of the sums that are wanted; None for all.
        threads: Threads of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        lacking: int | None = None,
        *,
        paired: bool = False,
        rows: Rows | None = None,
        threads: int = 1,
    ) -> None:
        self._shape, self._lacking, self._paired = shape, lacking, paired
        self._rows, self._threads = rows, threads
        self._most = MOST_HELD * shape[-1] if len(shape) == 1 else 0
        self._count = 0
        # Inputs, those of the reference model, and what the stream lacks beside them.
        self._vectors: list[tuple[Array, Array | None, Array | None]] = []
        self._moments: Moments | None = None
        self._missing: MissingSums | None = None
        self.finite = True

    def add(self, x: Array, reference: Array | None, lost: Array | None) -> None:
        """Add vectors.

        Args:
            x: ``(n, *shape)``.
            reference: The same ones of the reference model.
            lost: What the stream lacks, ``(n, rows)``; None where that is not known.
        """
        self._count += len(x)
        if self._moments is None and self._count > self._most:
            self._sum_up()
        with np.errstate(over="ignore", invalid="ignore"):
            if self._moments is not None:
                self._add(x, reference, lost)
                self.finite = self._moments.finite
                return
            inputs = np.array(x, np.float32)
            self._vectors.append((inputs, _copy(reference), _copy(lost)))
        self.finite = self.finite and bool(np.isfinite(inputs).all())

    def _sum_up(self) -> None:
        """Go over from vectors to sums."""
        some = None if self._rows is None else self._rows.moments
        paired, threads = self._paired, self._threads
        self._moments = Moments(
            self._shape, cross=paired, reference=paired, rows=some, threads=threads
        )
        if self._lacking is not None:
            some = None if self._rows is None else self._rows.lack
            extent = (self._lacking, self._shape[-1])
            self._missing = MissingSums(*extent, held=True, some=some, threads=threads)
        for vectors in self._vectors:
            self._add(*vectors)
        self._vectors = []

    def _add(self, x: Array, reference: Array | None, lost: Array | None) -> None:
        assert self._moments is not None
        self._moments.add(x, reference)
        if self._missing is not None and reference is not None:
            self._missing.add(lost, x, reference)

    def cut(self) -> None:
        """Leave out the rows that are not wanted, and vectors where they are not."""
        if self._rows is not None and not self._rows.vectors:
            self._vectors = []
        for part in (self._moments, self._missing):
            if part is not None:
                part.cut()

    def join(self, others: Sequence[HeldOutSums]) -> None:
        """Take the rows of others that have been cut, all of the same vectors."""
        self._count = others[0]._count
        self._vectors = [found for other in others for found in other._vectors]
        if others[0]._moments is not None:
            self._sum_up()
            assert self._moments is not None
            self._moments.join([o._moments for o in others if o._moments is not None])
        if self._missing is not None:
            self._missing.join([o._missing for o in others if o._missing is not None])

    def held(self, *, means: bool) -> Held | None:
        """What is known, when all is there; None where nothing was set aside.

        Args:
            means: Whether means are wanted as well, where they cannot be found from the rest.
        """
        if not self._count:
            return None
        if self._moments is not None:
            self._moments.close()
            missing = None if self._missing is None else self._missing.means()
            return HeldMoments(
                self._moments.square,
                self._moments.cross,
                self._moments.reference,
                missing,
                self._moments.means if means else None,
            )
        inputs, reference, lost = zip(*self._vectors, strict=True)
        self._vectors = []
        return HeldVectors(np.concatenate(inputs), _joined(reference), _joined(lost))


def _copy(array: Array | None) -> Array | None:
    return None if array is None else np.array(array, np.float32)


def _joined(parts: Sequence[Array | None]) -> Array | None:
    """All parts; None where one is missing."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
