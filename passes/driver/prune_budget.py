"""Divide one budget of bytes between pruning and codecs.

A pruned model leaves more bits for each remaining weight. How far that
pays off is tried: a few shares are pruned, the rest is planned for the remaining budget,
and the share with the least error of the outputs wins. The error of pruning is measured, that of
codes is the one that the plan expects; both are relative noise power, which adds up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from onnxcomp.passes.calibration.notices import once_per_weight
from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.calibration.sensitivity import spread
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.weight import Feed

__all__ = ["Trial", "best_share", "output_noise", "witnesses"]

T = TypeVar("T")

# Shares of the parameters of layers that can shrink; higher ones only while they may pay.
_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)

# Halvings of the distance to the shares beside the best one.
_HALVINGS = 2

# Inputs that errors are measured on.
_WITNESSES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One division of the budget.

    Attributes:
        share: Share of the parameters of layers that can shrink that was pruned.
        bytes: Bytes of the output.
        met: Whether they are within the budget.
        pruning: Measured relative error of the outputs of the pruned model.
        codes: Expected relative error of its outputs once weights are encoded; None where that is
            not known.
    """

    share: float
    bytes: int
    met: bool
    pruning: float
    codes: float | None

    @property
    def error(self) -> float:
        """Expected relative error of the outputs; infinite where it is not known."""
        return math.inf if self.codes is None else math.hypot(self.pruning, self.codes)

    @property
    def rank(self) -> tuple[float, ...]:
        """Least for the best: within the budget the least error, else the fewest bytes."""
        return (0.0, self.error, self.share) if self.met else (1.0, float(self.bytes), self.share)

    def to_json(self) -> dict[str, Any]:
        """The trial as plain values."""
        return {
            "share": round(self.share, 6),
            "bytes": self.bytes,
            "met": self.met,
            "pruning": float(f"{self.pruning:.4g}"),
            "codes": None if self.codes is None else float(f"{self.codes:.4g}"),
        }


def best_share(
    attempt: Callable[[float], tuple[Trial, T] | None],
) -> tuple[T, list[Trial]]:
    """Try shares and find the best.

    Args:
        attempt: Prunes a share and plans the rest; None where so much cannot be pruned. No share
            at all can always be.

    Returns:
        What the best attempt gave besides its trial, and the trials: the best one first, the
        others by their share.
    """
    search = _ShareSearch(attempt)
    with once_per_weight():
        for share in _SHARES:
            trial = search.tried(share)
            if trial is None or (trial.met and trial is not search.best):
                break
        for _ in range(_HALVINGS):
            for share in list(_between(search.trials)):
                search.tried(share)
    return search.result, search.ranked()


class _ShareSearch(Generic[T]):
    """Trials so far. What comes with one is kept of the best alone: models are large."""

    def __init__(self, attempt: Callable[[float], tuple[Trial, T] | None]) -> None:
        self._attempt = attempt
        self._found: tuple[Trial, T] | None = None
        self.trials: list[Trial] = []

    def tried(self, share: float) -> Trial | None:
        """Try one share; None where so much cannot be pruned."""
        found = self._attempt(share)
        if found is None:
            return None
        self.trials.append(found[0])
        if self._found is None or found[0].rank < self._found[0].rank:
            self._found = found
        return found[0]

    @property
    def best(self) -> Trial | None:
        """The best trial; None before the first."""
        return None if self._found is None else self._found[0]

    @property
    def result(self) -> T:
        """What came with the best trial."""
        assert self._found is not None, "pruning nothing is always possible"
        return self._found[1]

    def ranked(self) -> list[Trial]:
        """The best trial, then the others by their share."""
        return sorted(self.trials, key=lambda trial: (trial is not self.best, trial.share))


def _between(trials: Sequence[Trial]) -> Iterator[float]:
    """Shares half way from the best one to those beside it.

    There are none where nothing is pruned, and where no share is within the budget.
    """
    best = min(trials, key=lambda trial: trial.rank)
    shares = sorted(trial.share for trial in trials)
    place = shares.index(best.share)
    if best.share and best.met:
        yield from ((best.share + s) / 2 for s in shares[place - 1 : place + 2] if s != best.share)


def witnesses(feeds: Sequence[Feed]) -> list[Feed]:
    """Inputs to measure errors on: those that fits hold out, where there are enough."""
    held = feeds[HELD_OUT - 1 :: HELD_OUT]
    return spread(held if len(held) > 1 else feeds, _WITNESSES)


def output_noise(reference: Path, other: Path, feeds: Sequence[Feed]) -> float:
    """Mean over outputs of ``|y' - y|^2 / |y|^2``, each summed over all inputs.

    Raises:
        ModelError: A model does not run, or no output says anything.
    """
    from onnxcomp.runtime.evaluate import iterate_model

    difference = OutputDifference({})
    runs = zip(iterate_model(reference, feeds), iterate_model(other, feeds), strict=True)
    for exact, found in runs:
        difference.add(_floats(exact), found)
    return difference.mean().noise


def _floats(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
