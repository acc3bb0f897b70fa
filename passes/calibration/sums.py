"""Sums over the vectors that the products of one group of weights read.

Rows of these sums can be summed up apart: others do so for some of them, and what is joined is the
same bit for bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.im2col import patches
from onnxcomp.passes.calibration.notices import warn_of_few_vectors
from onnxcomp.passes.calibration.residual_streams import (
    MissingSums,
    missing_vectors,
    token_scales,
)
from onnxcomp.passes.calibration.second_moments import add_products, mirror, stripes
from onnxcomp.passes.calibration.sources import Source
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.weight import Array, Means, Stats, WeightSite

__all__ = ["HELD_OUT", "Group", "Rows", "Sums", "scales_of"]

# One input in ten is held out to judge by.
HELD_OUT = 10

# Input vectors multiplied at a time, in float32; sums of these products are float64.
_CHUNK = 4096


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
    """

    moments: slice
    missing: slice

    @classmethod
    def cut(cls, group: Group, count: int) -> list[Rows]:
        """Rows of a group for so many who sum up, of about equal work."""
        # Half of each symmetric matrix is summed up, and a tenth of the vectors is held out: of
        # those there are two symmetric matrices of three, of the others one of two if any.
        slope = 2.4 / 2.2 if group.paired else 1e3
        moments = stripes(group.site.length, count, slope=slope)
        missing = [] if group.stream is None else stripes(group.site.rows, count)
        pairs = itertools.zip_longest(moments, missing, fillvalue=slice(0, 0))
        return [cls(*pair) for pair in pairs]


