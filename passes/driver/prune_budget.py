"""One budget of bytes for pruning and codes: how much of it each of them takes.

A model from which channels were taken out leaves more bits for each weight that stays. How far
that pays is tried: a few shares are pruned, the rest is planned for what is left of the budget,
and the share with the least error of the outputs wins. The error of pruning is measured, that of
codes is the one that the plan expects; both are relative noise power, which adds up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.passes.calibration import statistics
from onnxcomp.passes.calibration.perturbation import NoiseShares
from onnxcomp.passes.calibration.sensitivity import spread
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.transforms.prune import observe
from onnxcomp.passes.weight import Feed

__all__ = ["Trial", "best_share", "output_noise", "said_once", "witnesses"]

# Shares of the parameters of layers that can shrink; higher ones only while they may pay.
_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7)

# Halvings of the distance to the shares beside the best one.
_HALVINGS = 2

# Modules that say something about each weight.
_SPEAKING = (statistics.__name__, observe.__name__)

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
        codes: Expected relative error of its outputs once weights are coded; None where that is
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


def best_share(attempt: Callable[[float], Trial | None]) -> list[Trial]:
    """Try shares and find the best.

    Args:
        attempt: Prunes a share and plans the rest; None where so much cannot be pruned.

    Returns:
        The trials, the best one first, the others by their share.
    """
    trials: list[Trial] = []
    for share in _SHARES:
        trial = attempt(share)
        if trial is None:
            break
        trials.append(trial)
        if trial.met and trial is not min(trials, key=lambda other: other.rank):
            break
    for _ in range(_HALVINGS):
        for share in list(_between(trials)):
            trial = attempt(share)
            trials += [] if trial is None else [trial]
    best = min(trials, key=lambda trial: trial.rank)
    others = [trial for trial in trials if trial is not best]
    return [best, *sorted(others, key=lambda trial: trial.share)]


def _between(trials: Sequence[Trial]) -> Iterator[float]:
    """Shares half way from the best one to those beside it.

    There are none where nothing is pruned, and where no share is within the budget.
    """
    best = min(trials, key=lambda trial: trial.rank)
    shares = sorted(trial.share for trial in trials)
    place = shares.index(best.share)
    if best.share and best.met:
        yield from ((best.share + s) / 2 for s in shares[place - 1 : place + 2] if s != best.share)


class _Once(logging.Filter):
    """Lets each message about a weight pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        name = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        key = f"{record.msg} {name}"
        known = key in self._seen
        self._seen.add(key)
        return not known


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Let trials of the same model say only once that a weight has seen few inputs."""
    once = _Once()
    for module in _SPEAKING:
        logging.getLogger(module).addFilter(once)
    try:
        yield
    finally:
        for module in _SPEAKING:
            logging.getLogger(module).removeFilter(once)


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

    noise = NoiseShares()
    runs = zip(iterate_model(reference, feeds), iterate_model(other, feeds), strict=True)
    for exact, found in runs:
        noise.add(_floats(exact), found)
    return float(np.mean(noise.shares()))


def _floats(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
