"""Second moments of inputs as a measure: ``tr(E G E^T)`` for an error ``E`` of a weight."""

from __future__ import annotations

import numpy as np

from onnxcomp.passes.weight import Array, Stats

__all__ = [
    "ENOUGH",
    "LOOK_UPS",
    "anchored",
    "damped",
    "energy",
    "held_out_error",
    "output_error",
    "with_weight_error",
]

# Below this many input vectors for each column the moments are taken with more reserve.
ENOUGH = 5

# Share of the mean diagonal that is added to the diagonal of the moments.
DAMPING = 0.01

# What the relative error of a table counts for beside that of its products. Measured on the tied
# table of a language model: 0.02 to 0.1 give a sixth less divergence than 1 does, and a tenth less
# than 0.
LOOK_UPS = 0.05

# Shares of the mean diagonal that may be added to the moments when errors of earlier weights are
# made up for; held-out inputs choose. With little added the calibration inputs are fitted too
# closely, with much the weight stays as it is.
ANCHOR_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)

# Elements of a weight that are worked on at a time, in float64.
_CHUNK = 1 << 20


def damped(stats: Stats) -> Array:
    """``G`` with enough added to its diagonal to be inverted: float64 ``(length, length)``.

    The addition is `DAMPING` of the mean diagonal, more where there are few input vectors. A
    column whose input is always zero has only that: its weights are free.

    Returns:
        A positive definite matrix; the identity for inputs that are all zero.
    """
    length = len(stats.gram)
    mean = float(np.trace(stats.gram)) / length
    if mean <= 0.0:
        return np.eye(length)
    scarcity = max(1.0, ENOUGH * length / max(1, stats.tokens))
    return np.asarray(stats.gram + np.eye(length) * (mean * min(1.0, DAMPING * scarcity)))


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
    best, least = weight, held_out_error(weight, weight, stats)
    for damping in ANCHOR_DAMPINGS:
        target = _drifted(weight, stats, damping)
        error = held_out_error(weight, target, stats)
        if error is None or least is None or error < least:
            best, least = target, error
    return best


def _drifted(weight: Array, stats: Stats, damping: float) -> Array:
    assert stats.cross is not None
    length = len(stats.gram)
    mean = float(np.trace(stats.gram)) / length
    raised = stats.gram + np.eye(length) * (mean * damping)
    # W (C - G) (G + d I)^-1 with the small product first: rows may be many more than columns.
    turn = np.linalg.solve(raised, (stats.cross - stats.gram).T).T
    more = None if stats.missing is None else np.linalg.solve(raised, stats.missing.cross.T).T
    result = np.empty(weight.shape, np.float32)
    rows = max(1, _CHUNK // length)
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].astype(np.float64)
        extra = 0.0 if more is None else more[start : start + rows]
        result[start : start + rows] = part + part @ turn + extra
    return result


def energy(matrix: Array, moments: Array) -> float:
    """``tr(M G M^T)`` in float64."""
    rows = max(1, _CHUNK // max(1, matrix.shape[1]))
    total = 0.0
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows].astype(np.float64)
        total += float(np.einsum("ij,ij->", part @ moments, part))
    return total


def with_weight_error(moments: Array, weight: Array) -> Array:
    """Moments for which the objective is relative output error and `LOOK_UPS` of weight error.

    Args:
        moments: float64 ``(length, length)``.
        weight: ``(rows, length)``.
    """
    output, own = energy(weight, moments), energy(weight, np.eye(weight.shape[1]))
    if output <= 0.0 or own <= 0.0:
        return moments
    return np.asarray(moments + np.eye(len(moments)) * (LOOK_UPS * output / own))


def output_error(weight: Array, decoded: Array, moments: Array) -> float:
    """Relative error of products, ``sqrt(tr(E G E^T) / tr(W G W^T))``.

    Args:
        weight: ``(rows, length)``.
        decoded: The same shape.
        moments: Second moments G of the inputs, float64 ``(length, length)``.

    Returns:
        The error; 0 for outputs that are all zero.
    """
    power = energy(weight, moments)
    noise = energy(np.asarray(decoded) - weight, moments)
    return float(np.sqrt(max(0.0, noise) / power)) if power > 0.0 else 0.0


def held_out_error(weight: Array, decoded: Array, stats: Stats) -> float | None:
    """Relative error of products on held-out inputs; None where none were held out.

    With a reference model it is the distance of ``W' x`` from ``y = W x_ref + r``, with what is
    missing, r, in the stream that the product is added to, relative to y.

    Args:
        weight: ``(rows, length)``.
        decoded: The same shape.
        stats: Moments of the inputs.
    """
    if stats.held_out is None:
        return None
    if stats.held_cross is None or stats.held_reference is None:
        return output_error(weight, decoded, stats.held_out)
    missing = stats.held_missing
    power = energy(weight, stats.held_reference)
    if missing is not None and missing.reference is not None:
        power += 2.0 * _inner(weight, missing.reference) + missing.power
    noise = power + energy(decoded, stats.held_out)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].astype(np.float64) @ stats.held_cross
        noise -= 2.0 * float(np.einsum("ij,ij->", part, decoded[start : start + rows]))
    if missing is not None:
        noise -= 2.0 * _inner(decoded, missing.cross)
    return float(np.sqrt(max(0.0, noise) / power)) if power > 0.0 else 0.0


def _inner(a: Array, b: Array) -> float:
    """``tr(A B^T)``."""
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
