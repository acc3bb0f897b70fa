"""What the inputs of a weight look like: second moments over calibration data.

A weight ``W (rows, length)`` that becomes ``W + E`` changes the outputs of its products by
``E x``, in the mean square ``tr(E G E^T)`` with ``G = E[x x^T]``. Every calibrated method works on
this one matrix. It is gathered as a stream: the model runs segment by segment, products of one
value share its matrix, and only the matrices of one such group are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import shifted
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.elsewhere import Elsewhere
from onnxcomp.passes.calibration.filed_values import let_go
from onnxcomp.passes.calibration.groups import HELD_OUT, Group
from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.calibration.sources import Source, sources_of, stream_source, value_names
from onnxcomp.passes.calibration.sums import Sums, scales_of
from onnxcomp.passes.weight import Array, Feed, Shift, Stats, WeightSite
from onnxcomp.runtime.clients.patching import return_freed_memory

__all__ = [
    "HELD_OUT",
    "Calibration",
    "Stats",
    "collect",
    "split_batches",
]

log = logging.getLogger(__name__)


# Samples of one input that run at a time where the batch axis can be cut.
_BATCH = 8

# Columns from which on a matrix of ``length^2`` is among the largest things in memory. ONNX Runtime
# makes no copies of weights then, for a tenth of its time, and holds those of one model at a time.
_WIDE = 8192


class Calibration:
    """Statistics of weights, in the order in which the model uses them.

    Weights that are replaced on the way count: what comes later is observed behind them.

    Args:
        model: The canonical model; only read.
        feeds: Inputs by name.
        sites: Weights to observe.
        reference: A model of the same structure to see what inputs and products lack.
        streams: Names of weights whose products are to make up for what is missing in the stream
            that they are added to, too, where there is a reference.
        convolutions: Whether convolutions are observed.
        grouped: Whether those in groups are, too, with moments within groups.
        means: Whether means are all that is wanted: second moments are empty, nothing is held back.
        folder: Where pieces of the model are written for ONNX Runtime.
        threads: Threads of the sums; the result does not depend on it.
        elsewhere: Runs the model and sums up in other processes; None to do so here.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Feed],
        sites: Sequence[WeightSite],
        *,
        reference: ir.Model | None = None,
        streams: Collection[str] = (),
        convolutions: bool = True,
        grouped: bool = False,
        means: bool = False,
        folder: Path | None = None,
        threads: int = 1,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        found = {site.name: sources_of(model, site, convolutions, grouped) for site in sites}
        if reference is not None:
            for site in (site for site in sites if site.name in streams):
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
        self._elsewhere = elsewhere

        def chain(followed: ir.Model) -> Chain:
            runs = None if elsewhere is None else elsewhere.runs()
            return Chain(followed, self._feeds, wanted, folder, runs=runs)

        self._chain = chain(model)
        self._dense = None if reference is None else chain(reference)
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
        names, final = value_names(self._groups[number][0]), self._final(number)
        for chain in (self._chain, self._dense):
            for _ in () if chain is None else chain.advance(names, final=final):
                pass

    def _final(self, number: int) -> set[str]:
        """Values of a group that no later one reads."""
        later = (value_names(sources) for sources, _ in self._groups[number + 1 :])
        return set(value_names(self._groups[number][0])).difference(*later)

    def observe(self, number: int) -> Stats:
        """Statistics of a group, which follows the last one that was observed or passed by.

        The `Stats.site` is the first of the group.

        Raises:
            ModelError: Inputs of a weight hold NaN or infinite values.
        """
        sources, sites = self._groups[number]
        paired = self._dense is not None
        alone = len(sites) == 1
        group = Group(sites[0], sources, len(self._feeds), paired, self._means, alone)
        stats = self._sums(group, self._final(number)).stats()
        return_freed_memory()  # what the sums took, before a weight is encoded
        return stats

    def _sums(self, group: Group, final: set[str]) -> Sums:
        names = value_names(group.sources)
        wide = group.site.length >= _WIDE

        def advanced(chain: Chain) -> Iterable[dict[str, Array]]:
            return chain.advance(names, folded=not wide, final=final, apart=wide)

        found = advanced(self._chain)
        dense: Iterable[dict[str, Array]] = [{}] * len(self._feeds)
        if self._dense is not None:
            dense = advanced(self._dense)
        if wide:  # one session after the other, and none beside the sums
            found, dense = list(found), list(dense)
        if self._elsewhere is not None and group.divisible:
            return self._elsewhere.sums(group, list(found), list(dense))
        weighed = group.by_rows or group.stream is not None
        weight = read_weight(self._model, group.site) if weighed else None
        sums = Sums(group, weight, threads=self._threads)
        for number, (values, exact) in enumerate(zip(found, dense, strict=True)):
            scales = None
            if weight is not None and group.stream is not None:
                scales = scales_of(group, exact, weight)
            sums.add(number, values, exact, scales)
            for array in (*values.values(), *exact.values()):
                let_go(array)
        return sums


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
        reference: A model of the same structure to see what inputs and products lack.
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
