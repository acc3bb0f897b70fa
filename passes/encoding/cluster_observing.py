"""Calibration on the workers of a cluster: they run the model, and sum up what it gives.

Each runs it for some of the inputs, and then sums up some rows over all of them.
Nothing depends on who does what: an input does not see the others, and each row of a sum is summed
up in the order of the inputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from onnxcomp.passes.analysis.offsets import Offset
from onnxcomp.passes.calibration.groups import Group, Rows
from onnxcomp.passes.calibration.sums import Sums
from onnxcomp.passes.encoding.cluster_calls import Calls
from onnxcomp.passes.encoding.cluster_fitting import Fitting
from onnxcomp.passes.encoding.cluster_tasks import SMALL, Batch
from onnxcomp.passes.encoding.cluster_weights import Weights
from onnxcomp.passes.encoding.observe_tasks import (
    Scaling,
    Segment,
    Summing,
    Values,
    run_segment,
    scale_inputs,
    sum_rows,
)
from onnxcomp.passes.encoding.parcels import Parcel
from onnxcomp.passes.encoding.workers import Calibrating
from onnxcomp.passes.weight import Array

__all__ = ["calibrating"]

Named = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where an array lies.

    Attributes:
        array: The array: it is held, so that nothing else gets its identity.
        parcel: The file.
        value: Number of the value in it, which has the array under a name.
    """

    array: Array
    parcel: Parcel
    value: int


