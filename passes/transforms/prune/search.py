"""A search over the division of a budget between layers, by what the outputs lose.

The knapsack adds up losses, each measured while one layer lost channels and all others had theirs.
What layers lose together is another number, and fits make up for more of it in some than in others.
So the division is changed, one layer at a time: its losses count twice or half of what they did, or
as many times as it takes until something else goes, and the knapsack gives the difference to the
others. The model is fitted to what comes out and runs
on the calibration inputs; where it loses less, the search goes on from there. Týr-the-Pruner
(arXiv 2503.09657) moves sparsity between layers in such a way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from onnxcomp.passes.analysis.prune_report import SearchReport
from onnxcomp.passes.transforms.prune.decide import Decision, Division

__all__ = ["search"]

log = logging.getLogger(__name__)

TrialT = TypeVar("TrialT")

# What the losses of a layer are multiplied by or divided by; less where that gains nothing.
_FACTORS = (2.0, 2.0**0.5)

# How often a layer's losses are multiplied by that, at most, until the knapsack takes another one.
_LONGEST = 8

# Share of the loss that a change has to save: less of it is chance on few inputs.
_GAIN = 0.01


def search(
    start: Decision,
    trial: TrialT,
    loss: float,
    attempt: Callable[[Decision], tuple[TrialT, float]],
    most: int,
) -> tuple[TrialT, SearchReport]:
    """Change the division of a budget while the outputs lose less.

    Args:
        start: What goes at first.
        trial: What the model is then.
        loss: What its outputs lose.
        attempt: Fits the model to another decision; what it is then, and what its outputs lose.
        most: How many decisions are tried, at most. Divisions that take what was tried before do
            not count.

    Returns:
        The trial whose outputs lose least, which may be the first one, and what was found.
    """
    if start.division is None:
        return trial, SearchReport(loss, loss, 0)
    own = _Search(start.division, start, trial, loss, attempt, most)
    own.run()
    return own.trial, SearchReport(loss, own.loss, own.tried)


class _Search(Generic[TrialT]):
    """The best division so far."""

    def __init__(
        self,
        division: Division,
        start: Decision,
        trial: TrialT,
        loss: float,
        attempt: Callable[[Decision], tuple[TrialT, float]],
        most: int,
    ) -> None:
        self.trial, self.loss, self.tried = trial, loss, 0
        self._division, self._attempt, self._most = division, attempt, most
        self._scales = [1.0] * len(division.sequences)
        self._seen = {start.classes}
        # Layers that give most of the budget come first.
        spent = division.spent(start)
        self._order = sorted(range(len(spent)), key=lambda number: (-spent[number], number))

    def run(self) -> None:
        """Change layers until nothing helps, or as many were tried as may be."""
        for factor in _FACTORS:
            while self._round(factor):
                pass

    def _round(self, factor: float) -> bool:
        """Change every layer, each as long as that helps; whether any did."""
        helped = False
        for number in self._order:
            for own in (1 / factor, factor):
                while self._helps(number, own):
                    helped = True
        return helped

    def _helps(self, number: int, factor: float) -> bool:
        """Whether the outputs lose less where the losses of one layer count so much more."""
        if self.tried >= self._most:
            return False
        scales = list(self._scales)
        for _ in range(_LONGEST):
            scales[number] *= factor
            decision = self._division.decision(scales)
            if decision.classes not in self._seen:
                break
        else:
            return False
        self._seen.add(decision.classes)
        self.tried += 1
        trial, loss = self._attempt(decision)
        if loss > (1 - _GAIN) * self.loss:
            return False
        log.info(
            "losses of layer %d times %.3g: %.4g -> %.4g", number, scales[number], self.loss, loss
        )
        self.trial, self.loss, self._scales = trial, loss, scales
        return True
