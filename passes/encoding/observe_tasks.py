"""What workers of a cluster do of calibration: run a piece of the model, and sum up what it gives.

Arrays that come out stay in files that other workers map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from onnxcomp.errors import CompressionError, ModelError
from onnxcomp.passes.calibration.groups import Group, Rows
from onnxcomp.passes.calibration.segmented_run import segment_runner
from onnxcomp.passes.calibration.sums import Sums, scales_of
from onnxcomp.passes.encoding.cluster_tasks import Batch, begun
from onnxcomp.passes.encoding.parcels import Parcel
from onnxcomp.passes.weight import Array

__all__ = ["Scaling", "Segment", "Summing", "Values", "run_segment", "scale_inputs", "sum_rows"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Values:
    """Arrays of some inputs by name.

    Attributes:
        parcels: Files that hold arrays.
        inputs: For each input the arrays: as they are, or the numbers of a parcel and of a value in
            it, which has the array under the same name.
    """

    parcels: tuple[Parcel, ...]
    inputs: tuple[Mapping[str, Array | tuple[int, int]], ...]

    def opened(self) -> Iterator[dict[str, Array]]:
        """The arrays of each input."""
        values = [parcel.opened() for parcel in self.parcels]
        for places in self.inputs:
            yield {
                name: values[place[0]][place[1]][name] if isinstance(place, tuple) else place
                for name, place in places.items()
            }


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the model for some inputs.

    Attributes:
        batch: How workers go about it; no weights.
        path: The piece.
        outputs: What it gives.
        held: What it may read.
        result: The file that what it gives goes to.
    """

    batch: Batch
    path: str
    outputs: tuple[str, ...]
    held: Values
    result: str


@dataclasses.dataclass(frozen=True, slots=True)
class Scaling:
    """Some inputs of a group with a stream.

    Attributes:
        batch: The weight.
        group: The group.
        dense: Values of the dense model.
    """

    batch: Batch
    group: Group
    dense: Values


@dataclasses.dataclass(frozen=True, slots=True)
class Summing:
    """Some rows of the sums of a group.

    Attributes:
        batch: The weight, where the group is `Group.by_rows`.
        group: The group.
        rows: The rows.
        found: Values of all inputs.
        dense: Those of the dense model.
        scales: For each input what its vectors are multiplied by; None where nothing.
        result: The file that sums go to.
    """

    batch: Batch
    group: Group
    rows: Rows
    found: Values
    dense: Values
    scales: tuple[Array | None, ...]
    result: str


def _tried(batch: Batch, work: Callable[[], T]) -> T | CompressionError:
    """What a task gives, or what makes it impossible wherever it is tried."""
    wrong = begun(batch)
    if wrong is not None:
        return wrong
    try:
        return work()
    except ModelError as error:
        return error


def run_segment(task: Segment) -> Parcel | CompressionError:
    """Run a piece of the model on one thread: its outputs for each input."""

    def work() -> Parcel:
        run = segment_runner(Path(task.path), task.outputs, threads=1)
        return Parcel.packed(Path(task.result), map(run, task.held.opened()))

    return _tried(task.batch, work)


def scale_inputs(task: Scaling) -> list[Array] | CompressionError:
    """What vectors of some inputs are multiplied by."""

    def work() -> list[Array]:
        (item,) = task.batch.items
        weight = item.read()
        return [scales_of(task.group, exact, weight) for exact in task.dense.opened()]

    return _tried(task.batch, work)


def sum_rows(task: Summing) -> Parcel | CompressionError:
    """Some rows of the sums over all inputs."""

    def work() -> Parcel:
        weight = next((item.read() for item in task.batch.items), None)
        sums = Sums(task.group, weight, rows=task.rows)
        pairs = zip(task.found.opened(), task.dense.opened(), task.scales, strict=True)
        for number, (values, exact, scales) in enumerate(pairs):
            sums.add(number, values, exact, scales)
        sums.cut()
        return Parcel.packed(Path(task.result), [sums])

    return _tried(task.batch, work)
