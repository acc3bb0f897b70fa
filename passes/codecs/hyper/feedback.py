"""Calibrated encoding of the hyperfunction codec: small errors of products, not of weights.

The objective is ``tr(E H E^T)`` with the error ``E (rows, length)`` and the second moments ``H`` of
the inputs. Rows are independent, and so are the codes of different groups.

1. Groups are encoded one after the other, and the error of each is carried into the columns that
   are still to come, where it costs least (block form of GPTQ: Frantar et al., arXiv 2210.17323;
   as LDLQ: Chee et al., arXiv 2307.13304). Within a group the trellis search does the same from
   weight to weight (`hyper_survivors`), in the rotated domain and around the cycle.
2. A sweep over the groups encodes each again for what its error should be, given all others. A row
   keeps its old codes where new ones are worse.
3. The scales of a row, given its codes, are a linear least-squares problem.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper import survivors as hyper_survivors
from onnxcomp.passes.codecs.hyper import viterbi as hyper_viterbi
from onnxcomp.passes.codecs.hyper.format import LANES, GroupLayout
from onnxcomp.passes.codecs.hyper.structured import Code, code
from onnxcomp.passes.codecs.hyper.survivors import Prices
from onnxcomp.passes.weight import Array

__all__ = ["Coder", "encode"]

# Sweeps after the first pass; one gains 1 % at most, a second one nothing.
_SWEEPS = 1

# Weights that are worked on at a time, in float64.
_CHUNK = 1 << 20

# Cost of an error on the padding of a group, in mean costs of its weights.
_PADDING = 1e-3

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
        kind: Kind of table.
    """

    bits: int
    state_bits: int
    group: int
    threads: int = 1
    kind: str = "winding"

    @property
    def code(self) -> Code:
        """The table and how it is used."""
        return code(self.bits, self.state_bits, self.kind)

    @property
    def table(self) -> Array:
        """Values of the states."""
        return self.code.table

    def geometry(self, rows: int, length: int) -> GroupLayout:
        """Sizes of a matrix."""
        return GroupLayout(self.bits, self.state_bits, self.group, rows, length)

    def encode(self, weight: Array) -> tuple[Array, Array]:
        """Codes and scales of ``(rows, length)`` float32; equal with and without native code."""
        geometry = self.geometry(*weight.shape)
        table, reach, passes, _ = self.code
        if native.available():
            return native.hyper_encode(
                weight, geometry, table, reach, passes=passes, threads=self.threads
            )
        return hyper_viterbi.encode(weight, geometry, table, reach, passes=passes)

    def search(self, targets: Array, stems: Array, prices: Prices) -> Array:
        """`hyper_survivors.search`; equal with and without native code."""
        if native.available():
            return native.hyper_survivors(
                targets, stems, prices, self.table, self.bits, threads=self.threads
            )
        return hyper_survivors.search(targets, stems, prices, self.table, self.bits)

    def decode(self, codes: Array, scales: Array, extent: tuple[int, int]) -> Array:
        """Float32 ``(rows, length)``; equal with and without native code."""
        if native.available():
            return native.hyper_decode(
                codes, scales, self.table, self.geometry(*extent), threads=self.threads
            )
        return hyper_format.decode(codes, scales, self.table, extent, self.group)