class _Moments:
    """Sums over input vectors.

    Args:
        shape: Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups.
        cross: Whether there is a reference model.
        reference: Whether the moments of its inputs are wanted, too.
        means: Whether means are all that is wanted; second moments are empty then.
        rows: Rows of second moments that are wanted; None for all.
        threads: Threads of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        cross: bool = False,
        reference: bool = False,
        means: bool = False,
        rows: slice | None = None,
        threads: int = 1,
    ) -> None:
        square = (0, 0) if means else (*shape, shape[-1])
        self.tokens = 0
        self.sum = np.zeros(shape)
        self.square = np.zeros(square)
        self.other_sum = np.zeros(shape) if cross else None
        self.cross = np.zeros(square) if cross else None
        self.reference = np.zeros(square) if reference else None
        self._threads, self._rows = threads, rows

    def add(self, x: Array, reference: Array | None) -> None:
        """Add vectors ``(n, *shape)``; `reference` holds the same ones of another model."""
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK].astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                if self.square.size:
                    self._add(self.square, part, part, lower=True)
                self.sum += part.sum(axis=0, dtype=np.float64)
                if self.cross is not None and self.other_sum is not None and reference is not None:
                    other = reference[start : start + _CHUNK].astype(np.float32, copy=False)
                    self._add(self.cross, other, part)
                    self.other_sum += other.sum(axis=0, dtype=np.float64)
                    if self.reference is not None:
                        self._add(self.reference, other, other, lower=True)
        self.tokens += len(x)

    def _add(self, total: Array, a: Array, b: Array, *, lower: bool = False) -> None:
        add_products(total, a, b, lower=lower, rows=self._rows, threads=self._threads)

    def cut(self) -> None:
        """Leave out the rows that are not wanted."""
        if self._rows is None:
            return
        self.square = self.square[self._rows]
        self.cross = None if self.cross is None else self.cross[self._rows]
        self.reference = None if self.reference is None else self.reference[self._rows]

    def join(self, others: Sequence[_Moments]) -> None:
        """Take the rows of others that have been cut, all of the same vectors."""
        first = others[0]
        self.tokens, self.sum = first.tokens, first.sum.copy()
        self.other_sum = None if first.other_sum is None else first.other_sum.copy()
        for other in others:
            assert other._rows is not None
            for own, some in (
                (self.square, other.square),
                (self.cross, other.cross),
                (self.reference, other.reference),
            ):
                if own is not None and some is not None:
                    own[other._rows] = some

    def close(self) -> None:
        """Turn sums into means, in place, and fill what symmetry leaves to be filled."""
        for square in (self.square, self.reference):
            if square is not None:
                mirror(square)
        for total in (self.sum, self.other_sum, self.square, self.cross, self.reference):
            if total is not None:
                total /= max(1, self.tokens)

    @property
    def means(self) -> Means:
        """Means, when all is summed up."""
        return Means(self.sum, self.other_sum)

    @property
    def finite(self) -> bool:
        """Whether no NaN and no infinity went in."""
        return bool(np.isfinite(self.sum).all() and np.isfinite(self.square).all())


def _vectors(array: Array, source: Source) -> Array:
    """The vectors in a value: ``(vectors, length)``, in groups ``(vectors, groups, length)``."""
    if source.kind == "patches":
        assert source.patches is not None
        found = patches(array, source.patches)
        return found if source.groups == 1 else found.reshape(len(found), source.groups, -1)
    if source.kind == "columns":
        array = np.swapaxes(array, -1, -2)
    return np.asarray(array.reshape(-1, array.shape[-1]))


def scales_of(group: Group, exact: Mapping[str, Array], weight: Array) -> Array:
    """What vectors of an input are multiplied by, ``(n, 1)``: more where a stream's sum is small.

    Args:
        group: A group with a stream.
        exact: Values of the dense model, by name.
        weight: The weight ``(rows, length)``.
    """
    stream, rows = group.stream, group.site.rows
    assert stream is not None
    source = next(source for source in group.sources if source.kind != "stream")
    reference = _vectors(exact[source.value], source)
    values = exact[stream.value]
    if not stream.normalised or values.size != len(reference) * rows:
        return np.ones((1, 1), np.float32)
    flat = values.reshape(-1, rows).astype(np.float32, copy=False)
    return token_scales(flat, reference, weight)


class _Lost:
    """What the stream behind a weight's product lacks, summed up.

    Args:
        source: The stream.
        site: The weight.
        rows: Rows of the sums that are wanted; None for all.
        threads: Threads of the sums.
    """

    def __init__(self, source: Source, site: WeightSite, rows: slice | None, threads: int) -> None:
        self._source, self._rows = source, site.rows
        extent = (site.rows, site.length)
        self._seen = MissingSums(*extent, held=False, some=rows, threads=threads)
        self._kept = MissingSums(*extent, held=True, some=rows, threads=threads)

    def cut(self) -> None:
        """Leave out the rows that are not wanted."""
        self._seen.cut()
        self._kept.cut()

    def join(self, others: Sequence[_Lost]) -> None:
        """Take the rows of others that have been cut, all of the same vectors."""
        self._seen.join([other._seen for other in others])
        self._kept.join([other._kept for other in others])

    def add(
        self,
        values: Mapping[str, Array],
        exact: Mapping[str, Array],
        inputs: tuple[Array, Array],
        scales: Array,
        parts: Sequence[tuple[slice, bool]],
    ) -> None:
        """Add one calibration input.

        Args:
            values: Of the compressed model, by name.
            exact: Of the dense model.
            inputs: Vectors that the product reads in the two models, scaled.
            scales: What they were multiplied by.
            parts: Which of them are held back.
        """
        name = self._source.value
        lost = missing_vectors(exact[name], values[name], self._source.patches, self._rows)
        if lost is not None and len(lost) == len(inputs[0]):
            lost = lost * scales
        for part, held in parts:
            some = None if lost is None or len(lost) != len(inputs[0]) else lost[part]
            (self._kept if held else self._seen).add(some, inputs[0][part], inputs[1][part])

    def beside(self, stats: Stats) -> Stats:
        """The statistics with what is missing, where it is known for all inputs."""
        seen, kept = self._seen.means(), self._kept.means()
        if seen is None or kept is None:
            return stats
        return dataclasses.replace(stats, missing=seen, held_missing=kept)


class Sums:
    """What is summed up of the vectors that a group of weights reads.

    Args:
        group: The group.
        rows: Rows of the sums that are wanted; None for all.
        threads: Threads of the sums; the result does not depend on it.
    """

    def __init__(self, group: Group, *, rows: Rows | None = None, threads: int = 1) -> None:
        self._group = group
        some = None if rows is None else rows.moments
        paired, means = group.paired, group.means
        self._seen = _Moments(group.shape, cross=paired, means=means, rows=some, threads=threads)
        self._kept = _Moments(
            group.shape, cross=paired, reference=paired, means=means, rows=some, threads=threads
        )
        looked_up = any(source.kind == "indices" for source in group.sources)
        self._counts = np.zeros(group.site.rows) if looked_up else None
        self._lost: _Lost | None = None
        if group.stream is not None:
            missing = None if rows is None else rows.missing
            self._lost = _Lost(group.stream, group.site, missing, threads)

    def add(
        self,
        number: int,
        values: Mapping[str, Array],
        exact: Mapping[str, Array],
        scales: Array | None = None,
    ) -> None:
        """Add one calibration input.

        Args:
            number: The input, counted from 0.
            values: Values that the group reads.
            exact: The same of the reference model; empty without one.
            scales: What `scales_of` says, where there is a stream and a reference model.

        Raises:
            ModelError: Values are NaN or infinite.
        """
        site, rows = self._group.site, self._group.site.rows
        for source in self._group.sources:
            if source.kind == "stream":
                continue
            if source.kind == "indices":
                assert self._counts is not None
                self._counts += np.bincount(values[source.value].ravel() % rows, None, rows)
                continue
            x = _vectors(values[source.value], source)
            reference = _vectors(exact[source.value], source) if exact else None
            parts = self._group.parts(number, len(x))
            if self._lost is not None and reference is not None and scales is not None:
                x, reference = x * scales, reference * scales
                self._lost.add(values, exact, (x, reference), scales, parts)
            for part, held in parts:
                other = None if reference is None else reference[part]
                (self._kept if held else self._seen).add(x[part], other)
        if not (self._seen.finite and self._kept.finite):
            raise ModelError(
                f"inputs of weight {site.name!r} are NaN, infinite or too large "
                f"(calibration input {number + 1} of {self._group.inputs})",
                hint="correct the calibration data, or leave out --data",
            )

    def cut(self) -> None:
        """Leave out the rows that are not wanted, when all is summed up."""
        for part in (self._seen, self._kept, self._lost):
            if part is not None:
                part.cut()

    def join(self, others: Sequence[Sums]) -> None:
        """Take the rows of others, which have been cut: together they have all."""
        self._seen.join([other._seen for other in others])
        self._kept.join([other._kept for other in others])
        self._counts = others[0]._counts
        if self._lost is not None:
            self._lost.join([other._lost for other in others if other._lost is not None])

    def stats(self) -> Stats:
        """Means, when all is summed up."""
        site, seen, kept = self._group.site, self._seen, self._kept
        seen.close()
        kept.close()
        if seen.square.size:
            warn_of_few_vectors(site.name, seen.tokens, site.length, "full use")
        stats = Stats(
            site=site,
            tokens=seen.tokens,
            gram=seen.square,
            mean=seen.sum,
            held_out=kept.square if kept.tokens else None,
            cross=seen.cross,
            frequencies=self._counts,
            held_cross=kept.cross if kept.tokens else None,
            held_reference=kept.reference if kept.tokens else None,
        )
        if [s.kind for s in self._group.sources if s.kind != "stream"] == ["patches"]:
            own = kept.means if kept.tokens else None
            stats = dataclasses.replace(stats, means=seen.means, held_means=own)
        return stats if self._lost is None else self._lost.beside(stats)
