"""What calibration knows of other processes that run its model and sum up what they see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from onnxcomp.passes.calibration.groups import Group
from onnxcomp.passes.calibration.sums import Sums
from onnxcomp.passes.weight import Array

__all__ = ["Elsewhere", "Runs"]


class Runs(Protocol):
    """Runs segments of one model on all inputs. Arrays that come out lie in files."""

    @property
    def folder(self) -> Path:
        """Where segments are written."""
        ...

    def keep(self, arrays: Iterable[Array]) -> None:
        """Forget all arrays that came out before but these."""
        ...

    def run(
        self, path: Path, outputs: Sequence[str], held: Sequence[Mapping[str, Array]]
    ) -> Iterator[dict[str, Array]]:
        """Run a segment.

        Args:
            path: Its model.
            outputs: What it gives.
            held: For each input the values that it may read, by name.

        Yields:
            For each input the outputs, by name.
        """
        ...


class Elsewhere(Protocol):
    """Other processes."""

    def runs(self) -> Runs:
        """For the segments of one model."""
        ...

    def sums(
        self,
        group: Group,
        found: Sequence[Mapping[str, Array]],
        dense: Sequence[Mapping[str, Array]],
    ) -> Sums:
        """Sum up what a group of weights reads.

        Args:
            group: The group.
            found: For each input the values by name.
            dense: The same of the reference model; empty without one.

        Raises:
            ModelError: Values are NaN or infinite.
        """
        ...