class _Shelf:
    """The arrays of one model that lie in files, as long as they are needed.

    Args:
        folder: Takes the files.
        name: Begins their names.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self._name, self._files = name, itertools.count()
        self._places: dict[int, _Place] = {}

    def path(self) -> Path:
        """A file of a new name."""
        return self.folder / f"{self._name}.{next(self._files)}.values"

    def put(self, parcel: Parcel) -> list[dict[str, Array]]:
        """The values of a parcel, whose arrays are known from now on."""
        values: list[dict[str, Array]] = parcel.opened()
        for number, named in enumerate(values):
            for array in named.values():
                self._places[id(array)] = _Place(array, parcel, number)
        return values

    def find(self, array: Array) -> _Place | None:
        """Where an array lies."""
        return self._places.get(id(array))

    def keep(self, arrays: Iterable[Array]) -> None:
        """Remove files that have none of these arrays."""
        kept = {id(array) for array in arrays}
        parcels = {place.parcel.path: place.parcel for place in self._places.values()}
        self._places = {key: place for key, place in self._places.items() if key in kept}
        used = {place.parcel.path for place in self._places.values()}
        for path, parcel in parcels.items():
            if path not in used:
                parcel.remove()

    def values(self, inputs: Sequence[Named]) -> Values:
        """Arrays for workers: large ones that lie nowhere are written to a file."""
        away = [
            {n: a for n, a in named.items() if a.nbytes > SMALL and self.find(a) is None}
            for named in inputs
        ]
        if any(away):
            written = Parcel.packed(self.path(), away)
            for number, named in enumerate(away):
                for array in named.values():
                    self._places[id(array)] = _Place(array, written, number)
        parcels: dict[str, tuple[int, Parcel]] = {}

        def place(array: Array) -> Array | tuple[int, int]:
            known = self.find(array)
            if known is None:
                return array
            found = parcels.setdefault(known.parcel.path, (len(parcels), known.parcel))
            return found[0], known.value

        places = tuple({name: place(array) for name, array in named.items()} for named in inputs)
        return Values(tuple(parcel for _, parcel in parcels.values()), places)


class _Runs:
    """Runs segments of one model, see `passes.calibration.elsewhere.Runs`."""

    def __init__(self, calls: Calls, frame: Batch, shelf: _Shelf) -> None:
        self._calls, self._frame, self._shelf = calls, frame, shelf

    @property
    def folder(self) -> Path:
        """Where segments are written."""
        return self._shelf.folder

    def keep(self, arrays: Iterable[Array]) -> None:
        """Forget all arrays that came out before but these."""
        self._shelf.keep(arrays)

    def run(
        self, path: Path, outputs: Sequence[str], held: Sequence[Named]
    ) -> Iterator[dict[str, Array]]:
        """Run a segment."""
        tasks = [
            Segment(
                self._frame, str(path.resolve()), tuple(outputs), self._shelf.values(part),
                str(self._shelf.path()),
            )
            for part in _parts(held, self._calls.workers)
        ]  # fmt: skip
        for parcel in self._calls.each(run_segment, tasks, [f"a segment up to {outputs[0]}"]):
            yield from self._shelf.put(parcel)


def _parts(items: Sequence[Named], count: int) -> Iterator[Sequence[Named]]:
    """Items one behind the other in so many parts, of about the same length."""
    count = min(max(1, count), len(items))
    for number in range(count):
        yield items[len(items) * number // count : len(items) * (number + 1) // count]


def calibrating(
    calls: Calls,
    weights: Weights,
    frame: Batch,
    offsets: Mapping[str, Offset | None],
    progress: Callable[[int, str], None] | None = None,
) -> Calibrating:
    """Calibration by the workers of a cluster; arguments are those of `Fitting`."""
    fitting = Fitting(calls, weights, frame, offsets, progress)
    return Calibrating(fitting.fit, _Observing(calls, weights, frame))


class _Observing:
    """Calibration on a cluster, see `passes.calibration.elsewhere.Elsewhere`.

    Args:
        calls: Makes calls on the cluster.
        weights: Weights of the model.
        frame: How workers go about a task.
    """

    def __init__(self, calls: Calls, weights: Weights, frame: Batch) -> None:
        self._calls, self._weights, self._frame = calls, weights, frame
        self._folder = Path(frame.exchange.folder)
        self._shelves: list[_Shelf] = []

    def runs(self) -> _Runs:
        """For the segments of one model."""
        shelf = _Shelf(self._folder, f"model{len(self._shelves)}")
        self._shelves.append(shelf)
        return _Runs(self._calls, self._frame, shelf)

    def sums(self, group: Group, found: Sequence[Named], dense: Sequence[Named]) -> Sums:
        """Sum up what a group of weights reads."""
        names = [group.site.name]
        shelf = _Shelves(self._folder, "sums", self._shelves)
        scales = self._scales(group, shelf, dense)
        sides = (shelf.values(found), shelf.values(dense))
        batch = self._weighed(group) if group.by_rows else self._frame
        tasks = [
            Summing(batch, group, rows, *sides, scales, str(shelf.path()))
            for rows in Rows.cut(group, self._calls.workers)
        ]
        parcels: list[Parcel] = list(self._calls.each(sum_rows, tasks, names))
        sums = Sums(group)
        sums.join([part for parcel in parcels for part in parcel.opened()])
        for parcel in parcels:
            parcel.remove()
        shelf.keep(())
        return sums

    def _scales(
        self, group: Group, shelf: _Shelf, dense: Sequence[Named]
    ) -> tuple[Array | None, ...]:
        """For each input what its vectors are multiplied by."""
        if group.stream is None:
            return (None,) * group.inputs
        batch = self._weighed(group)
        tasks = [
            Scaling(batch, group, shelf.values(part)) for part in _parts(dense, self._calls.workers)
        ]
        found = self._calls.each(scale_inputs, tasks, [group.site.name])
        return tuple(itertools.chain.from_iterable(found))

    def _weighed(self, group: Group) -> Batch:
        """How workers go about a group, with its weight."""
        return dataclasses.replace(self._frame, items=(self._weights.item(group.site),))


class _Shelves(_Shelf):
    """The arrays of several models, and what is written beside them."""

    def __init__(self, folder: Path, name: str, shelves: Sequence[_Shelf]) -> None:
        super().__init__(folder, name)
        self._shelves = shelves

    def find(self, array: Array) -> _Place | None:
        """Where an array lies."""
        found = (shelf.find(array) for shelf in self._shelves)
        return next((place for place in found if place is not None), super().find(array))
