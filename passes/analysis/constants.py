"""Tensors that are constants and no trained weights: masks, grids, position tables, filter banks.

Codes of few bits do more harm to them than to weights: an anchor grid with an error of 10 % moves
boxes by pixels, a mask of -1000 leaks. They are recognised by what reads them and by what they
hold, and both have to fit, since a wrong guess costs bytes:

=============  ====================================================================================
role           content that makes it a constant
=============  ====================================================================================
rotary cache   anything: the operator says what it is
elementwise    few distinct values, a lattice, or sequences (below). Trained tensors here (learned
               positions, scales of channels) have about as many values as elements
look-up        integers, two values, or sequences; a table of embeddings is none of these
product        a selection (zeros and one other value, at most one in each row or column),
               sequences, windowed Fourier rows, or bands of a filter bank
=============  ====================================================================================

*Sequences* are lines in which every element follows from the two before it, ``w[i+1] + w[i-1] =
c w[i]`` with one c for each line: ramps (c = 2), sines and cosines (c = 2 cos t), exponentials.
A look-up or a product reaches through Slice, Cast, Concat and the like to what computes with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.def_use import qualified_type
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.codecs.constant import ConstantCodec, ConstantParams
from onnxcomp.passes.ir.traversal import default_opset, find_initializer, is_default_domain
from onnxcomp.passes.weight import DTYPES, Array, Constant, ConstantForm, WeightSite

__all__ = ["EXACT", "mark_constants"]

# Operators that treat an operand element by element.
_ELEMENTWISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Mod", "PRelu"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
    )
)
_PRODUCTS = frozenset(("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"))

# Operators that hand elements on; of those that take indices the table is the first input.
_MOVES = frozenset(
    (
        *("Cast", "Concat", "Expand", "Flatten", "Gather", "GatherND", "GatherElements"),
        *("Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    )
)
_LOOK_UPS = frozenset(("Gather", "GatherND", "GatherElements"))

# Inputs that are caches of rotary embeddings, by operator.
_ROTARY = {
    "com.microsoft::RotaryEmbedding": (2, 3),
    "RotaryEmbedding": (1, 2),
    "com.microsoft::GroupQueryAttention": (7, 8),
}

# Distinct values of a tensor that is computed with element by element. 256 is what a byte indexes;
# learned positions in bfloat16, the coarsest that are met, have some four thousand.
_FEW = 256
# and elements for each of them, so that chance makes no table.
_REPEATS = 16

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

# A filter bank: this many bands without negative values, and this share of the elements zero.
_EMPTY = 0.6
_BANDS = 8

# Elements that are looked at first, and the most values that two bytes index.
_SAMPLE, _INDEX = 1 << 16, 1 << 16

# The operator set that has Range.
_RANGE_OPSET = 11

# What the reason of a tensor starts with that is kept exactly on purpose.
EXACT = "constant"


def mark_constants(model: ir.Model, sites: tuple[WeightSite, ...]) -> tuple[WeightSite, ...]:
    """The sites, those marked that are no trained weights; each is read once.

    Args:
        model: The canonical model.
        sites: Its weights.
    """
    opset = default_opset(model) or 0
    return tuple(_marked(model, site, opset) for site in sites)


def _marked(model: ir.Model, site: WeightSite, opset: int) -> WeightSite:
    value = find_initializer(model, site.name)
    role = None if value is None else _role(value)
    if role is None:
        return site
    if not role.rotary and not _may_be(_sample(_stored(value, site)), role):
        return site
    weight = read_weight(model, site)
    content = role.rotary or _content(weight, role)
    if not content:
        return site
    form, values = _form(site, weight, opset)
    if site.wide and not _exact_in_float32(value):
        form, values = "dense", 0
    kept = {"table": f"stored as {values} values and indices", "range": "stored as its two ends"}
    stored = kept.get(form, "stored in half precision" if form == "half" else "as it is")
    reason = f"{EXACT}: {content}, read by {', '.join(role.operators[:3])}; {stored}, bit for bit"
    return dataclasses.replace(site, constant=Constant(reason, form, values))


def _stored(value: ir.Value | None, site: WeightSite) -> Array:
    """The canonical matrix ``(rows, length)`` in the stored type, as a view of its file."""
    assert value is not None and value.const_value is not None
    array = np.asarray(value.const_value.numpy())
    if site.transposed:
        return array.reshape(site.length, site.rows).T
    return array.reshape(site.rows, site.length)


def _sample(matrix: Array) -> tuple[Array, Array]:
    """Some rows and some columns of a matrix in float32, as rows."""
    return _lines(matrix), _lines(matrix.T)


def _lines(matrix: Array) -> Array:
    """Rows at equal distances, few enough that a large weight is not held again."""
    count, length = matrix.shape
    wanted = max(2 * _FREQUENCIES, min(_LINES, _SAMPLE // max(1, length)))
    chosen = np.linspace(0, count - 1, min(count, wanted)).astype(int)
    return np.asarray(matrix[chosen], np.float32)


def _may_be(sample: tuple[Array, Array], role: _Role) -> bool:
    """Whether a part of a tensor looks like a constant, so that all of it is looked at."""
    rows, columns = sample
    if role.kind == "product":
        dense = min(float((part != 0).mean()) for part in sample) > 1.0 - _EMPTY
        same = rows.min() == rows.max()
        return same or not dense or any(_sequence(p) or _is_fourier(p) for p in (rows, columns))
    few = _distinct(rows, _FEW) is not None
    return few or _on_lattice(rows, _STEP) or _sequence(rows) or _sequence(columns)


def _distinct(values: Array, most: int) -> int | None:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Role:
    """What is done with a tensor.

    Attributes:
        kind: "elementwise", "look-up" or "product".
        operators: What computes with it.
        rotary: What it is by its operator alone, in words; mostly empty.
    """

    kind: str
    operators: tuple[str, ...]
    rotary: str = ""


def _role(value: ir.Value) -> _Role | None:
    """The role of a tensor; None where it is read in several ways, or in another one."""
    ends = list(_ends(value))
    operators = tuple(dict.fromkeys(qualified_type(node) for node, _, _ in ends))
    if not ends:
        return None
    if all(index in _ROTARY.get(qualified_type(node), ()) for node, index, _ in ends):
        return _Role("rotary", operators, "a cache of rotary embeddings")
    names = {node.op_type for node, _, _ in ends if is_default_domain(node.domain)}
    if len(operators) != len(names):
        return None
    if any(looked for _, _, looked in ends):
        return _Role("look-up", operators) if names <= _ELEMENTWISE else None
    if names <= _ELEMENTWISE:
        return _Role("elementwise", operators)
    return _Role("product", operators) if names <= _PRODUCTS else None


def _ends(
    value: ir.Value, looked: bool = False, seen: frozenset[ir.Value] = frozenset()
) -> Iterator[tuple[ir.Node, int, bool]]:
    """Nodes that compute with a tensor: input, and whether a look-up lies between."""
    for node, index in value.uses():
        moves = node.op_type in _MOVES and is_default_domain(node.domain)
        if not moves or (index and node.op_type != "Concat"):
            yield node, index, looked
            continue
        for output in node.outputs:
            if output not in seen:
                found = looked or node.op_type in _LOOK_UPS
                yield from _ends(output, found, seen | {output})


def _content(weight: Array, role: _Role) -> str:
    """What a tensor holds that only constants hold, in words; empty for a trained weight."""
    if weight.min() == weight.max():
        return "one value"
    rows, columns = _sample(weight)
    sequences = "sequences that follow a rule" if _sequence(rows) or _sequence(columns) else ""
    if role.kind == "product":
        fourier = "rows of a Fourier transform" if _is_fourier(rows) or _is_fourier(columns) else ""
        return _selection(weight) or sequences or fourier or _bands(weight)
    count = _distinct(weight, min(_FEW, weight.size // _REPEATS))
    if count is not None and (role.kind == "elementwise" or count <= 2):
        return "two values" if count == 2 else f"{count} distinct values"
    # Values of -1, 0 and 1 alone are those of ternary weights.
    spread = max(-float(weight.min()), float(weight.max())) > 1.0
    if spread and all(map(functools.partial(_on_lattice, parts=1.0), _pieces(weight))):
        return "integers"
    points = spread and all(map(functools.partial(_on_lattice, parts=_STEP), _pieces(weight)))
    if role.kind == "elementwise" and points:
        return "points of a lattice"
    return sequences


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
    if length < _SHORTEST_ROW or count < _FREQUENCIES:
        return False
    power = np.square(np.abs(np.fft.rfft(np.asarray(lines, np.float64), axis=1)))
    power[:, 1 : (length + 1) // 2] *= 2  # both signs
    total = power.sum(axis=1)
    alive = total > 0.0
    largest = np.sort(power[alive], axis=1)[:, -_FREQUENCIES // 2 :].sum(axis=1)
    pure = largest >= _ENERGY * total[alive]
    different = len(set(power[alive].argmax(axis=1))) >= _DISTINCT * alive.sum()
    return bool(alive.any() and pure.mean() >= _MOST and different)


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


def _form(site: WeightSite, weight: Array, opset: int) -> tuple[ConstantForm, int]:
    """The smallest way to keep every bit, and how many distinct values a table has."""
    stored = np.ascontiguousarray(weight.astype(DTYPES[site.dtype], copy=False))
    if opset >= _RANGE_OPSET and _is_range(stored):
        return "range", 0
    codec = ConstantCodec()
    found: list[ConstantParams] = []
    bits = stored.view(np.uint16 if stored.itemsize == 2 else np.uint32).reshape(-1)
    values = _distinct(bits, _INDEX)
    if values is not None:
        found.append(ConstantParams("table", values))
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16).astype(np.float32)
    if site.dtype == "float32" and np.array_equal(half.view(np.uint32), bits.reshape(half.shape)):
        found.append(ConstantParams("half"))
    best = min(found, key=lambda params: codec.size(site, params), default=None)
    if best is None or codec.size(site, best) >= site.nbytes:
        return "dense", 0
    return ("half", 0) if best.form == "half" else ("table", best.values)


def _exact_in_float32(value: ir.Value | None) -> bool:
    """Whether float32 holds every element of a float64 tensor, which is read as such."""
    assert value is not None and value.const_value is not None
    stored = np.asarray(value.const_value.numpy())
    return bool((stored.astype(np.float32) == stored).all())


def _is_range(stored: Array) -> bool:
    """Whether the elements, one after the other, are ``start + i * step`` in float32 arithmetic."""
    flat = stored.reshape(-1)
    if not 1 < flat.size < 1 << 24:
        return False
    start, step = flat[0].astype(np.float32), (flat[1:2].astype(np.float32) - flat[0])[0]
    with np.errstate(over="ignore"):
        made = (np.arange(flat.size, dtype=np.float32) * step + start).astype(stored.dtype)
    return bool(np.array_equal(made.view(np.uint8), np.ascontiguousarray(flat).view(np.uint8)))
