"""Weights whose products read the same values, and parts of what is summed up of these."""

from __future__ import annotations

import dataclasses
import itertools

from onnxcomp.passes.calibration.second_moments import stripes
from onnxcomp.passes.calibration.sources import Source
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import WeightSite

__all__ = ["HELD_OUT", "Group", "Rows"]

# One input in ten is held out to judge by.
HELD_OUT = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Weights whose products read the same values.

    Attributes:
        site: The first of them.
        sources: Where the vectors come from.
        inputs: Calibration inputs.
        paired: Whether there is a reference model.
        means: Whether means are all that is wanted.
    """

    site: WeightSite
    sources: tuple[Source, ...]
    inputs: int
    paired: bool = False
    means: bool = False

    @property
    def stream(self) -> Source | None:
        """What the only product is added to, where that counts."""
        return next((source for source in self.sources if source.kind == "stream"), None)

    @property
    def divisible(self) -> bool:
        """Whether rows of its sums can be summed up apart."""
        return native.available() and not self.means and len(self.shape) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups."""
        groups = self.sources[0].groups
        return (self.site.length,) if groups == 1 else (groups, self.site.length)

    def parts(self, number: int, count: int) -> tuple[tuple[slice, bool], ...]:
        """Which vectors of an input are held back.

        All of every tenth input, or of a few inputs the last tenth of each.
        """
        if self.means:
            return ((slice(None), False),)
        if self.inputs >= HELD_OUT:
            return ((slice(None), number % HELD_OUT == HELD_OUT - 1),)
        cut = count - count // HELD_OUT
        return ((slice(None, cut), False), (slice(cut, None), True))


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of the sums of a group that are summed up apart.

    Attributes:
        moments: Of moments of its inputs.
        missing: Of what a stream lacks, by its inputs.
        vectors: Whether what is held out as vectors, of which there are no rows, goes with them.
    """

    moments: slice
    missing: slice
    vectors: bool

    @classmethod
    def cut(cls, group: Group, count: int) -> list[Rows]:
        """Rows of a group for so many who sum up, of about equal work."""
        # Half of the symmetric matrix is summed up, and all of that of both models.
        slope = 1.0 if group.paired else 1e3
        moments = stripes(group.site.length, count, slope=slope)
        missing = [] if group.stream is None else stripes(group.site.rows, count)
        pairs = itertools.zip_longest(moments, missing, fillvalue=slice(0, 0))
        return [cls(*pair, vectors=number == 0) for number, pair in enumerate(pairs)]
