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
    products,
    token_scales,
)
from onnxcomp.passes.calibration.second_moments import Moments
from onnxcomp.passes.calibration.sources import Source
from onnxcomp.passes.weight import Array, Means, Stats

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

    Of a product with 11,008 columns a matrix of ``length^2`` takes 0.5 GB in float32. While sums
    of float64 grow, half of one is filled for the moments, as they are symmetric, and one for the
    drift where the group is not `Group.by_rows`. What is given in the end is float32.

    Args:
        group: The group.
        weight: Its only weight ``(rows, length)``, where it is `Group.by_rows`.
        rows: Rows of the sums that are wanted; None for all.
        threads: Threads of the sums; the result does not depend on it.
    """

    def __init__(
        self,
        group: Group,
        weight: Array | None = None,
        *,
        rows: Rows | None = None,
        threads: int = 1,
    ) -> None:
        self._group, self._threads = group, threads
        self._rows = None if rows is None else rows.lack
        some = None if rows is None else rows.moments
        drifts = group.paired and not group.by_rows
        self._seen = Moments(
            group.shape, cross=drifts, means=group.means, rows=some, threads=threads
        )
        looked_up = any(source.kind == "indices" for source in group.sources)
        self._counts = np.zeros(group.site.rows) if looked_up else None
        self._lost: MissingSums | None = None
        # Whether it was known what the stream lacks, of all inputs that were added.
        self._known: set[bool] = set()
        # Who joins what others have summed up has none.
        self._columns: Array | None = None
        if group.by_rows and weight is not None:
            self._columns = np.ascontiguousarray(weight.T, np.float32)
        if group.by_rows or group.stream is not None:
            extent = (group.site.rows, group.site.length)
            self._lost = MissingSums(*extent, held=False, some=self._rows, threads=threads)
        self._kept = HeldOutSums(
            group.shape,
            None if group.stream is None else group.site.rows,
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
            if self._group.stream is not None and reference is not None and scales is not None:
                x, reference = x * scales, reference * scales
                lost = self._missing(values, exact, scales, len(x))
                self._known.add(lost is not None)
            for part, held in self._group.parts(number, len(x)):
                other = None if reference is None else reference[part]
                lack = None if lost is None else lost[part]
                (self._kept.add if held else self._add)(x[part], other, lack)
        if not (self._seen.finite and self._kept.finite):
            raise ModelError(
                f"inputs of weight {site.name!r} are NaN, infinite or too large "
                f"(calibration input {number + 1} of {self._group.inputs})",
                hint="correct the calibration data, or leave out --data",
            )

    def _add(self, x: Array, reference: Array | None, lost: Array | None) -> None:
        """Add vectors that are not held out, and what the stream lacks beside them."""
        if reference is None:
            self._seen.add(x, None)
            return
        with np.errstate(over="ignore", invalid="ignore"):
            drift = reference.astype(np.float32, copy=False) - x.astype(np.float32, copy=False)
        self._seen.add(x, drift)
        if self._lost is None:
            return
        if self._columns is not None:
            lack = products(self._columns, drift, rows=self._rows, threads=self._threads)
            lost = lack if lost is None else lack + lost
        self._lost.add(lost, x, reference)

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
        self._columns = None
        for part in (self._seen, self._kept, self._lost):
            if part is not None:
                part.cut()

    def join(self, others: Sequence[Sums]) -> None:
        """Take the rows of others, which have been cut: together they have all."""
        self._seen.join([other._seen for other in others])
        self._kept.join([other._kept for other in others])
        self._counts, self._known = others[0]._counts, others[0]._known
        if self._lost is not None:
            self._lost.join([other._lost for other in others if other._lost is not None])

    def stats(self) -> Stats:
        """Means, when all is summed up."""
        site, seen = self._group.site, self._seen
        self._columns = None
        lack = self._lack()  # its sum goes before moments are converted
        seen.close(np.float32)
        if seen.square.size:
            warn_of_few_vectors(site.name, seen.tokens, site.length, "full use")
        convolved = [s.kind for s in self._group.sources if s.kind != "stream"] == ["patches"]
        means = None
        if convolved:
            other = None if seen.other_sum is None else seen.sum + seen.other_sum
            means = Means(seen.sum, other)
        held = self._kept.held(means=convolved)
        if lack is None and held is not None:
            held = dataclasses.replace(held, missing=None)
        return Stats(
            site=site,
            tokens=seen.tokens,
            gram=seen.square,
            mean=seen.sum,
            held=held,
            drift=seen.cross,
            lack=lack,
            frequencies=self._counts,
            means=means,
        )

    def _lack(self) -> Array | None:
        """What products lack, where that is known of all inputs."""
        lost, self._lost = self._lost, None
        if len(self._known) > 1 or (self._known == {False} and not self._group.by_rows):
            return None
        return None if lost is None else lost.mean()
