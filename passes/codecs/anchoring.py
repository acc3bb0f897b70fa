"""What a calibrated encoder aims at where earlier weights of the model have errors."""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.codecs.held_out import HeldOut
from onnxcomp.passes.codecs.moments import damped, product, raised, with_weight_error
from onnxcomp.passes.weight import Array, Stats

__all__ = ["anchored", "objective"]

# Shares of the mean diagonal that may be added to the moments when errors of earlier weights are
# made up for; held-out inputs choose. With little added the calibration inputs are fitted too
# closely, with much the weight stays as it is.
ANCHOR_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)

# Rows of a weight by which that is chosen.
_ANCHOR_ROWS = 256


def objective(weight: Array, stats: Stats) -> tuple[Array, Array]:
    """What an encoder comes close to, and what errors of it cost.

    Rows that are looked up as well count a little for themselves, too.

    Args:
        weight: ``(rows, length)``.
        stats: Moments of the inputs.

    Returns:
        The target, `anchored`; positive definite moments, float64 ``(length, length)``.
    """
    target, moments = anchored(np.asarray(weight, np.float32), stats), damped(stats)
    if stats.frequencies is not None:
        moments = with_weight_error(moments, weight)
    return target, moments


def anchored(weight: Array, stats: Stats) -> Array:
    """The weight that a calibrated encoder should aim at where earlier weights have errors.

    ``W + (W (C - G) + D) (G + d I)^-1`` with ``C = E[x_ref x^T]``, and ``D = E[r x^T]`` for what is
    missing, r, in the stream that the product is added to. For d = 0 its products with the inputs
    of the compressed model are closest to those of the dense model with its own, plus r. The d is
    that of `ANCHOR_DAMPINGS` with the least error on held-out inputs.

    Args:
        weight: float32 ``(rows, length)``.
        stats: Moments of the inputs; the weight itself is the target where there is no `cross`.

    Returns:
        float32 ``(rows, length)``.
    """
    if stats.cross is None or float(np.trace(stats.gram)) <= 0.0:
        return weight
    damping = _anchor_damping(weight, stats)
    return weight if damping is None else weight + _drift(weight, stats, damping)


def _anchor_damping(weight: Array, stats: Stats) -> float | None:
    """The best of `ANCHOR_DAMPINGS`, by some rows; None where the weight itself does better."""
    some = slice(None, None, -(-len(weight) // _ANCHOR_ROWS))
    weight, stats = weight[some], stats.of_rows(some)
    judge = HeldOut(weight, stats)
    none = judge.error(weight)
    if none is None:
        return ANCHOR_DAMPINGS[-1]
    errors: dict[int, float] = {}

    def error(index: int) -> float:
        if index not in errors:
            target = weight + _drift(weight, stats, ANCHOR_DAMPINGS[index])
            errors[index] = judge.error(target) or 0.0
        return errors[index]

    # The error falls and then rises with the damping: go down from the middle.
    best, last = len(ANCHOR_DAMPINGS) // 2, len(ANCHOR_DAMPINGS) - 1
    while best > 0 and error(best - 1) < error(best):
        best -= 1
    while best < last and error(best + 1) < error(best):
        best += 1
    return ANCHOR_DAMPINGS[best] if error(best) < none else None


def _drift(weight: Array, stats: Stats, damping: float) -> Array:
    """What is added to a weight for the errors before it: float32 ``(rows, length)``."""
    assert stats.cross is not None
    length = len(stats.gram)
    mean = float(np.trace(stats.gram)) / length
    missing = None if stats.missing is None else stats.missing.cross
    # Squares of wide weights take a gigabyte each: none is held longer than it is needed.
    if len(weight) < length:
        asked = product(weight, stats.cross - stats.gram)
        asked = asked if missing is None else asked + missing
        regular = raised(stats.gram, mean * damping)
        return np.asarray(np.linalg.solve(regular, asked.T).T, np.float32)
    regular = raised(stats.gram, mean * damping)
    drift = product(weight, np.linalg.solve(regular, (stats.cross - stats.gram).T).T)
    if missing is not None:
        drift += np.linalg.solve(regular, missing.T).T
    return drift
