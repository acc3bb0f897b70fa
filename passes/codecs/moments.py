"""Second moments of inputs as a measure: ``tr(E G E^T)`` for an error ``E`` of a weight."""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.weight import Array, Means, Missing, Stats

__all__ = [
    "ENOUGH",
    "LOOK_UPS",
    "HeldOut",
    "anchored",
    "damped",
    "energy",
    "held_out_error",
    "mean_shift",
    "output_error",
    "output_root",
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

# Rows of a weight by which that is chosen.
_ANCHOR_ROWS = 256

# Elements of a weight that are worked on at a time.
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
    return _raised(stats.gram, mean * min(1.0, DAMPING * scarcity))


def _raised(square: Array, amount: float) -> Array:
    """A copy of a square matrix with so much added to its diagonal."""
    raised = np.array(square)
    diagonal = np.arange(len(raised))
    raised[diagonal, diagonal] += amount
    return raised


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
    weight, stats = weight[some], _of_rows(stats, some)
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


def _of_rows(stats: Stats, rows: slice) -> Stats:
    """The statistics for some rows of the weight."""

    def of(missing: Missing | None) -> Missing | None:
        if missing is None:
            return None
        exact = None if missing.reference is None else missing.reference[rows]
        return dataclasses.replace(missing, cross=missing.cross[rows], reference=exact)

    return dataclasses.replace(
        stats, missing=of(stats.missing), held_missing=of(stats.held_missing)
    )


def _drift(weight: Array, stats: Stats, damping: float) -> Array:
    """What is added to a weight for the errors before it: float32 ``(rows, length)``."""
    assert stats.cross is not None
    length = len(stats.gram)
    mean = float(np.trace(stats.gram)) / length
    missing = None if stats.missing is None else stats.missing.cross
    # Squares of wide weights take a gigabyte each: none is held longer than it is needed.
    if len(weight) < length:
        asked = _product(weight, stats.cross - stats.gram)
        asked = asked if missing is None else asked + missing
        raised = _raised(stats.gram, mean * damping)
        return np.asarray(np.linalg.solve(raised, asked.T).T, np.float32)
    raised = _raised(stats.gram, mean * damping)
    drift = _product(weight, np.linalg.solve(raised, (stats.cross - stats.gram).T).T)
    if missing is not None:
        drift += np.linalg.solve(raised, missing.T).T
    return drift


def _product(a: Array, b: Array) -> Array:
    """``a @ b`` in float32."""
    return np.asarray(np.asarray(a, np.float32) @ np.asarray(b, np.float32))


def mean_shift(weight: Array, decoded: Array, stats: Stats) -> Array | None:
    """What the means of products lose by the change of the weight: ``(W - W') E[x]``.

    What they lose by other inputs than those of the reference model is not in it: the weights that
    changed them have shifts of their own, and the rest is as often chance as not. In MobileNetV2
    at 4 bits the divergence from the dense outputs is 0.042 like this and 0.160 with it.

    Args:
        weight: The weight W, ``(rows, length)``.
        decoded: What is in its place, W'.
        stats: Moments of the inputs.

    Returns:
        float64 ``(rows,)``, exactly 0 for equal weights; None where means are not known.
    """
    if stats.means is None:
        return None
    inputs = stats.means.inputs
    return _mean_products(weight, inputs) - _mean_products(decoded, inputs)


def _lack(weight: Array, decoded: Array, means: Means, missing: Missing | None) -> Array:
    reference = means.inputs if means.reference is None else means.reference
    lack = _mean_products(weight, reference) - _mean_products(decoded, means.inputs)
    return lack if missing is None else lack + missing.mean


def _mean_products(weight: Array, mean: Array) -> Array:
    """``W E[x]``, float64 ``(rows,)``; rows of each group with its own inputs."""
    groups = np.atleast_2d(mean)
    blocks = np.asarray(weight, np.float64).reshape(len(groups), -1, groups.shape[1])
    return np.asarray(blocks @ groups[:, :, None]).reshape(-1)


def energy(matrix: Array, moments: Array) -> float:
    """``tr(M G M^T)``: products in float32, their sum in float64."""
    rows = max(1, _CHUNK // max(1, matrix.shape[1]))
    moments = np.asarray(moments, np.float32)
    total = 0.0
    for start in range(0, len(matrix), rows):
        part = np.asarray(matrix[start : start + rows], np.float32)
        total += _inner(part @ moments, part)
    return total


def output_root(outputs: Array) -> Array:
    """``(H + d I)^1/2``: products times this count as much as the loss of the outputs feels.

    Args:
        outputs: The curvature H of the loss by the products, ``(rows, rows)``.

    Returns:
        Symmetric and positive definite, float64; d is `DAMPING` of the mean diagonal.
    """
    mean = float(np.trace(outputs)) / len(outputs)
    if mean <= 0.0:
        return np.eye(len(outputs))
    values, vectors = np.linalg.eigh(outputs)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0) + DAMPING * mean)) @ vectors.T)