@dataclasses.dataclass(frozen=True, slots=True)
class _GroupCost:
    """What errors of one group cost.

    Attributes:
        moments: By column, float64 ``(width, width)``.
        prices: By place in the rotated group, for searches from the first and the middle weight.
    """

    moments: Array
    prices: tuple[Prices, Prices]

    @classmethod
    def of(cls, moments: Array, group: int) -> _GroupCost:
        """The costs of a group from those of its columns; padding costs next to nothing."""
        width = len(moments)
        mean = float(np.trace(moments)) / width
        whole = np.eye(group) * (mean * _PADDING)
        whole[:width, :width] = moments
        rotation = _rotation(group)
        rotated = rotation.T @ whole @ rotation
        return cls(moments, (Prices.of(rotated, 0), Prices.of(rotated, group // 2)))

    def costs(self, errors: Array) -> Array:
        """Cost of each row of errors."""
        return np.asarray(np.einsum("ij,ij->i", errors @ self.moments, errors))


def _rotation(group: int) -> Array:
    """Orthogonal matrix from table values to weights, up to the scale: float64 ``(g, g)``."""
    turned = hyper_format.signs(group)[:, None] * hyper_format.hadamard(group)
    return np.asarray(turned.astype(np.float64) / np.sqrt(group))


@dataclasses.dataclass(frozen=True, slots=True)
class _Metric:
    """The objective and what follows from it, for all rows alike.

    Attributes:
        blocks: Columns of each group.
        moments: H, float64 ``(length, length)``.
        carry: For each group what an error of 1 in it asks of the columns after it.
        inverse: Inverses of the diagonal blocks of H.
        ahead: Costs of each group's errors when the columns after it make up for them.
        alone: Costs of each group's errors when all other columns are fixed.
    """

    blocks: tuple[slice, ...]
    moments: Array
    carry: tuple[Array, ...]
    inverse: tuple[Array, ...]
    ahead: tuple[_GroupCost, ...]
    alone: tuple[_GroupCost, ...]

    @classmethod
    def of(cls, moments: Array, group: int) -> _Metric:
        """What errors in groups of `group` columns cost, for inputs with these second moments."""
        moments, inverse = _positive(moments)
        # H^-1 = U^T U: the rows of U are the conditional distributions of the columns in order.
        upper = np.linalg.cholesky(inverse).T
        length = len(moments)
        blocks = tuple(slice(a, min(a + group, length)) for a in range(0, length, group))
        remaining = [np.linalg.inv(upper[b, b].T @ upper[b, b]) for b in blocks]
        return cls(
            blocks,
            moments,
            tuple(np.linalg.solve(upper[b, b], upper[b, b.stop :]) for b in blocks),
            tuple(np.linalg.inv(moments[b, b]) for b in blocks),
            tuple(_GroupCost.of((block + block.T) / 2, group) for block in remaining),
            tuple(_GroupCost.of(moments[b, b], group) for b in blocks),
        )

    def costs(self, errors: Array) -> Array:
        """Objective of each row."""
        return np.asarray(np.einsum("ij,ij->i", errors @ self.moments, errors))


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """One encoded group of some rows.

    Attributes:
        codes: Bit strings, uint8 ``(rows, bytes)``.
        scales: float16 ``(rows,)``.
        values: Decoded weights, float64 ``(rows, width)``.
    """

    codes: Array
    scales: Array
    values: Array


class _Group:
    """One group of some rows: encoded plainly, then for its cost, then with the best scale."""

    def __init__(self, target: Array, coder: Coder, cost: _GroupCost) -> None:
        self.target, self.coder, self.cost = target, coder, cost
        self.rotation = _rotation(coder.group)
        count, self.width = target.shape
        codes, scales = coder.encode(np.ascontiguousarray(target, np.float32))
        self.path = hyper_format.states(codes, coder.state_bits, coder.group)[:count, 0]
        self.scales = scales.reshape(-1)[:count].astype(np.float64)
        self.values = self._shapes(self.path) * self.scales[:, None]
        self.costs = cost.costs(target - self.values)

    @property
    def _unit(self) -> float:
        """Weight per table value and scale, before the rotation."""
        return float(np.sqrt(self.coder.group)) * float(hyper_format.SCALE_UNIT)

    def _shapes(self, path: Array) -> Array:
        """Weights for scales of 1."""
        values = self.coder.table.astype(np.float64)[path]
        return np.asarray((values @ self.rotation.T)[:, : self.width] * self._unit)

    def _rotated(self) -> Array:
        """Targets in table units, float64 ``(rows, group)``; zero where the scale is."""
        rotated = self.target @ self.rotation[: self.width]
        factor = self.scales[:, None] * self._unit
        return np.asarray(np.divide(rotated, factor, out=np.zeros_like(rotated), where=factor > 0))

    def refine(self, prices: Prices) -> None:
        """Search anew for the cost, with the stem at the start as it is; keep what is better."""
        order = (prices.start + np.arange(self.coder.group)) % self.coder.group
        stems = self.path[:, order[-1]] >> self.coder.bits
        targets = self._rotated()[:, order].astype(np.float32)
        path = np.empty_like(self.path)
        path[:, order] = self.coder.search(targets, stems, prices)
        shapes = self._shapes(path)
        scales = self._fitted(shapes)
        values = shapes * scales[:, None]
        costs = self.cost.costs(self.target - values)
        better = (costs < self.costs) & (scales > 0)
        self.path[better], self.scales[better] = path[better], scales[better]
        self.values[better], self.costs[better] = values[better], costs[better]

    def _fitted(self, shapes: Array) -> Array:
        """The scales with the least cost, rounded to float16."""
        product = np.einsum("ij,ij->i", self.target @ self.cost.moments, shapes)
        square = self.cost.costs(shapes)
        scales = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        limit = float(np.finfo(np.float16).max)
        return np.asarray(np.clip(scales, 0.0, limit).astype(np.float16).astype(np.float64))

    def run(self) -> _Found:
        """Both searches; the second one is free at the seam of the first."""
        for prices in self.cost.prices:
            self.refine(prices)
        symbols = (self.path >> (self.coder.state_bits - self.coder.bits)).astype(np.uint8)
        codes = hyper_format.pack(symbols[:, None], self.coder.bits)
        flat = codes[:, 0].transpose(0, 2, 1, 3).reshape(codes.shape[0] * LANES, -1)
        return _Found(flat[: len(symbols)], self.scales.astype(np.float16), self.values)


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

    def _search(self, target: Array, cost: _GroupCost) -> _Found:
        """Codes, scales and values of one group of all rows."""
        return _Group(target, self.coder, cost).run()

    def feed_forward(self) -> None:
        """Encode the groups in order, each with the errors of those before it carried into it."""
        target = self.weight.copy()
        everyone = np.ones(len(target), bool)
        for index, block in enumerate(self.metric.blocks):
            found = self._search(target[:, block], self.metric.ahead[index])
            self._take(index, block, found, everyone)
            error = target[:, block] - self.decoded[:, block]
            target[:, block.stop :] -= error @ self.metric.carry[index]

    def sweep(self) -> None:
        """Encode each group again for its best error given the other groups."""
        for index, block in enumerate(self.metric.blocks):
            error = self.weight - self.decoded
            # How far the group is from where its part of the objective vanishes.
            gap = (error @ self.metric.moments[:, block]) @ self.metric.inverse[index]
            cost = self.metric.alone[index]
            found = self._search(self.decoded[:, block] + gap, cost)
            left = gap - (found.values - self.decoded[:, block])
            self._take(index, block, found, cost.costs(left) < cost.costs(gap))

    def _take(self, index: int, block: slice, found: _Found, rows: Array) -> None:
        numbers = np.flatnonzero(rows)
        self.codes[numbers, index] = found.codes[numbers]
        self.scales[numbers, index] = found.scales[numbers]
        self.decoded[numbers, block] = found.values[numbers]

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
        for _ in range(_SWEEPS):
            self.sweep()
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
