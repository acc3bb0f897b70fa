"""Fit the remaining columns of a product, so that they compensate for the removed ones.

All fits are least squares in float64 on second moments of the inputs, shrunk towards the original
weight, so that few data change little.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from onnxcomp.passes.transforms.prune.obs import damping, inverse
from onnxcomp.passes.weight import Array

__all__ = ["Fit", "Sums", "fitted", "masked", "measured_loss", "temper", "tempered"]

# Shrinkage towards the original weight, as a share of the mean diagonal of the moments.
SHRINK = 0.01

# Input vectors for each column from which the outputs of the original model are the target, and
# moments are taken as they are.
ANCHORED = 10

# What shrinkage towards the best fit to unchanged inputs is multiplied by when outputs of the
# original model are the target.
_SHRINKS = (1.0, 10.0, 100.0)

# Columns above which only one shrinkage is tried where vectors are many.
_WIDE = 2048

# How far moments of fewer vectors may be drawn to their diagonal.
_TEMPERS = (0.0, 0.03, 0.1, 0.3, 1.0)


class Sums:
    """Sums over input vectors of a product and what its output should be.

    Args:
        length: Columns of the weight.
        rows: Its rows.
    """

    def __init__(self, length: int, rows: int) -> None:
        self.count = 0
        self.gram = np.zeros((length, length))
        self.mean = np.zeros(length)
        self.cross = np.zeros((rows, length))
        self.target = np.zeros(rows)
        self.power = 0.0
        # Means over vectors kept aside, where there are too few to trust what `gram` promises.
        self.held: Sums | None = None

    def add(self, x: Array, target: Array | None) -> None:
        """Add vectors ``(n, length)`` with wanted outputs ``(n, rows)``."""
        x = np.asarray(x, np.float32)
        self.count += len(x)
        self.gram += x.T @ x
        self.mean += x.sum(axis=0, dtype=np.float64)
        if target is not None:
            target = np.asarray(target, np.float32)
            self.cross += target.T @ x
            self.target += target.sum(axis=0, dtype=np.float64)
            self.power += float(np.einsum("ij,ij->", target, target, dtype=np.float64))

    def means(self) -> Sums:
        """The same, divided by the number of vectors."""
        found = Sums(0, 0)
        found.count = self.count
        scale = 1 / max(1, self.count)
        found.gram, found.mean = self.gram * scale, self.mean * scale
        found.cross, found.target = self.cross * scale, self.target * scale
        found.power = self.power * scale
        return found

    def moments_about(self, place: Array) -> Array:
        """Second moments of the inputs' distances from a place ``(length,)``, for `means`."""
        across = np.outer(place, self.mean)
        return np.asarray(self.gram - across - across.T + np.outer(place, place))

    def error(self, weight: Array, bias: Array | None = None) -> float:
        """Mean squared difference between wanted outputs and ``W x + b``, for `means`."""
        total = self.power - 2 * float(np.einsum("ij,ij->", weight, self.cross))
        total += float(np.einsum("ij,ij->", weight @ self.gram, weight))
        if bias is not None:
            total += float(bias @ bias) + 2 * float(bias @ (weight @ self.mean - self.target))
        return total


def tempered(gram: Array, share: float) -> Array:
    """Second moments drawn to their diagonal: at 1 inputs count as independent."""
    return np.asarray((1.0 - share) * gram + share * np.diag(np.diag(gram)))


