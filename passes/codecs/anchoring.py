"""What a calibrated encoder aims at where earlier weights of the model have errors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.codecs.cholesky import divide, factorize
from onnxcomp.passes.codecs.held_out import HeldOut
from onnxcomp.passes.codecs.moments import (
    damped,
    mean_diagonal,
    product,
    raised,
    with_weight_error,
)
from onnxcomp.passes.weight import Array, Stats

__all__ = ["anchored", "lacking", "objective"]

# Shares of the mean diagonal that may be added to the moments when errors of earlier weights are
# made up for; held-out inputs choose. With little added the calibration inputs are fitted too
# closely, with much the weight stays as it is.
ANCHOR_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)

# Rows of a weight by which that is chosen.
_ANCHOR_ROWS = 256


def objective(
    weight: Array, stats: Stats, dtype: npt.DTypeLike = np.float64, *, in_place: bool = False
) -> tuple[Array, Array]:
    """What an encoder comes close to, and what errors of it cost.

    Rows that are looked up as well count a little for themselves, too.

    Args:
        weight: ``(rows, length)``.
        stats: Moments of the inputs.
        dtype: Type of the moments that come out.
        in_place: Whether those of the statistics may be changed for it.

    Returns:
        The target, `anchored`; positive definite moments ``(length, length)``.
    """
    target = anchored(np.asarray(weight, np.float32), stats)
    moments = damped(stats, dtype, in_place=in_place)
    if stats.frequencies is not None:
        moments = with_weight_error(moments, weight)
    return target, moments


def anchored(weight: Array, stats: Stats) -> Array:
    """The weight that a calibrated encoder should aim at where earlier weights have errors.

    ``W + A (G + d I)^-1`` with what products lack, A. For d = 0 its products with the inputs of the
    compressed model are closest to those of the dense model with its own, plus what the stream
    behind them lacks. The d is that of `ANCHOR_DAMPINGS` with the least error on held-out inputs.

    Args:
        weight: float32 ``(rows, length)``.
        stats: Moments of the inputs; the weight itself is the target where products lack nothing
            that is known.

    Returns:
        float32 ``(rows, length)``.
    """
    if (stats.drift is None and stats.lack is None) or mean_diagonal(stats.gram) <= 0.0:
        return weight
    damping = _anchor_damping(weight, stats)
    if damping is None:
        return weight
    target = _change(weight, stats, damping)
    target += weight
    return target


def lacking(weight: Array, stats: Stats) -> Array | None:
    """What products of a weight lack, ``A = E[(W (x_ref - x) + r) x^T]``.

    Args:
        weight: W, ``(rows, length)``.
        stats: Moments of the inputs x; r is what the stream behind the products lacks.

    Returns:
        float32 ``(rows, length)``; None where nothing is known to be lacking.
    """
    if stats.drift is None:
        return None if stats.lack is None else np.array(stats.lack, np.float32)
    found = product(weight, stats.drift)
    return found if stats.lack is None else found + stats.lack


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
            target = weight + _change(weight, stats, ANCHOR_DAMPINGS[index])
            errors[index] = judge.error(target) or 0.0
        return errors[index]

    # The error falls and then rises with the damping: go down from the middle.
    best, last = len(ANCHOR_DAMPINGS) // 2, len(ANCHOR_DAMPINGS) - 1
    while best > 0 and error(best - 1) < error(best):
        best -= 1
    while best < last and error(best + 1) < error(best):
        best += 1
    return ANCHOR_DAMPINGS[best] if error(best) < none else None


def _change(weight: Array, stats: Stats, damping: float) -> Array:
    """What is added to a weight for the errors before it: float32 ``(rows, length)``.

    Beside the statistics it holds one matrix of ``length^2``, the factor, and another one where
    there are more rows than columns.
    """
    factor = raised(stats.gram, mean_diagonal(stats.gram) * damping, np.float32)
    factorize(factor)
    if stats.drift is None or len(weight) < len(factor):
        change = lacking(weight, stats)
        assert change is not None
        divide(change, factor)
        return change
    drift = np.array(stats.drift, np.float32)
    divide(drift, factor)
    change = product(weight, drift)
    if stats.lack is not None:
        lack = np.array(stats.lack, np.float32)
        divide(lack, factor)
        change += lack
    return change
