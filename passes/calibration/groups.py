"""Weights whose products read the same values, and parts of what is summed up of these."""

from __future__ import annotations

import dataclasses
import itertools

from onnxcomp.passes.calibration.second_moments import stripes
from onnxcomp.passes.calibration.sources import Source
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import WeightSite

__all__ = ["HELD_OUT", "MOST_HELD", "Group", "Rows"]

# One input in ten is held out to judge by.
HELD_OUT = 10

# Vectors for each column up to which those that are held out are kept as they are: each error of a
# weight takes as many operations by one vector as by one row of moments.
MOST_HELD = 2

# That many of them, evenly from all, or up to twice as many, tell forms of a weight apart.
_JUDGES = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Weights whose products read the same values.

    Attributes:
        site: The first of them.
        sources: Where the vectors come from.
        inputs: Calibration inputs.
        paired: Whether there is a reference model.
        means: Whether means are all that is wanted.
        alone: Whether there is no other weight.
    """

    site: WeightSite
    sources: tuple[Source, ...]
    inputs: int
    paired: bool = False
    means: bool = False
    alone: bool = False

    @property
    def stream(self) -> Source | None:
        """What the only product is added to, where that counts."""
        return next((source for source in self.sources if source.kind == "stream"), None)

    @property
    def divisible(self) -> bool:
        """Whether rows of its sums can be summed up apart."""
        return native.available() and not self.means and len(self.shape) == 1

    @property
    def by_rows(self) -> bool:
        """Whether it is summed up what its products lack, and not how their inputs drift.

        That takes ``rows x length`` and not ``length^2``, but the weight is needed for it.
        """
        fits = len(self.shape) == 1 and self.site.experts == 1
        return self.paired and self.alone and fits and self.site.rows <= self.site.length

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups."""
        groups = self.sources[0].groups
        return (self.site.length,) if groups == 1 else (groups, self.site.length)

    def parts(self, number: int, count: int) -> tuple[tuple[slice, bool], ...]:
        """Which vectors of an input are summed up, and which are held back.

        Those of every tenth input, or of a few inputs the last tenth of each; where they are kept
        as they are, no more than are wanted.
        """
        if self.means:
            return ((slice(None), False),)
        if self.inputs >= HELD_OUT:
            held = number % HELD_OUT == HELD_OUT - 1
            step = self._step(self.inputs // HELD_OUT * count) if held else 1
            return ((slice(None, None, step), held),)
        cut = count - count // HELD_OUT
        step = self._step(self.inputs * (count - cut))
        return ((slice(None, cut), False), (slice(cut, None, step), True))

    def _step(self, count: int) -> int:
        """Of so many vectors that are held out, which ones are judged by."""
        kept = len(self.shape) == 1 and count <= MOST_HELD * self.site.length
        return max(1, count // _JUDGES) if kept else 1


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the sums of a group that are summed up apart.

    Attributes:
        moments: Of moments of its inputs.
        lack: Of what products lack, by its inputs: rows of the weight.
        vectors: Whether what is held out as vectors, of which there are no rows, goes with them.
    """

    moments: slice
    lack: slice
    vectors: bool

    @classmethod
    def cut(cls, group: Group, count: int) -> list[Rows]:
        """Rows of a group for so many who sum up, of about equal work."""
        # Half of the symmetric matrix is summed up, and all of the other one if there is one.
        slope = 1.0 if group.paired and not group.by_rows else 1e3
        moments = stripes(group.site.length, count, slope=slope)
        lacking = group.by_rows or group.stream is not None
        lack = stripes(group.site.rows, count) if lacking else []
        pairs = itertools.zip_longest(moments, lack, fillvalue=slice(0, 0))
        return [cls(*pair, vectors=number == 0) for number, pair in enumerate(pairs)]
