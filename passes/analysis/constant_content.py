"""What a tensor holds that only constants hold: patterns that training does not leave behind.

*Sequences* are lines in which every element follows from the two before it, ``w[i+1] + w[i-1] =
c w[i]`` with one c for each line: ramps (c = 2), sines and cosines (c = 2 cos t), exponentials.
*Wavelets* are lines that are as narrow in time and frequency together as lines can be: pieces of
sines under a window, of different frequencies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from onnxcomp.passes.weight import Array, picked_rows

__all__ = ["TRANSFORMS", "computed_content", "distinct", "may_be", "product_content", "sample"]

_FOURIER, _WAVELETS = "rows of a Fourier transform", "sines under a window"
_TRANSFORM = "an orthogonal transform"

# What `product_content` says of dense matrices that a signal is multiplied by.
TRANSFORMS = frozenset((_FOURIER, _WAVELETS, _TRANSFORM))

# Distinct values of a tensor that is computed with element by element. 256 is what a byte indexes;
# learned positions in bfloat16, the coarsest that are met, have some four thousand.
_FEW = 256
# and elements for each of them, so that chance makes no table.
_REPEATS = 16
# Values that 16 bits do not hold, and multiples of 1/256, repeat only where a rule made them: the
# most of these.
_MANY, _FINE_STEP = 1 << 16, 256.0

# A lattice: multiples of 1/16 below 2^15. Trained weights are below 1 and no multiples.
_STEP, _REACH = 16.0, float(1 << 15)

# Shortest line that says something: 14 equations for one number. Error of the equations relative
# to the largest element: tables are computed from angles in float32, and an angle of 4096 is off
# by 2.4e-4; learned positions are smooth as well, but not better than some percent.
_SHORTEST, _RECURRENCE = 16, 2e-3
# Lines that are tested, and the share of them that must pass.
_LINES, _MOST = 256, 0.99

# A Fourier row: this share of its energy is in this many frequencies, of at least 64. Window
# functions spread one frequency over three, both signs over six; a window that fills four fifths of
# the row over twice as many. Noise has less than half of its energy there.
_ENERGY, _FREQUENCIES, _SHORTEST_ROW = 0.999, 12, 64
# Fourier rows differ: share of distinct frequencies.
_DISTINCT = 0.3

# A wavelet: its deviations in time and in angular frequency have at most this product. It is 0.5
# for a Gaussian window, 0.513 for Hann's and up to 0.547 for differences of low passes; smooth
# noise under a window has 0.7 and more, trained filters of sound several units.
_NARROW = 0.57

# A filter bank: this many bands without negative values, and this share of the elements zero.
_EMPTY = 0.6
_BANDS = 8

# Largest product of two different rows of an orthogonal matrix, relative to that of a row with
# itself, and the fewest rows. Products of trained rows are some tenths, and never all this small.
_ORTHOGONAL, _LEAST_ROWS = 1e-4, 16

# Elements that are looked at first, and lines that tell nearly all weights from transforms.
_SAMPLE, _FIRST = 1 << 16, 8


def sample(matrix: Array) -> tuple[Array, Array]:
    """Some rows and some columns of a matrix in float32, as rows."""
    return _lines(matrix), _lines(matrix.T)


def _lines(matrix: Array) -> Array:
    """Rows at equal distances, few enough that a large weight is not held again."""
    count, length = matrix.shape
    wanted = max(2 * _FREQUENCIES, min(_LINES, _SAMPLE // max(1, length)))
    chosen = np.linspace(0, count - 1, min(count, wanted)).astype(int)
    return picked_rows(matrix, chosen)


def may_be(lines: tuple[Array, Array], *, product: bool) -> bool:
    """Whether a part of a tensor looks like a constant, so that all of it is looked at.

    Args:
        lines: What `sample` gave.
        product: Whether the tensor is an operand of a product.
    """
    rows, columns = lines
    if product:
        dense = min(float((part != 0).mean()) for part in lines) > 1.0 - _EMPTY
        same = rows.min() == rows.max() or _is_repeated(rows) or _is_repeated(columns)
        return same or not dense or any(_sequence(p) or _is_transform(p) for p in lines)
    # Where lines are short, a value is not met as often in some of them as in all.
    larger = max(lines, key=np.size)
    few = distinct(larger, _limit(larger, 4 * larger.size)) is not None
    return few or _on_lattice(rows, _STEP) or _sequence(rows) or _sequence(columns)


def product_content(weight: Array) -> str:
    """What an operand of a product holds, in words; empty for a trained weight."""
    if weight.min() == weight.max():
        return "one value"
    rows, columns = sample(weight)
    if _is_repeated(weight) or _is_repeated(weight.T):
        return "the same line again and again"
    found = _selection(weight)
    if not found and (_sequence(rows) or _sequence(columns)):
        found = "sequences that follow a rule"
    if not found and (_is_fourier(rows) or _is_fourier(columns)):
        found = _FOURIER
    if not found and (_is_wavelets(rows) or _is_wavelets(columns)):
        found = _WAVELETS
    if not found and len(weight) == weight.shape[1] and _is_orthogonal(rows):
        found = _TRANSFORM
    return found or _bands(weight)


def computed_content(weight: Array, *, look_up: bool) -> str:
    """What a tensor holds that is computed with element by element; empty for a trained one.

    Args:
        weight: ``(rows, length)``.
        look_up: Whether a look-up lies between: a table of embeddings is learned.
    """
    if weight.min() == weight.max():
        return "one value"
    rows, columns = sample(weight)
    count = distinct(weight, _limit(rows, weight.size))
    if count is not None and (not look_up or count <= 2):
        return "two values" if count == 2 else f"{count} distinct values"
    # Values of -1, 0 and 1 alone are those of ternary weights.
    spread = max(-float(weight.min()), float(weight.max())) > 1.0
    if spread and all(map(functools.partial(_on_lattice, parts=1.0), _pieces(weight))):
        return "integers"
    points = spread and all(map(functools.partial(_on_lattice, parts=_STEP), _pieces(weight)))
    if not look_up and points:
        return "points of a lattice"
    return "sequences that follow a rule" if _sequence(rows) or _sequence(columns) else ""


def _limit(lines: Array, size: int) -> int:
    """Distinct values up to which so many elements are a table.

    Args:
        lines: Some of the elements.
        size: How many there are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        halves = bool((lines.astype(np.float16).astype(np.float32) == lines).all())
    coarse = halves or bool(((lines.view(np.uint32) & 0xFFFF) == 0).all())
    made = not coarse or _on_lattice(lines, _FINE_STEP)
    return min(_MANY if made else _FEW, size // _REPEATS)


def distinct(values: Array, most: int) -> int | None:
    """How many distinct values there are; None for more than `most`. Reads in pieces."""
    known = np.empty(0, values.dtype)
    for part in _pieces(values):
        known = np.union1d(known, part)
        if len(known) > most:
            return None
    return len(known)


def _pieces(values: Array) -> Iterator[Array]:
    """A matrix in pieces of some rows, or a vector in pieces."""
    step = max(1, _SAMPLE * len(values) // max(1, values.size))
    return (values[start : start + step] for start in range(0, len(values), step))


def _on_lattice(weight: Array, parts: float) -> bool:
    """Whether all elements are multiples of a part of one, and none is too large for a lattice."""
    largest = max(-float(weight.min()), float(weight.max()))
    if largest >= _REACH:
        return False
    scaled = weight * np.float32(parts)
    return bool((scaled == np.rint(scaled)).all())


def _selection(weight: Array) -> str:
    """Zeros and one other value, at most one of these in each row or in each column."""
    held = weight != 0
    count = int(np.count_nonzero(held))
    if not count or count > max(weight.shape):
        return ""
    if len(np.unique(weight[held])) != 1:
        return ""
    single = held.sum(axis=1).max() == 1 or held.sum(axis=0).max() == 1
    return "a selection of elements" if single else ""


def _sequence(lines: Array) -> bool:
    """Whether lines are ramps, sines or exponentials."""
    count, length = lines.shape
    return count >= 2 and length >= _SHORTEST and _follow(np.asarray(lines, np.float64))


def _follow(lines: Array) -> bool:
    """Whether each element of a line follows from the two before it."""
    middle, ends = lines[:, 1:-1], lines[:, 2:] + lines[:, :-2]
    power = np.square(middle).sum(axis=1)
    factor = (middle * ends).sum(axis=1) / np.where(power > 0.0, power, 1.0)
    wrong = np.abs(ends - factor[:, None] * middle).max(axis=1)
    largest = np.abs(lines).max(axis=1)
    alive = largest > 0.0
    passed = wrong[alive] <= _RECURRENCE * largest[alive]
    # One value throughout a line follows the rule as well and says nothing.
    varied = np.ptp(lines, axis=1)[alive] > 1e-3 * largest[alive]
    return bool(alive.any() and passed.mean() >= _MOST and varied.mean() >= 0.5)


def _is_fourier(lines: Array) -> bool:
    """Whether lines have few frequencies, and different ones: a transform written as a product."""
    count, length = lines.shape
    if length < _SHORTEST_ROW or count < _FREQUENCIES or _too_few(_pure_lines, lines):
        return False
    pure, power = _pure_lines(lines)
    return bool(len(pure)) and pure.mean() >= _MOST and _differ(power)


def _too_few(test: Callable[[Array], tuple[Array, Array]], lines: Array) -> bool:
    """Whether so many of some lines fail a test that all of them cannot pass it."""
    passed, _ = test(lines[:: max(1, len(lines) // _FIRST)])
    return int(np.count_nonzero(~passed)) > (1.0 - _MOST) * len(lines)


def _differ(power: Array) -> bool:
    """Whether the strongest frequencies of lines are different ones."""
    return len(set(power.argmax(axis=1))) >= _DISTINCT * len(power)


def _pure_lines(lines: Array) -> tuple[Array, Array]:
    """Which lines that are not zero have few frequencies, and their power by frequency."""
    length = lines.shape[1]
    power = np.square(np.abs(np.fft.rfft(np.asarray(lines, np.float64), axis=1)))
    power[:, 1 : (length + 1) // 2] *= 2  # both signs
    total = power.sum(axis=1)
    alive = total > 0.0
    largest = np.sort(power[alive], axis=1)[:, -_FREQUENCIES // 2 :].sum(axis=1)
    return np.asarray(largest >= _ENERGY * total[alive]), power[alive]


def _is_transform(lines: Array) -> bool:
    """Whether lines may be those of one of the transforms below."""
    return _is_fourier(lines) or _is_wavelets(lines) or _is_orthogonal(lines)


def _is_wavelets(lines: Array) -> bool:
    """Whether lines are pieces of sines under a window, of different frequencies."""
    few = lines.shape[1] < _SHORTEST_ROW or len(lines) < _FREQUENCIES
    if few or _too_few(_narrow_lines, lines):
        return False
    narrow, power = _narrow_lines(lines)
    return bool(len(narrow)) and narrow.mean() >= _MOST and _differ(power)


def _narrow_lines(lines: Array) -> tuple[Array, Array]:
    """Which lines that are not zero are narrow in time and frequency, and their power by these."""
    shares = np.square(np.asarray(lines, np.float64))
    alive = shares.sum(axis=1) > 0.0
    length = lines.shape[1]
    power = np.square(np.abs(np.fft.rfft(np.asarray(lines[alive], np.float64), 4 * length, axis=1)))
    widths = _deviation(shares[alive]) * _deviation(power) * (np.pi / (2 * length))
    return np.asarray(widths <= _NARROW), power


def _deviation(weights: Array) -> Array:
    """Standard deviation of the place in each row, in elements, by non-negative weights."""
    places = np.arange(weights.shape[1])
    total = weights.sum(axis=1)
    mean = (weights * places).sum(axis=1) / total
    spread: Array = np.sqrt((weights * np.square(places - mean[:, None])).sum(axis=1) / total)
    return spread


def _is_orthogonal(rows: Array) -> bool:
    """Whether rows have one length and stand on one another: rotations, Hadamard matrices."""
    if len(rows) < _LEAST_ROWS or rows.shape[1] < len(rows):
        return False
    wide = np.asarray(rows, np.float64)
    unit = float(np.einsum("ij,ij->i", wide, wide).mean())

    def apart(some: Array) -> bool:
        gram = some @ some.T
        return bool(np.abs(gram - unit * np.eye(len(some))).max() <= _ORTHOGONAL * unit)

    # A few rows tell nearly all weights; products of all of them cost as much as encoding does.
    return apart(wide[:_LEAST_ROWS]) and apart(wide)


def _is_repeated(lines: Array) -> bool:
    """Whether there is one row, copied: filters that treat all channels alike."""
    return len(lines) > 1 and lines.shape[1] >= _SHORTEST and bool((lines == lines[0]).all())


def _bands(weight: Array) -> str:
    """Rows or columns of one stretch without negative values each, one behind the other."""
    held = weight != 0
    if (weight < 0).any() or held.mean() > 1.0 - _EMPTY:
        return ""
    for lines in (held, held.T):
        alive = lines[lines.any(axis=1)]
        count, length = alive.shape
        if count < _BANDS or length < _SHORTEST:
            continue
        first, last = alive.argmax(axis=1), length - 1 - alive[:, ::-1].argmax(axis=1)
        whole = alive.sum(axis=1) == last - first + 1
        ordered = (np.diff(first) >= 0).all() and (np.diff(last) >= 0).all()
        if whole.mean() >= _MOST and ordered and last[-1] > first[0] + length // 2:
            return "bands of a filter bank"
    return ""