def with_weight_error(moments: Array, weight: Array) -> Array:
    """Moments for which the objective is relative output error and `LOOK_UPS` of weight error.

    Args:
        moments: float64 ``(length, length)``.
        weight: ``(rows, length)``.
    """
    output, own = energy(weight, moments), energy(weight, np.eye(weight.shape[1]))
    if output <= 0.0 or own <= 0.0:
        return moments
    return _raised(moments, LOOK_UPS * output / own)


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


class HeldOut:
    """Errors of a weight's products on held-out inputs.

    With a reference model they are distances of ``W' x + s`` from ``y = W x_ref + r``, with what is
    missing, r, in the stream that the product is added to, and a shift s of its offset, relative to
    y. With ``E = W' - W`` they are ``tr(E G E^T) + 2 tr(E V^T)`` more than that of W, where
    ``V = W (G - C) - E[r x^T]``: no small number is found as a difference of large ones.

    Args:
        weight: ``(rows, length)``.
        stats: Moments of the inputs.
    """

    def __init__(self, weight: Array, stats: Stats) -> None:
        self._weight, self._held = weight, stats.held_out
        self._means, self._missing = stats.held_means, stats.held_missing
        self._slope: Array | None = None
        self._power = self._least = 0.0
        self._groups: list[HeldOut] = []
        if stats.held_out is None:
            return
        if stats.held_out.ndim > 2:
            blocks = np.split(weight, len(stats.held_out))
            self._groups = [HeldOut(w, _of_group(stats, n)) for n, w in enumerate(blocks)]
            self._power = sum(group._power for group in self._groups)
            return
        if stats.held_cross is None or stats.held_reference is None:
            self._power = energy(weight, stats.held_out)
            return
        cross, missing = stats.held_cross, stats.held_missing
        self._power = energy(weight, stats.held_reference)
        moved = stats.held_reference + stats.held_out
        moved -= cross
        moved -= cross.T
        self._least = energy(weight, moved)
        del moved
        self._slope = _product(weight, stats.held_out - cross)
        if missing is not None and missing.reference is not None:
            self._power += 2.0 * _inner(weight, missing.reference) + missing.power
            self._least += 2.0 * _inner(weight, missing.reference - missing.cross) + missing.power
        if missing is not None:
            self._slope -= missing.cross.astype(np.float32)

    def error(self, decoded: Array, shift: Array | None = None) -> float | None:
        """Relative error of ``(rows, length)`` in the place of the weight; None if not known.

        Args:
            decoded: What is in the place of the weight.
            shift: What is added to its products, ``(rows,)``.
        """
        if self._held is None:
            return None
        noise = self._noise(decoded, shift)
        return float(np.sqrt(max(0.0, noise) / self._power)) if self._power > 0.0 else 0.0

    def _noise(self, decoded: Array, shift: Array | None) -> float:
        assert self._held is not None
        if self._groups:
            count = len(self._groups)
            shifts = [None] * count if shift is None else np.split(shift, count)
            blocks = zip(self._groups, np.split(decoded, count), shifts, strict=True)
            return sum(group._noise(part, own) for group, part, own in blocks)
        change = np.asarray(decoded) - self._weight
        noise = self._least + energy(change, self._held)
        if self._slope is not None:
            noise += 2.0 * _inner(change, self._slope)
        if shift is not None and self._means is not None:
            lack = _lack(self._weight, decoded, self._means, self._missing)
            noise += float(shift @ (shift - 2.0 * lack))
        return noise


def _of_group(stats: Stats, number: int) -> Stats:
    """The statistics of one group of a convolution."""

    def of(array: Array | None) -> Array | None:
        return None if array is None else array[number]

    def means(known: Means | None) -> Means | None:
        return None if known is None else Means(known.inputs[number], of(known.reference))

    return dataclasses.replace(
        stats,
        gram=stats.gram[number],
        mean=stats.mean[number],
        held_out=of(stats.held_out),
        cross=of(stats.cross),
        held_cross=of(stats.held_cross),
        held_reference=of(stats.held_reference),
        means=means(stats.means),
        held_means=means(stats.held_means),
    )


def held_out_error(weight: Array, decoded: Array, stats: Stats) -> float | None:
    """Relative error of products on held-out inputs; None where none were held out.

    Args:
        weight: ``(rows, length)``.
        decoded: The same shape.
        stats: Moments of the inputs.
    """
    return HeldOut(weight, stats).error(decoded)


def _inner(a: Array, b: Array) -> float:
    """``tr(A B^T)``."""
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
