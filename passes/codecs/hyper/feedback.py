"""Calibrated encoding of the hyperfunction codec: small errors of products, not of weights.

The objective is ``tr(E H E^T)`` with the error ``E (rows, length)`` and the second moments ``H`` of
the inputs. Rows are independent, and so are the codes of different groups.

1. Groups are encoded one after the other, and the error of each is carried into the columns that
   are still to come, where it costs least (`metric`). Within a group the trellis search does the
   same from weight to weight (`survivors`), in the rotated domain and around the cycle.
2. The scales of a row, given its codes, are a linear least-squares problem.
3. A sweep over the groups encodes each again for what its error should be, given all others. A row
   keeps its old codes where new ones are worse. Then the scales once more.

What follows in numpy is the definition. The native encoder, which is some hundred times as fast,
gives the same bytes: values are float32, products of matrices are summed in the order of their
columns, each with one rounding, and sums over a group or a row are float64.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper import survivors as hyper_survivors
from onnxcomp.passes.codecs.hyper import viterbi as hyper_viterbi
from onnxcomp.passes.codecs.hyper.format import LANES, GroupLayout
from onnxcomp.passes.codecs.hyper.fused import fused
from onnxcomp.passes.codecs.hyper.metric import Metric
from onnxcomp.passes.codecs.hyper.structured import Code, code
from onnxcomp.passes.weight import Array

__all__ = ["SWEEPS", "Coder", "encode"]

# Sweeps after the first pass; one gains 1 to 4 %, a second one next to nothing.
SWEEPS = 1

# Weights that are worked on at a time.
_CHUNK = 1 << 20

# Elements of another type than float32 that are converted at a time.
_CONVERTED = 1 << 22

# Largest finite float16.
_LARGEST = 65504.0


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

    def encode_stored(self, weight: Array) -> tuple[Array, Array]:
        """The same for any floating-point type; float32 values count, and are never all held."""
        if weight.dtype == np.float32:
            return self.encode(weight)
        step = max(1, _CONVERTED // (weight.shape[1] * LANES)) * LANES  # panels are independent
        parts = [
            self.encode(np.asarray(weight[start : start + step], np.float32))
            for start in range(0, len(weight), step)
        ]
        codes, scales = zip(*parts, strict=True)
        return np.concatenate(codes), np.concatenate(scales)

    def decode(self, codes: Array, scales: Array, extent: tuple[int, int]) -> Array:
        """Float32 ``(rows, length)``; equal with and without native code."""
        if native.available():
            return native.hyper_decode(
                codes, scales, self.table, self.geometry(*extent), threads=self.threads
            )
        return hyper_format.decode(codes, scales, self.table, extent, self.group)


def _product(x: Array, matrix: Array) -> Array:
    """``x @ matrix.T`` in float32, summed in the order of the columns."""
    total = np.zeros((len(x), len(matrix)), np.float32)
    for column in range(x.shape[1]):
        total = fused(x[:, column, None], matrix[None, :, column], total)
    return total


def _plus_products(total: Array, a: Array, b: Array) -> Array:
    """``total + (a * b).sum(axis=1)`` in float64, added one by one."""
    terms = a.astype(np.float64) * b.astype(np.float64)
    return np.asarray(np.concatenate([total[:, None], terms], axis=1).cumsum(axis=1)[:, -1])


def _half(scale: Array) -> Array:
    """Scales rounded to float16, through float32; float64."""
    with np.errstate(over="ignore"):
        return np.asarray(scale.astype(np.float32).astype(np.float16).astype(np.float64))


class _Group:
    """One group of some rows: encoded plainly, then for its cost, then with the best scale."""

    def __init__(self, target: Array, coder: Coder, cost: Array) -> None:
        self.target, self.coder, self.cost = target, coder, cost
        count = len(target)
        geometry = coder.geometry(*target.shape)
        table, reach, passes, _ = coder.code
        codes, scales = hyper_viterbi.encode(target, geometry, table, reach, passes=passes)
        self.pulled = _product(target, cost)
        self.rotated = hyper_viterbi.rotated(target)
        self.path = hyper_format.states(codes, coder.state_bits, coder.group)[:count, 0]
        self.scales = scales.reshape(-1)[:count].astype(np.float64)
        self.shapes = self._shapes(self.path)
        self.costs = self._costs(self.shapes, _product(self.shapes, cost), self.scales)

    def _shapes(self, path: Array) -> Array:
        """Weights for scales of 1, exact in float32."""
        group = self.coder.group
        values = self.coder.table.astype(np.float32)[path] @ hyper_format.hadamard(group)
        return np.asarray(values * hyper_format.signs(group) * hyper_format.SCALE_UNIT)

    def _costs(self, shapes: Array, moved: Array, scales: Array) -> Array:
        """Cost of each row's errors; `moved` is the product of the shapes with the cost."""
        error = self.target - scales[:, None] * shapes
        pulled = self.pulled - scales[:, None] * moved
        return _plus_products(np.zeros(len(error)), pulled, error)

    def refine(self, search: hyper_survivors.Prices) -> None:
        """Search anew for the cost, with the stem at the start as it is; keep what is better."""
        coder, group = self.coder, self.coder.group
        order = (search.start + np.arange(group)) % group
        scale = group * self.scales
        factor = np.divide(4096.0, scale, out=np.zeros_like(scale), where=scale > 0)
        targets = self.rotated[:, order] * factor.astype(np.float32)[:, None]
        stems = self.path[:, order[-1]] >> coder.bits
        path = np.empty_like(self.path)
        path[:, order] = hyper_survivors.search(targets, stems, search, coder.table, coder.bits)
        shapes = self._shapes(path)
        moved = _product(shapes, self.cost)
        scales = self._fitted(shapes, moved)
        costs = self._costs(shapes, moved, scales)
        better = (costs < self.costs) & (scales > 0)
        self.path[better], self.scales[better] = path[better], scales[better]
        self.shapes[better], self.costs[better] = shapes[better], costs[better]

    def _fitted(self, shapes: Array, moved: Array) -> Array:
        """The scales with the least cost, rounded to float16."""
        nothing = np.zeros(len(shapes))
        product = _plus_products(nothing, self.pulled, shapes)
        square = _plus_products(nothing, moved, shapes)
        scales = np.divide(product, square, out=np.zeros_like(product), where=square > 0)
        return _half(np.clip(scales, 0.0, _LARGEST))