def temper(weight: Array, seen: Sums, held: Sums, *, apart: bool = False) -> float:
    """How far to draw the moments of few vectors to their diagonal.

    With fewer vectors than columns most columns seem to follow from the others. A quarter of the
    columns is taken out, the others are fitted, and held-out vectors tell what serves best.

    Args:
        weight: float64 ``(rows, length)``.
        seen: `Sums.means` over calibration data.
        held: The same over held-out data.
        apart: Whether the latter are of other inputs. They are then asked of many vectors, too:
            those of one picture are alike, and 12,000 of 250 pictures are still few.
    """
    length = weight.shape[1]
    if seen.count >= ANCHORED * length and not apart:
        return 0.0
    if not held.count:
        return float(length / (length + seen.count))
    gone = np.sort(np.random.default_rng(0).choice(length, max(1, length // 4), replace=False))
    gamma = damping(seen.gram, SHRINK)

    def error(share: float) -> float:
        gram = tempered(seen.gram, share)
        lost = weight - fitted(weight, gram, weight @ gram, gone, gamma)
        return float(np.einsum("ij,ij->", lost @ held.gram, lost))

    return min(_TEMPERS, key=error)


def measured_loss(weight: Array, sums: Sums, gone: Array, *, biased: bool) -> float:
    """Squared error of the outputs on vectors kept aside, the columns that stay fitted.

    Args:
        weight: float64 ``(rows, length)``.
        sums: Means over calibration data, with `held`.
        gone: Numbers of the columns that go.
        biased: Whether a bias makes up for the mean.
    """
    assert sums.held is not None
    gamma = damping(sums.gram, SHRINK)
    lost = weight - fitted(weight, sums.gram, weight @ sums.gram, gone, gamma)
    held = sums.held.gram
    if biased:
        held = held - np.outer(sums.held.mean, sums.held.mean)
    return max(0.0, float(np.einsum("ij,ij->", lost @ held, lost)))


def masked(weight: Array, gone: Array) -> Array:
    """The weight with zeros in the columns that go."""
    result = weight.copy()
    result[:, gone] = 0.0
    return result


def fitted(weight: Array, gram: Array, cross: Array, gone: Array, gamma: float) -> Array:
    """The weight whose kept columns come closest to the wanted outputs.

    ``W'_K = (C + g W)_K (G_KK + g I)^-1`` with C the cross moments of wanted outputs and inputs;
    ``C = W G`` where the wanted outputs are those of the whole weight on the same inputs.

    Args:
        weight: float64 ``(rows, length)``.
        gram: ``G``, float64 ``(length, length)``.
        cross: ``C``, float64 ``(rows, length)``.
        gone: Numbers of the columns that go.
        gamma: Shrinkage ``g`` towards the weight.

    Returns:
        float64 ``(rows, length)``, zero in the columns that go.
    """
    kept = np.setdiff1d(np.arange(weight.shape[1]), gone)
    left = gram[np.ix_(kept, kept)] + gamma * np.eye(len(kept))
    result = np.zeros_like(weight)
    result[:, kept] = (cross + gamma * weight)[:, kept] @ inverse(left)
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """What became of one product.

    Attributes:
        weight: float64 ``(rows, length)``, zero in the columns that went.
        bias: What its bias becomes; None where it has none or keeps it.
        before: Relative squared output error on held-out data with the columns left out only.
        after: The same with the weight above.
        used: "fit", "anchored" or "mask".
    """

    weight: Array
    bias: Array | None
    before: float
    after: float
    used: str


def best_fit(
    weight: Array,
    bias: Array | None,
    gone: Array,
    seen: Sums,
    held: Sums,
    *,
    share: float = SHRINK,
    biases_only: bool = False,
) -> Fit:
    """The fit that does best on held-out data; leaving columns out is among the choices.

    Args:
        weight: float64 ``(rows, length)``.
        bias: Added to the outputs, float64 ``(rows,)``; None without one.
        gone: Columns that go.
        seen: `Sums.means` over calibration data, with wanted outputs.
        held: The same over held-out data.
        share: Shrinkage as a share of the mean diagonal of the moments.
        biases_only: Keep the weight's columns and change the bias alone.
    """
    gamma = damping(seen.gram, share)
    base = np.zeros(len(weight)) if bias is None else bias
    best = _Best(held, "mask", (masked(weight, gone), bias))
    before = best.error
    best.offer("bias", _with_bias(best.choice[0], seen, bias))
    if not biases_only:
        for tempering in _inner(weight, bias, gone, seen, gamma):
            best.offer("fit", tempering)
        for shrunk in _anchored(weight, best.choice[0], bias, gone, seen, gamma):
            best.offer("anchored", shrunk)
    power = max(held.power, 1e-30)
    chosen, offset = best.choice
    changed = None if offset is None or np.array_equal(offset, base) else offset
    return Fit(chosen, changed, before / power, best.error / power, best.name)


Choice = tuple[Array, Array | None]


class _Best:
    """The choice of weight and bias that does best on held-out data."""

    def __init__(self, held: Sums, name: str, choice: Choice) -> None:
        self._held, self.name, self.choice = held, name, choice
        self.error = held.error(*choice)

    def offer(self, name: str, choice: Choice) -> None:
        """Take another one, if it does better."""
        error = self._held.error(*choice)
        if error < self.error:
            self.error, self.name, self.choice = error, name, choice


def _inner(
    weight: Array, bias: Array | None, gone: Array, seen: Sums, gamma: float
) -> Iterator[Choice]:
    """Fits to what the weight makes of the same inputs."""
    yield fitted(weight, seen.gram, weight @ seen.gram, gone, gamma), bias
    many = seen.count >= ANCHORED * weight.shape[1]
    for share in () if many and weight.shape[1] > _WIDE else _TEMPERS[1:-1]:
        gram = tempered(seen.gram, share)
        yield _with_bias(fitted(weight, gram, weight @ gram, gone, gamma), seen, bias)


def _anchored(
    weight: Array, prior: Array, bias: Array | None, gone: Array, seen: Sums, gamma: float
) -> Iterator[Choice]:
    """Fits to the outputs of the original model, shrunk towards the weight or another fit."""
    gram, cross = seen.gram, seen.cross
    if bias is not None:
        gram = gram - np.outer(seen.mean, seen.mean)
        cross = cross - np.outer(seen.target, seen.mean)
    if seen.count >= ANCHORED * weight.shape[1]:
        yield _with_bias(fitted(weight, gram, cross, gone, gamma), seen, bias)
    for times in () if weight.shape[1] > _WIDE else _SHRINKS:
        yield _with_bias(fitted(prior, gram, cross, gone, times * gamma), seen, bias)


def _with_bias(weight: Array, seen: Sums, bias: Array | None) -> tuple[Array, Array | None]:
    """A weight with the bias that gives its outputs the wanted mean."""
    return weight, None if bias is None else seen.target - weight @ seen.mean
