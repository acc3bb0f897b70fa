"""Calibrated encoding of the hyperfunction codec: small errors of products, not of weights.

The objective is ``tr(E H E^T)`` with the error ``E (rows, length)`` and the second moments ``H`` of
the inputs. Rows are independent; so are the codes of different groups, which makes the groups the
blocks of a block coordinate descent:

1. Groups are encoded one after the other, and the error of each is carried into the columns that
   are still to come, where it costs least (block form of GPTQ: Frantar et al., arXiv 2210.17323;
   as LDLQ: Chee et al., arXiv 2307.13304).
2. Sweeps over the groups encode each again for what its error should be, given all others. The
   search itself weighs all errors of a group alike, so steps are also tried that correct only the
   directions in which an error is expensive. A row keeps its old codes where new ones are worse.
3. The scales of a row, given its codes, are a linear least-squares problem.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs import hyper_format, hyper_viterbi, native
from onnxcomp.passes.codecs.codec import Array
from onnxcomp.passes.codecs.hyper_format import LANES, Geometry
from onnxcomp.passes.codecs.hyper_tables import spread, table

__all__ = ["Coder", "encode"]

# What the sweeps correct: None for all directions in full, else a direction in proportion to what
# an error in it costs, up to this many times the mean cost, and in full from there on.
_STEPS = (None, None, 0.1, 0.3, 1.0, 3.0)

# Weights that are worked on at a time, in float64.
_CHUNK = 1 << 22

# How often the diagonal is raised when the moments cannot be factored.
_ESCALATIONS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Coder:
    """Plain encoding and decoding of matrices with one set of parameters.

    Attributes:
        bits: Bits per weight.
        state_bits: Bits of a state.
        group: Weights of a group.
        threads: Threads of the native encoder.
    """

    bits: int
    state_bits: int
    group: int
    threads: int = 1

    @property
    def table(self) -> Array:
        """Values of the states."""
        return table(self.bits, self.state_bits)

    def geometry(self, rows: int, length: int) -> Geometry:
        """Sizes of a matrix."""
        return Geometry(self.bits, self.state_bits, self.group, rows, length)

    def encode(self, weight: Array) -> tuple[Array, Array]:
        """Codes and scales of ``(rows, length)`` float32; equal with and without native code."""
        geometry = self.geometry(*weight.shape)
        reach = spread(self.bits, self.state_bits)
        if native.available():
            return native.hyper_encode(weight, geometry, self.table, reach, threads=self.threads)
        return hyper_viterbi.encode(weight, geometry, self.table, reach)

    def decode(self, codes: Array, scales: Array, extent: tuple[int, int]) -> Array:
        """Float32 ``(rows, length)``; equal with and without native code."""
        if native.available():
            return native.hyper_decode(
                codes, scales, self.table, self.geometry(*extent), threads=self.threads
            )
        return hyper_format.decode(codes, scales, self.table, extent, self.group)


@dataclasses.dataclass(frozen=True, slots=True)
class _Metric:
    """The objective and what follows from it, for all rows alike.

    Attributes:
        blocks: Columns of each group.
        moments: H, float64 ``(length, length)``.
        carry: For each group what an error of 1 in it asks of the columns after it.
        inverse: Inverses of the diagonal blocks of H.
        steps: For each group and each of `_STEPS` the matrix that picks what is corrected.
    """

    blocks: tuple[slice, ...]
    moments: Array
    carry: tuple[Array, ...]
    inverse: tuple[Array, ...]
    steps: tuple[tuple[Array | None, ...], ...]

    @classmethod
    def of(cls, moments: Array, group: int) -> _Metric:
        moments, inverse = _positive(moments)
        # H^-1 = U^T U: the rows of U are the conditional distributions of the columns in order.
        upper = np.linalg.cholesky(inverse).T
        length = len(moments)
        blocks = tuple(slice(a, min(a + group, length)) for a in range(0, length, group))
        own = [moments[b, b] for b in blocks]
        return cls(
            blocks,
            moments,
            tuple(np.linalg.solve(upper[b, b], upper[b, b.stop :]) for b in blocks),
            tuple(np.linalg.inv(block) for block in own),
            tuple(_directions(block) for block in own),
        )

    def costs(self, errors: Array, block: slice | None = None) -> Array:
        """Objective of each row, or what a group alone adds to it."""
        moments = self.moments if block is None else self.moments[block, block]
        return np.asarray(np.einsum("ij,ij->i", errors @ moments, errors))


def _positive(moments: Array) -> tuple[Array, Array]:
    """A positive definite matrix near the given one, and its inverse."""
    raised = float(np.trace(moments)) / len(moments) * 1e-6
    for _ in range(_ESCALATIONS):
        try:
            factor = np.linalg.cholesky(moments)
            half = np.linalg.solve(factor, np.eye(len(moments)))
            inverse = half.T @ half
            np.linalg.cholesky(inverse)
            return moments, inverse
        except np.linalg.LinAlgError:
            moments = moments + raised * np.eye(len(moments))
            raised *= 10.0
    mean = float(np.trace(moments)) / len(moments)
    return np.eye(len(moments)) * mean, np.eye(len(moments)) / mean


def _directions(block: Array) -> tuple[Array | None, ...]:
    costs, vectors = np.linalg.eigh(block)
    costs = np.maximum(costs, 0.0) / costs.mean()
    return tuple(
        None if step is None else (vectors * np.minimum(costs / step, 1.0)) @ vectors.T
        for step in _STEPS
    )


class _Rows:
    """Some rows on their way to their codes."""

    def __init__(self, weight: Array, coder: Coder, metric: _Metric) -> None:
        self.weight = weight.astype(np.float64)
        self.coder, self.metric = coder, metric
        count, groups = len(weight), len(metric.blocks)
        self.padded = -(-count // LANES) * LANES
        size = coder.group * coder.bits // 8
        self.codes = np.zeros((self.padded, groups, size), np.uint8)
        self.scales = np.zeros((self.padded, groups), np.float16)
        self.decoded = np.zeros_like(self.weight)

    def _search(self, target: Array) -> tuple[Array, Array, Array]:
        """Codes, scales and values of one group of all rows, row by row."""
        target = target.astype(np.float32)
        codes, scales = self.coder.encode(target)
        values = self.coder.decode(codes, scales, target.shape)
        flat = codes[:, 0].transpose(0, 2, 1, 3).reshape(self.padded, -1)
        return flat, scales.reshape(-1), values.astype(np.float64)

    def feed_forward(self) -> None:
        """Encode the groups in order, each with the errors of those before it carried into it."""
        target = self.weight.copy()
        for index, block in enumerate(self.metric.blocks):
            found = self._search(target[:, block])
            self.codes[:, index], self.scales[:, index], self.decoded[:, block] = found
            error = target[:, block] - self.decoded[:, block]
            target[:, block.stop :] -= error @ self.metric.carry[index]

    def sweep(self, step: int) -> None:
        """Encode each group again for its best error given the other groups."""
        for index, block in enumerate(self.metric.blocks):
            error = self.weight - self.decoded
            inverse = self.metric.inverse[index]
            # How far the group is from where its part of the objective vanishes.
            gap = (error @ self.metric.moments[:, block]) @ inverse
            direction = self.metric.steps[index][step]
            wanted = gap if direction is None else gap @ direction
            found = self._search(self.decoded[:, block] + wanted)
            left = gap - (found[2] - self.decoded[:, block])
            better = self.metric.costs(left, block) < self.metric.costs(gap, block)
            self._take(index, block, found, better)

    def _take(
        self, index: int, block: slice, found: tuple[Array, Array, Array], rows: Array
    ) -> None:
        numbers = np.flatnonzero(rows)
        self.codes[numbers, index] = found[0][numbers]
        self.scales[numbers, index] = found[1][numbers]
        self.decoded[numbers, block] = found[2][numbers]

    def refit(self) -> None:
        """Give each row the scales that suit its codes best."""
        shapes = self._unscaled()
        groups = len(self.metric.blocks)
        system = np.empty((len(shapes), groups, groups))
        right = np.empty((len(shapes), groups))
        wanted = self.weight @ self.metric.moments
        for i, block in enumerate(self.metric.blocks):
            right[:, i] = np.einsum("ij,ij->i", wanted[:, block], shapes[:, block])
            rotated = shapes[:, block] @ self.metric.moments[block]
            for j, other in enumerate(self.metric.blocks):
                system[:, i, j] = np.einsum("ij,ij->i", rotated[:, other], shapes[:, other])
        # A group of zeros has no scale to fit.
        empty = np.einsum("rii->ri", system) <= 0.0
        system += np.einsum("ri,ij->rij", empty.astype(np.float64), np.eye(groups))
        system += np.einsum("rii->ri", system)[:, :, None] * np.eye(groups) * 1e-9
        fitted = np.linalg.solve(system, right[..., None])[..., 0]
        with np.errstate(over="ignore"):
            scales = fitted.astype(np.float32).astype(np.float16)
        self._rescale(scales, shapes)

    def _unscaled(self) -> Array:
        """Decoded values for scales of 1."""
        ones = np.ones((self.padded // LANES, len(self.metric.blocks), LANES, 1), np.float16)
        return self.coder.decode(self._packed()[0], ones, self.weight.shape).astype(np.float64)

    def _rescale(self, scales: Array, shapes: Array) -> None:
        """Take over scales where they are valid and better."""
        valid = np.asarray(np.logical_and(np.isfinite(scales), scales >= 0).all(axis=1))
        scales = np.where(valid[:, None], scales, np.float16(0))
        spans = [block.stop - block.start for block in self.metric.blocks]
        decoded = shapes * np.repeat(scales.astype(np.float64), spans, axis=1)
        better = self.metric.costs(self.weight - decoded) < self.metric.costs(
            self.weight - self.decoded
        )
        numbers = np.flatnonzero(np.logical_and(better, valid))
        self.scales[numbers] = scales[numbers]
        self.decoded[numbers] = decoded[numbers]

    def _packed(self) -> tuple[Array, Array]:
        """Codes ``(P, G, D, 16, 4)`` and scales ``(P, G, 16, 1)``."""
        panels, groups = self.padded // LANES, len(self.metric.blocks)
        codes = self.codes.reshape(panels, LANES, groups, -1, 4).transpose(0, 2, 3, 1, 4)
        scales = self.scales.reshape(panels, LANES, groups).transpose(0, 2, 1)[..., None]
        return np.ascontiguousarray(codes), np.ascontiguousarray(scales)

    def run(self) -> tuple[Array, Array]:
        """All stages."""
        self.feed_forward()
        self.refit()
        for step in range(len(_STEPS)):
            self.sweep(step)
        self.refit()
        return self._packed()


def encode(weight: Array, coder: Coder, moments: Array) -> tuple[Array, Array]:
    """Encode ``(rows, length)`` for inputs with second moments `moments`.

    Args:
        weight: float32 ``(rows, length)``, finite.
        coder: The parameters.
        moments: H, float64 ``(length, length)``, symmetric; positive definite for any meaning.

    Returns:
        codes uint8 ``(P, G, D, 16, 4)`` and scales float16 ``(P, G, 16, 1)``.

    Raises:
        ModelError: A group is too large for a float16 scale.
    """
    metric = _Metric.of(moments, coder.group)
    rows, length = weight.shape
    step = max(LANES, _CHUNK // length // LANES * LANES)
    parts = [
        _Rows(weight[start : start + step], coder, metric).run() for start in range(0, rows, step)
    ]
    codes, scales = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(scales)