class _Rows:
    """Some rows on their way to their codes."""

    def __init__(self, weight: Array, coder: Coder, metric: Metric) -> None:
        self.coder, self.metric, self.length = coder, metric, weight.shape[1]
        count, size = len(weight), metric.groups * metric.group
        self.weight = np.zeros((count, size), np.float32)
        self.weight[:, : self.length] = weight
        self.shapes = np.zeros_like(self.weight)
        self.errors = np.zeros_like(self.weight)
        self.wanted = np.zeros_like(self.weight)
        # By two groups what one asks by the moments of the other one, for a scale of 1: before a
        # sweep comes to the earlier group, what the later one asks of it, and then the reverse.
        self.asked: dict[tuple[int, int], Array] = {}
        self.paths = np.zeros((count, metric.groups, metric.group), np.uint16)
        self.scales = np.zeros((count, metric.groups))

    def _columns(self, index: int) -> slice:
        return slice(index * self.metric.group, (index + 1) * self.metric.group)

    def _search(self, target: Array, index: int, *, ahead: bool) -> _Group:
        cost = self.metric.ahead if ahead else self.metric.alone
        found = _Group(target, self.coder, cost[index])
        for search in self.metric.searches(index, ahead=ahead):
            found.refine(search)
        return found

    def _gathered(self, columns: Array, matrix: Array, index: int, end: int) -> Array:
        """What columns of the groups before `end` ask of one group."""
        total = np.zeros((len(self.weight), self.metric.group), np.float32)
        for other in map(self._columns, range(end)):
            total += _product(columns[:, other], matrix[self._columns(index), other])
        return total

    def _ask(self, origin: int, of: int) -> Array:
        """What the shapes of one group ask of another one."""
        one, other = self._columns(origin), self._columns(of)
        return _product(self.shapes[:, one], self.metric.moments[other, one])

    def ask_earlier(self) -> None:
        """Find what shapes ask of the groups before theirs, and of their own."""
        for later in range(self.metric.groups):
            for earlier in range(later + 1):
                self.asked[earlier, later] = self._ask(later, earlier)

    def _slope(self, index: int) -> Array:
        """The slope of the objective by the errors of a group that a sweep has come to."""
        found = self.wanted[:, self._columns(index)].copy()
        for other in range(self.metric.groups):
            scales = self.scales[:, other, None].astype(np.float32)
            found -= scales * self.asked[min(index, other), max(index, other)]
        return found

    def feed_forward(self) -> None:
        """Encode the groups in order, each with the errors of those before it carried into it."""
        everyone = np.ones(len(self.weight), bool)
        for index in range(self.metric.groups):
            target = self._gathered(self.errors, self.metric.behind, index, index)
            target += self.weight[:, self._columns(index)]
            self._take(index, self._search(target, index, ahead=True), everyone)

    def sweep(self) -> None:
        """Encode each group again for its best error given the other groups."""
        for index in range(self.metric.groups):
            columns = self._columns(index)
            slope = self._slope(index)
            # How far the group is from where its part of the objective vanishes.
            gap = _product(slope, self.metric.inverse[index])
            before = _plus_products(np.zeros(len(gap)), slope, gap)
            target = (self.weight[:, columns] - self.errors[:, columns]) + gap
            found = self._search(target, index, ahead=False)
            self._take(index, found, found.costs < before)
            for later in range(index, self.metric.groups):
                self.asked[index, later] = self._ask(index, later)

    def _take(self, index: int, found: _Group, rows: Array) -> None:
        self.paths[rows, index] = found.path[rows]
        self.scales[rows, index] = found.scales[rows]
        self.shapes[rows, self._columns(index)] = found.shapes[rows]
        self._set_errors(index)

    def _set_errors(self, index: int) -> None:
        columns = self._columns(index)
        scales = self.scales[:, index, None].astype(np.float32)
        self.errors[:, columns] = self.weight[:, columns] - self.shapes[:, columns] * scales
        self.errors[:, self.length :] = 0

    def refit(self, *, swept: bool) -> None:
        """Give each row the scales that suit its codes best.

        Args:
            swept: Whether a sweep has come to all groups.
        """
        system, right = self._system(swept)
        fitted = _half(_solved(system, right))
        valid = np.asarray(((fitted >= 0) & (fitted <= _LARGEST)).all(axis=1))
        fitted = np.where(valid[:, None], fitted, 0.0)
        change = np.zeros(len(fitted))
        for i in range(self.metric.groups):
            slope = np.zeros(len(fitted))
            for j in range(self.metric.groups):
                slope += system[:, max(i, j), min(i, j)] * (fitted[:, j] + self.scales[:, j])
            change += (fitted[:, i] - self.scales[:, i]) * (slope - 2.0 * right[:, i])
        better = np.logical_and(valid, change < 0)
        self.scales[better] = fitted[better]
        for index in range(self.metric.groups):
            self._set_errors(index)

    def _system(self, swept: bool) -> tuple[Array, Array]:
        """The normal equations: ``(rows, G, G)``, of which the lower half is set; ``(rows, G)``."""
        count, groups = len(self.weight), self.metric.groups
        system, right = np.zeros((count, groups, groups)), np.zeros((count, groups))
        nothing = np.zeros(count)
        for i in range(groups):
            own = self.shapes[:, self._columns(i)]
            for j in range(i + 1):
                other = own if swept else self.shapes[:, self._columns(j)]
                system[:, i, j] = _plus_products(nothing, self.asked[j, i], other)
            right[:, i] = _plus_products(nothing, self.wanted[:, self._columns(i)], own)
        for i in range(groups):  # a group of zeros keeps its scale
            empty = ~(system[:, i, i] > 0)
            system[empty, i, i], right[empty, i] = 1.0, self.scales[empty, i]
        return system, right

    def run(self) -> tuple[Array, Array]:
        """All stages."""
        self.feed_forward()
        groups, moments = self.metric.groups, self.metric.moments
        for index in range(groups):
            found = self._gathered(self.weight, moments, index, groups)
            self.wanted[:, self._columns(index)] = found
        self.ask_earlier()
        self.refit(swept=False)
        for sweep in range(SWEEPS):
            if sweep > 0:
                self.ask_earlier()
            self.sweep()
            self.refit(swept=True)
        symbols = (self.paths >> (self.coder.state_bits - self.coder.bits)).astype(np.uint8)
        codes = hyper_format.pack(symbols, self.coder.bits)
        return codes, hyper_format.pack_scales(self.scales.astype(np.float16))


