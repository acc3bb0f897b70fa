"""Sums over the vectors that the products of one group of weights read.

Rows of these sums can be summed up apart: others do so for some of them, and what is joined is the
same bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.groups import Group, Rows
from onnxcomp.passes.calibration.held_out import HeldOutSums
from onnxcomp.passes.calibration.im2col import patches
from onnxcomp.passes.calibration.notices import warn_of_few_vectors
from onnxcomp.passes.calibration.residual_streams import (
    MissingSums,
    missing_vectors,
    token_scales,
)
from onnxcomp.passes.calibration.second_moments import Moments
from onnxcomp.passes.calibration.sources import Source
from onnxcomp.passes.weight import Array, Stats

__all__ = ["Sums", "scales_of"]


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
        self._seen = Moments(
            group.shape, cross=group.paired, means=group.means, rows=some, threads=threads
        )
        looked_up = any(source.kind == "indices" for source in group.sources)
        self._counts = np.zeros(group.site.rows) if looked_up else None
        self._lost: MissingSums | None = None
        if group.stream is not None:
            missing = None if rows is None else rows.missing
            extent = (group.site.rows, group.site.length)
            self._lost = MissingSums(*extent, held=False, some=missing, threads=threads)
        self._kept = HeldOutSums(
            group.shape,
            group.site.rows if self._lost is not None else None,
            paired=group.paired,
            rows=rows,
            threads=threads,
        )

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
            lost = None
            if self._lost is not None and reference is not None and scales is not None:
                x, reference = x * scales, reference * scales
                lost = self._missing(values, exact, scales, len(x))
            for part, held in self._group.parts(number, len(x)):
                other = None if reference is None else reference[part]
                lack = None if lost is None else lost[part]
                if held:
                    self._kept.add(x[part], other, lack)
                    continue
                self._seen.add(x[part], other)
                if self._lost is not None and other is not None:
                    self._lost.add(lack, x[part], other)
        if not (self._seen.finite and self._kept.finite):
            raise ModelError(
                f"inputs of weight {site.name!r} are NaN, infinite or too large "
                f"(calibration input {number + 1} of {self._group.inputs})",
                hint="correct the calibration data, or leave out --data",
            )

    def _missing(
        self,
        values: Mapping[str, Array],
        exact: Mapping[str, Array],
        scales: Array,
        count: int,
    ) -> Array | None:
        """What the stream lacks beside each of so many vectors; None where that does not fit."""
        stream = self._group.stream
        assert stream is not None
        name, rows = stream.value, self._group.site.rows
        lost = missing_vectors(exact[name], values[name], stream.patches, rows)
        return None if lost is None or len(lost) != count else lost * scales

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
        site, seen = self._group.site, self._seen
        seen.close()
        if seen.square.size:
            warn_of_few_vectors(site.name, seen.tokens, site.length, "full use")
        convolved = [s.kind for s in self._group.sources if s.kind != "stream"] == ["patches"]
        stats = Stats(
            site=site,
            tokens=seen.tokens,
            gram=seen.square,
            mean=seen.sum,
            held=self._kept.held(means=convolved),
            cross=seen.cross,
            frequencies=self._counts,
            means=seen.means if convolved else None,
        )
        missing = None if self._lost is None else self._lost.means()
        if missing is None or stats.held is None or stats.held.missing is None:
            return stats.without_stream()
        return dataclasses.replace(stats, missing=missing)
