"""What the inputs of a weight look like: second moments over calibration data.

A weight ``W (rows, length)`` that becomes ``W + E`` changes the outputs of its products by
``E x``, in the mean square ``tr(E G E^T)`` with ``G = E[x x^T]``. Every calibrated method works on
this one matrix. It is gathered as a stream: the model runs segment by segment, products of one
value share its matrix, and only the matrices of one such group are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import shifted
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.im2col import patches
from onnxcomp.passes.calibration.notices import warn_of_few_vectors
from onnxcomp.passes.calibration.residual_streams import (
    MissingSums,
    missing_vectors,
    token_scales,
)
from onnxcomp.passes.calibration.second_moments import add_products, mirror
from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.calibration.sources import Source, sources_of, stream_source, value_names
from onnxcomp.passes.weight import Array, Feed, Means, Shift, Stats, WeightSite

__all__ = [
    "HELD_OUT",
    "Calibration",
    "Stats",
    "collect",
    "split_batches",
]

log = logging.getLogger(__name__)


# One input in ten is held out to judge by.
HELD_OUT = 10

# Input vectors multiplied at a time, in float32; sums of these products are float64.
_CHUNK = 4096

# Samples of one input that run at a time where the batch axis can be cut.
_BATCH = 8


class _Moments:
    """Sums over input vectors.

    Args:
        shape: Of one vector: ``(length,)``, or ``(groups, length)`` for moments within groups.
        cross: Whether there is a reference model.
        reference: Whether the moments of its inputs are wanted, too.
        means: Whether means are all that is wanted; second moments are empty then.
        threads: Threads of the sums.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        cross: bool = False,
        reference: bool = False,
        means: bool = False,
        threads: int = 1,
    ) -> None:
        square = (0, 0) if means else (*shape, shape[-1])
        self.tokens = 0
        self.sum = np.zeros(shape)
        self.square = np.zeros(square)
        self.other_sum = np.zeros(shape) if cross else None
        self.cross = np.zeros(square) if cross else None
        self.reference = np.zeros(square) if reference else None
        self._threads = threads

    def add(self, x: Array, reference: Array | None) -> None:
        """Add vectors ``(n, *shape)``; `reference` holds the same ones of another model."""
        for start in range(0, len(x), _CHUNK):
            part = x[start : start + _CHUNK].astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                if self.square.size:
                    add_products(self.square, part, part, lower=True, threads=self._threads)
                self.sum += part.sum(axis=0, dtype=np.float64)
                if self.cross is not None and self.other_sum is not None and reference is not None:
                    other = reference[start : start + _CHUNK].astype(np.float32, copy=False)
                    add_products(self.cross, other, part, threads=self._threads)
                    self.other_sum += other.sum(axis=0, dtype=np.float64)
                    if self.reference is not None:
                        add_products(
                            self.reference, other, other, lower=True, threads=self._threads
                        )
        self.tokens += len(x)

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


class _Lost:
    """What the stream behind a weight's product lacks, summed up.

    Args:
        source: The stream.
        site: The weight.
        weight: Its values ``(rows, length)``.
        threads: Threads of the sums.
    """

    def __init__(self, source: Source, site: WeightSite, weight: Array, threads: int) -> None:
        self._source, self._rows, self._weight = source, site.rows, weight
        self._seen = MissingSums(site.rows, site.length, held=False, threads=threads)
        self._kept = MissingSums(site.rows, site.length, held=True, threads=threads)

    @classmethod
    def of(
        cls, model: ir.Model, site: WeightSite, sources: Sequence[Source], threads: int
    ) -> _Lost | None:
        """For the stream among the sources; None where there is none."""
        found = [source for source in sources if source.kind == "stream"]
        return cls(found[0], site, read_weight(model, site), threads) if found else None

    def scales(self, exact: Mapping[str, Array], reference: Array) -> Array:
        """What vectors are multiplied by, ``(n, 1)``: more where the sum is small."""
        stream = exact[self._source.value]
        if not self._source.normalised or stream.size != len(reference) * self._rows:
            return np.ones((1, 1), np.float32)
        flat = stream.reshape(-1, self._rows).astype(np.float32, copy=False)
        return token_scales(flat, reference, self._weight)

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