def _solved(system: Array, right: Array) -> Array:
    """Solve a system for each row by Cholesky's method: ``(rows, G)``, NaN where that fails."""
    groups = system.shape[1]
    factor, x = np.zeros_like(system), right.copy()
    with np.errstate(invalid="ignore", divide="ignore"):
        for i in range(groups):
            for j in range(i + 1):
                rest = system[:, i, j].copy()
                if i == j:
                    rest += rest * 1e-9
                for k in range(j):
                    rest -= factor[:, i, k] * factor[:, j, k]
                factor[:, i, j] = np.sqrt(rest) if i == j else rest / factor[:, j, j]
        for i in range(groups):
            for k in range(i):
                x[:, i] -= factor[:, i, k] * x[:, k]
            x[:, i] /= factor[:, i, i]
        for i in reversed(range(groups)):
            for k in range(i + 1, groups):
                x[:, i] -= factor[:, k, i] * x[:, k]
            x[:, i] /= factor[:, i, i]
    return x


def encode(weight: Array, coder: Coder, moments: Array) -> tuple[Array, Array]:
    """Encode ``(rows, length)`` for inputs with second moments `moments`.

    Args:
        weight: float32 ``(rows, length)``, finite.
        coder: The parameters.
        moments: H ``(length, length)``, symmetric; positive definite for any meaning. Of float32
            they may be changed.

    Returns:
        codes uint8 ``(P, G, D, 16, 4)`` and scales float16 ``(P, G, 16, 1)``.

    Raises:
        ModelError: A group is too large for a float16 scale.
    """
    metric = Metric.of(moments, coder.group)
    rows, length = weight.shape
    if native.available():
        return native.hyper_feedback(
            weight,
            coder.geometry(rows, length),
            metric,
            coder.code,
            sweeps=SWEEPS,
            threads=coder.threads,
        )
    step = max(LANES, _CHUNK // length // LANES * LANES)
    parts = [
        _Rows(weight[start : start + step], coder, metric).run() for start in range(0, rows, step)
    ]
    codes, scales = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(scales)
