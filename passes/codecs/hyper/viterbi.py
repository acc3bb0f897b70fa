"""Encoder of the hyperfunction codec in numpy: the definition that the native one is tested with.

Every (row, group) is brought to table units (signs, Hadamard transform, scale), and the Viterbi
algorithm finds the cyclic bit string whose table values come closest. Three searches: an open one,
whose middle state closes the cycle of the second, whose first state closes that of the third
(tail-biting); the scale is refitted by least squares after each. Costs are exact integers, so the
native encoder gives the same bytes on every machine.

Names: a state has L bits; its k top bits are the symbol, its L - k low bits are the `stem`, the
part shared with the previous state. Each stem has 2^k predecessors, ``(stem << k) | index``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs.hyper.format import GroupLayout, pack, pack_scales, signs
from onnxcomp.passes.codecs.hyper.tables import PASSES
from onnxcomp.passes.weight import Array

__all__ = ["PASSES", "encode", "out_of_range", "rotated"]

# Targets carry four bits after the point, in table units.
_FRACTION = 16
# Cost of a forbidden start: more than any difference that the first weights can make up.
_FAR = 1 << 29
# Integers of working memory of one search step.
_CHUNK = 1 << 20


def out_of_range() -> ModelError:
    """The error of a weight whose scales do not fit float16."""
    return ModelError(
        "weight values are too large for float16 scales (rms of a group above 5e3) or not finite",
        hint="keep this weight dense",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Trellis:
    """What each state adds to the cost of a path: ``square - target * slope``."""

    bits: int
    values: Array
    slope: Array
    square: Array

    @classmethod
    def of(cls, table: Array, bits: int) -> _Trellis:
        values = table.astype(np.int32)
        return cls(bits, values, values << bits, (values * values) << (bits + 3))

    @property
    def stems(self) -> int:
        return len(self.values) >> self.bits

    def step(self, cost: Array, target: Array) -> tuple[Array, Array]:
        """One weight: costs (n, stems) and targets (n,) -> next costs, best predecessor indices."""
        branches = 1 << self.bits
        states = np.arange(len(self.values), dtype=np.int32)
        paths = cost[:, states & (self.stems - 1)]
        paths += self.square - target[:, None] * self.slope
        # Costs are multiples of 2^k: the index rides in the low bits and settles ties.
        paths |= states & (branches - 1)
        best = paths.reshape(-1, self.stems, branches).min(axis=-1)
        cost = best & ~np.int32(branches - 1)
        if self.bits >= 5:  # else 256 steps of the largest costs stay below 2^31
            cost = cost - cost[:, :1]
        return cost, (best & (branches - 1)).astype(np.uint8)

    def search(self, targets: Array, path: Array, start: int, closed: bool) -> None:
        """Replace `path` (n, g) by the best one over the cycle that begins at weight `start`."""
        count, group = targets.shape
        everyone = np.arange(count)
        cost = np.full((count, self.stems), _FAR if closed else 0, np.int32)
        stem = path[:, start - 1] >> self.bits
        if closed:
            cost[everyone, stem] = 0
        order = (start + np.arange(group)) % group
        history = np.empty((group, count, self.stems), np.uint8)
        for step, t in enumerate(order):
            cost, history[step] = self.step(cost, targets[:, t])
        if not closed:
            stem = cost.argmin(axis=1)
        for step in range(group - 1, -1, -1):
            state = (stem << self.bits) | history[step, everyone, stem]
            path[:, order[step]] = state
            stem = state & (self.stems - 1)


def rotated(x: Array) -> Array:
    """Hadamard transform of ``sign * x`` in float32, with the native code's order of additions."""
    count, group = x.shape
    x = x * signs(group)
    half = 1
    while half < group:
        pairs = x.reshape(count, -1, 2, half)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([a + b, a - b], axis=2).reshape(count, group)
        half *= 2
    return x


def _to_half(scale: Array) -> Array:
    """Round float64 scales to float16, through float32; out of range is an error."""
    with np.errstate(over="ignore", under="ignore"):
        half = scale.astype(np.float32).astype(np.float16)
    if not np.isfinite(half).all():
        raise out_of_range()
    return half


def _targets(x: Array, half: Array) -> Array:
    """Targets in 1/16 of a table unit, int32."""
    scale = half.astype(np.float64) * x.shape[1]
    factor = np.divide(_FRACTION * 4096.0, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = x * factor.astype(np.float32)[:, None]
    limit = np.float32(32767)
    return np.asarray(np.rint(np.clip(scaled, -limit, limit)), np.int32)


def _encode_blocks(x: Array, trellis: _Trellis, spread: float, passes: int) -> tuple[Array, Array]:
    """Encode blocks (n, g): symbols uint8 (n, g) and scales float16 (n,)."""
    count, group = x.shape
    energy = np.square(x.astype(np.float64)).cumsum(axis=1)[:, -1]
    half = _to_half(np.sqrt(energy) * 4096.0 / (group * spread))
    with np.errstate(over="ignore", invalid="ignore"):
        x = rotated(x)
    path = np.zeros((count, group), np.int64)
    symbols = np.zeros((count, group), np.uint8)
    chosen, least = np.zeros(count, np.float16), np.zeros(count)
    for index in range(passes):
        targets = _targets(x, half)
        trellis.search(targets, path, index % 2 * group // 2, index > 0)
        values = trellis.values[path]
        product = (values * targets).sum(axis=1)
        square = np.square(values).sum(axis=1)
        used = (half > 0) & (product > 0)  # else zero is the better approximation
        projection = half.astype(np.float64) * (product / _FRACTION)
        refitted = np.divide(projection, square, out=np.zeros(count), where=used)
        half = np.where(used, _to_half(refitted), half)
        scale = half.astype(np.float64)
        error = scale * (scale * square - 2.0 * projection)
        better = used & (error < least) if index else np.zeros(count, bool)
        least, chosen = np.where(better, error, least), np.where(better, half, chosen)
        symbols[better] = path[better] >> (len(trellis.values).bit_length() - 1 - trellis.bits)
    symbols[chosen == 0] = 0
    return symbols, chosen


def encode(
    weight: Array, geometry: GroupLayout, table: Array, spread: float, *, passes: int = PASSES
) -> tuple[Array, Array]:
    """Encode ``(rows, length)``.

    Args:
        weight: float32 ``(rows, length)``, finite.
        geometry: Parameters and extent.
        table: int8 ``(2**state_bits,)``.
        spread: Root mean square of the targets, in table units, for the start scale.
        passes: Searches, at least 2.

    Returns:
        codes uint8 ``(P, G, D, 16, 4)`` and scales float16 ``(P, G, 16, 1)``.

    Raises:
        ModelError: A group is too large for a float16 scale.
    """
    rows, groups, group = geometry.rows, geometry.groups, geometry.group
    trellis = _Trellis.of(table, geometry.bits)
    symbols = np.empty((rows * groups, group), np.uint8)
    scales = np.empty(rows * groups, np.float16)
    step = max(1, (_CHUNK >> geometry.state_bits) // groups)
    for row in range(0, rows, step):
        part = weight[row : row + step]
        blocks = np.zeros((len(part), groups * group), np.float32)
        blocks[:, : geometry.length] = part
        target = slice(row * groups, (row + len(part)) * groups)
        encoded = _encode_blocks(blocks.reshape(-1, group), trellis, spread, passes)
        symbols[target], scales[target] = encoded
    codes = pack(symbols.reshape(rows, groups, group), geometry.bits)
    return codes, pack_scales(scales.reshape(rows, groups))
