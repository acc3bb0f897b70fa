"""Errors of a weight's products on inputs that were set aside.

There are two forms of it. Few inputs are kept as vectors, and multiplied; many are kept as moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from onnxcomp.passes.codecs.moments import energy, inner, mean_products, product
from onnxcomp.passes.weight import (
    Array,
    Held,
    HeldMoments,
    HeldVectors,
    Means,
    Missing,
    Stats,
)

__all__ = ["HeldOut", "held_out_error"]

# Elements of products that are made at a time.
_CHUNK = 1 << 20


class HeldOut:
    """Errors of a weight's products on held-out inputs.

    With a reference model they are distances of ``W' x + s`` from ``y = W x_ref + r``, with what is
    missing, r, in the stream that the product is added to, and a shift s of its offset, relative to
    y.

    Args:
        weight: ``(rows, length)``.
        stats: What its inputs look like.
    """

    def __init__(self, weight: Array, stats: Stats) -> None:
        self._judge = None if stats.held is None else _judge(weight, stats.held)

    def error(self, decoded: Array, shift: Array | None = None) -> float | None:
        """Relative error of ``(rows, length)`` in the place of the weight; None if not known.

        Args:
            decoded: What is in the place of the weight.
            shift: What is added to its products, ``(rows,)``.
        """
        if self._judge is None:
            return None
        noise, power = self._judge.noise(np.asarray(decoded), shift), self._judge.power
        return float(np.sqrt(max(0.0, noise) / power)) if power > 0.0 else 0.0


def held_out_error(weight: Array, decoded: Array, stats: Stats) -> float | None:
    """Relative error of products on held-out inputs; None where none were held out.

    Args:
        weight: ``(rows, length)``.
        decoded: The same shape.
        stats: What the inputs look like.
    """
    return HeldOut(weight, stats).error(decoded)


class _Judge(Protocol):
    """Mean squares over held-out inputs.

    Attributes:
        power: Of ``y``.
    """

    power: float

    def noise(self, decoded: Array, shift: Array | None) -> float:
        """Of ``W' x + s - y``."""
        ...


def _judge(weight: Array, held: Held) -> _Judge:
    if isinstance(held, HeldVectors):
        return _ByVectors(weight, held)
    return _ByMoments(weight, held) if held.inputs.ndim == 2 else _ByGroups(weight, held)


class _ByVectors:
    """Multiplies the vectors. Products are float32, and their squares are summed up in float64."""

    def __init__(self, weight: Array, held: HeldVectors) -> None:
        self._inputs, self._count = held.inputs, max(1, len(held.inputs))
        exact = held.inputs if held.reference is None else held.reference
        self._wanted = np.empty((len(weight), len(exact)), np.float32)
        for rows, outputs in _outputs(weight, exact):
            self._wanted[rows] = outputs
        if held.reference is not None and held.missing is not None:
            self._wanted += held.missing.T
        parts = (self._wanted[rows] for rows in _blocks(self._wanted))
        self.power = sum(inner(part, part) for part in parts) / self._count

    def noise(self, decoded: Array, shift: Array | None) -> float:
        """See `_Judge.noise`; by products of ``(rows, vectors)``, some rows at a time."""
        total = 0.0
        for rows, lack in _outputs(decoded, self._inputs):
            lack -= self._wanted[rows]
            if shift is not None:
                lack += shift[rows, None].astype(np.float32)
            total += inner(lack, lack)
        return total / self._count


def _blocks(products: Array) -> Iterator[slice]:
    """Rows that are worked on together."""
    step = max(1, _CHUNK // max(1, products.shape[1]))
    yield from (slice(start, start + step) for start in range(0, len(products), step))


def _outputs(weight: Array, inputs: Array) -> Iterator[tuple[slice, Array]]:
    """Some rows of ``W X^T`` at a time: equal ones for equal inputs, bit for bit."""
    step = max(1, _CHUNK // max(1, len(inputs)))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, product(weight[rows], inputs.T)


class _ByMoments:
    """Multiplies moments.

    With ``E = W' - W`` the noise is ``tr(E G E^T) + 2 tr(E V^T)`` more than that of W, where
    ``V = W (G - C) - E[r x^T]``: no small number is found as a difference of large ones.
    """

    def __init__(self, weight: Array, held: HeldMoments) -> None:
        self._weight, self._held = weight, held
        self._slope: Array | None = None
        self._least = 0.0
        if held.cross is None or held.reference is None:
            self.power = energy(weight, held.inputs)
            return
        self.power = energy(weight, held.reference)
        moved = held.reference + held.inputs
        moved -= held.cross
        moved -= held.cross.T
        self._least = energy(weight, moved)
        del moved
        self._slope = product(weight, held.inputs - held.cross)
        missing = held.missing
        if missing is not None and missing.reference is not None:
            self.power += 2.0 * inner(weight, missing.reference) + missing.power
            self._least += 2.0 * inner(weight, missing.reference - missing.cross) + missing.power
        if missing is not None:
            self._slope -= missing.cross.astype(np.float32)

    def noise(self, decoded: Array, shift: Array | None) -> float:
        """See `_Judge.noise`; by products of ``(rows, length)`` and moments."""
        change = decoded - self._weight
        noise = self._least + energy(change, self._held.inputs)
        if self._slope is not None:
            noise += 2.0 * inner(change, self._slope)
        if shift is not None and self._held.means is not None:
            lack = _lack(self._weight, decoded, self._held.means, self._held.missing)
            noise += float(shift @ (shift - 2.0 * lack))
        return noise


def _lack(weight: Array, decoded: Array, means: Means, missing: Missing | None) -> Array:
    reference = means.inputs if means.reference is None else means.reference
    lack = mean_products(weight, reference) - mean_products(decoded, means.inputs)
    return lack if missing is None else lack + missing.mean


class _ByGroups:
    """The same for each group of a convolution, which has inputs of its own."""

    def __init__(self, weight: Array, held: HeldMoments) -> None:
        blocks = np.split(weight, len(held.inputs))
        self._groups = [_ByMoments(rows, _of_group(held, n)) for n, rows in enumerate(blocks)]
        self.power = sum(group.power for group in self._groups)

    def noise(self, decoded: Array, shift: Array | None) -> float:
        """See `_Judge.noise`; the sum over groups."""
        count = len(self._groups)
        shifts = [None] * count if shift is None else np.split(shift, count)
        blocks = zip(self._groups, np.split(decoded, count), shifts, strict=True)
        return sum(group.noise(part, own) for group, part, own in blocks)


def _of_group(held: HeldMoments, number: int) -> HeldMoments:
    """The moments of one group."""

    def of(array: Array | None) -> Array | None:
        return None if array is None else array[number]

    means = held.means
    if means is not None:
        means = Means(means.inputs[number], of(means.reference))
    return HeldMoments(held.inputs[number], of(held.cross), of(held.reference), held.missing, means)