class Calibration:
    """Statistics of weights, in the order in which the model uses them.

    Weights that are replaced on the way count: what comes later is observed behind them.

    Args:
        model: The canonical model; only read.
        feeds: Inputs by name.
        sites: Weights to observe.
        reference: A model of the same structure to take `Stats.cross` from.
        streams: Whether to take `Stats.missing`, too, where there is a reference.
        convolutions: Whether convolutions are observed.
        grouped: Whether those in groups are, too, with moments within groups.
        means: Whether means are all that is wanted: second moments are empty, nothing is held back.
        folder: Where pieces of the model are written for ONNX Runtime.
        threads: Threads of the sums; the result does not depend on it.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Feed],
        sites: Sequence[WeightSite],
        *,
        reference: ir.Model | None = None,
        streams: bool = False,
        convolutions: bool = True,
        grouped: bool = False,
        means: bool = False,
        folder: Path | None = None,
        threads: int = 1,
    ) -> None:
        found = {site.name: sources_of(model, site, convolutions, grouped) for site in sites}
        if streams and reference is not None:
            for site in sites:
                sources, reason = found[site.name]
                found[site.name] = (*sources, *stream_source(model, site, sources)), reason
        self.reasons = {name: reason for name, (_, reason) in found.items() if reason}
        self._model, self._feeds, self._threads = model, list(feeds), threads
        self._means = means
        by_sources: dict[tuple[Source, ...], list[WeightSite]] = {}
        for site in sites:
            if site.name not in self.reasons:
                by_sources.setdefault(found[site.name][0], []).append(site)
        wanted = [value_names(sources) for sources in by_sources]
        self._chain = Chain(model, self._feeds, wanted, folder)
        self._dense = Chain(reference, self._feeds, wanted, folder) if reference else None
        self._groups = sorted(
            by_sources.items(), key=lambda item: self._chain.position(value_names(item[0]))
        )

    def replace(self, site: WeightSite, weight: Array) -> None:
        """Put ``(rows, length)`` in the place of a weight for all that is observed later."""
        self._chain.replace(site.name, site.stored_form(weight))

    def shift(self, shift: Shift) -> None:
        """Add a shift to its initializer for all that is observed later."""
        self._chain.replace(shift.name, shifted(self._model, shift).numpy())

    def __iter__(self) -> Iterator[tuple[tuple[WeightSite, ...], Stats]]:
        """All groups, each with its statistics.

        Raises:
            ModelError: Inputs of a weight hold NaN or infinite values.
        """
        for number, sites in enumerate(self.groups):
            yield sites, self.observe(number)

    @property
    def groups(self) -> list[tuple[WeightSite, ...]]:
        """Sites whose products read the same values, in the order of their use."""
        return [tuple(sites) for _, sites in self._groups]

    def needs(self, name: str) -> bool:
        """Whether what has not been observed still depends on an initializer."""
        return self._chain.needs(name)

    @property
    def activations(self) -> list[list[dict[str, Array]]]:
        """What is held between groups: for each model and each input, values by name."""
        return [chain.held for chain in (self._chain, self._dense) if chain is not None]

    def resume(self, number: int, activations: Sequence[Sequence[Mapping[str, Array]]]) -> None:
        """Be where another calibration with the same arguments was behind a group.

        Args:
            number: The group, counted from 0.
            activations: What it held then.
        """
        names = value_names(self._groups[number][0])
        for chain, held in zip((self._chain, self._dense), activations, strict=False):
            assert chain is not None
            chain.resume(names, held)

    def pass_by(self, number: int) -> None:
        """Run the model up to a group whose statistics are not wanted."""
        names = value_names(self._groups[number][0])
        for chain in (self._chain, self._dense):
            for _ in () if chain is None else chain.advance(names):
                pass

    def observe(self, number: int) -> Stats:
        """Statistics of a group, which follows the last one that was observed or passed by.

        The `Stats.site` is the first of the group.

        Raises:
            ModelError: Inputs of a weight hold NaN or infinite values.
        """
        sources, sites = self._groups[number]
        site = sites[0]
        paired = self._dense is not None
        groups = sources[0].groups
        shape = (site.length,) if groups == 1 else (groups, site.length)
        seen = _Moments(shape, cross=paired, means=self._means, threads=self._threads)
        kept = _Moments(
            shape, cross=paired, reference=paired, means=self._means, threads=self._threads
        )
        counts = np.zeros(site.rows) if any(s.kind == "indices" for s in sources) else None
        lost = _Lost.of(self._model, site, sources, self._threads)
        names = value_names(sources)
        found = self._chain.advance(names)
        dense = self._dense.advance(names) if self._dense else [{}] * len(self._feeds)
        for number, (values, exact) in enumerate(zip(found, dense, strict=True)):
            for source in sources:
                if source.kind == "stream":
                    continue
                if source.kind == "indices":
                    assert counts is not None
                    counts += np.bincount(values[source.value].ravel() % site.rows, None, site.rows)
                    continue
                x = _vectors(values[source.value], source)
                reference = _vectors(exact[source.value], source) if exact else None
                if lost is not None and reference is not None:
                    scales = lost.scales(exact, reference)
                    x, reference = x * scales, reference * scales
                    parts = self._parts(number, len(x))
                    lost.add(values, exact, (x, reference), scales, parts)
                for part, held in self._parts(number, len(x)):
                    other = None if reference is None else reference[part]
                    (kept if held else seen).add(x[part], other)
            if not (seen.finite and kept.finite):
                raise ModelError(
                    f"inputs of weight {site.name!r} are NaN, infinite or too large "
                    f"(calibration input {number + 1} of {len(self._feeds)})",
                    hint="correct the calibration data, or leave out --data",
                )
        stats = _stats(site, seen, kept, counts)
        if [source.kind for source in sources if source.kind != "stream"] == ["patches"]:
            own = kept.means if kept.tokens else None
            stats = dataclasses.replace(stats, means=seen.means, held_means=own)
        return stats if lost is None else lost.beside(stats)

    def _parts(self, number: int, count: int) -> tuple[tuple[slice, bool], ...]:
        """Which vectors of an input are held back.

        All of every tenth input, or of a few inputs the last tenth of each.
        """
        if self._means:
            return ((slice(None), False),)
        if len(self._feeds) >= HELD_OUT:
            return ((slice(None), number % HELD_OUT == HELD_OUT - 1),)
        cut = count - count // HELD_OUT
        return ((slice(None, cut), False), (slice(cut, None), True))


def _stats(site: WeightSite, seen: _Moments, kept: _Moments, counts: Array | None) -> Stats:
    seen.close()
    kept.close()
    if seen.square.size:
        warn_of_few_vectors(site.name, seen.tokens, site.length, "full use")
    return Stats(
        site=site,
        tokens=seen.tokens,
        gram=seen.square,
        mean=seen.sum,
        held_out=kept.square if kept.tokens else None,
        cross=seen.cross,
        frequencies=counts,
        held_cross=kept.cross if kept.tokens else None,
        held_reference=kept.reference if kept.tokens else None,
    )


def collect(
    model: ir.Model,
    feeds: Sequence[Feed],
    sites: Sequence[WeightSite],
    *,
    reference: ir.Model | None = None,
    convolutions: bool = True,
    folder: Path | None = None,
) -> Iterator[Stats]:
    """Statistics of all sites that can be observed, in the order of their use.

    Sites whose products read the same values share arrays. `unobservable` tells why a site is
    left out.

    Args:
        model: The canonical model the sites were found in.
        feeds: Inputs by name.
        sites: Weights to observe.
        reference: A model of the same structure to take `Stats.cross` from.
        convolutions: Whether convolutions are observed, with ``im2col`` vectors.
        folder: Where pieces of the model are written for ONNX Runtime.

    Raises:
        ModelError: The model does not run, or inputs of a weight hold NaN or infinite values.
    """
    calibration = Calibration(
        model, feeds, sites, reference=reference, convolutions=convolutions, folder=folder
    )
    for group, stats in calibration:
        for site in group:
            yield dataclasses.replace(stats, site=site)


def split_batches(
    feeds: Sequence[Feed], dims: Mapping[str, Sequence[Any]], *, most: int = _BATCH
) -> list[Feed]:
    """Cut inputs with many samples along a batch axis that all inputs share.

    The axis is the first one where it is free in every input, under one name, and of one size.

    Args:
        feeds: Inputs by name.
        dims: Declared sizes of each input; a name or None where a size is free.
        most: Samples of a part, at most.
    """
    first = {next(iter(sizes)) if len(sizes) else 0 for sizes in dims.values()}
    free = len(first) == 1 and not isinstance(next(iter(first)), int)
    result: list[Feed] = []
    for feed in feeds:
        sizes = {len(array) for array in feed.values()} if free else {1}
        count = next(iter(sizes)) if len(sizes) == 1 else 1
        step = most if len(feeds) >= HELD_OUT else max(1, min(most, count // HELD_OUT))
        if count <= 1:
            result.append(feed)
            continue
        for start in range(0, count, step):
            part = slice(start, start + step)
            result.append({name: array[part] for name, array in feed.items()})
    return result
