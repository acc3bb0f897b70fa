"""Error metrics, and the tolerances of the fidelity gate with their derivation.

All sums are in float64. A metric compares a `value` with its `reference`; both are flattened, and
several pairs can be added up, so that a metric covers all samples of an evaluation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.verification.slices import SliceErrors, WorstSlice

__all__ = [
    "FEW",
    "MINIMUM_AGREEMENT",
    "Comparison",
    "Metrics",
    "Sizes",
    "export_tolerance",
    "fidelity_tolerance",
    "is_float",
    "metrics",
]

Array = npt.NDArray[Any]

# Elements converted to float64 at a time.
_CHUNK = 1 << 20

# Half the distance between neighbouring numbers at 1: the relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

# How much a network magnifies the relative error of a product until it reaches an output. Measured
# on thirteen real models with products on codes: 0.05 to 0.5. Recurrences may be worse.
_GAIN = 16.0

# Relative error of a product of activations rounded to int8 by groups of 128 (measured: 0.005 to
# 0.008 for Gaussian activations), and the factor allowed for the network behind it.
_INT8_ERROR, _ROUNDED_GAIN = 8e-3, 4.0

# Share of equal elements asked of integer, boolean and text outputs. A difference of rounding may
# turn a comparison or an arg-max over once in a while.
MINIMUM_AGREEMENT = 0.99

# Elements below which a share of equal ones is no verdict: of 1000, that bound lets ten differ.
FEW = 1000

_CLASSES = re.compile(r"logit|prob|softmax|label|class|score", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """How far a value is from its reference.

    Attributes:
        rel_l2: ``|value - reference| / |reference|``; 0 where both are zero, infinite where only
            the reference is, or where the two are not comparable element by element.
        max_abs: Largest absolute difference.
        cosine: Cosine of the angle between both; 1 where both are zero, 0 where one is.
        snr_db: ``-20 log10(rel_l2)`` in dB; None where there is no error.
        agreement: Share of equal elements, of outputs that are not floating point; else None. Of
            outputs that are floats rounded to steps, those one step apart count as equal.
        label_agreement: Share of equal arg-max over the last axis, of outputs that look like
            scores of classes; else None.
        labels: How many labels these are, where exactly one class holds in each; else None.
        label_doubt: Share of them that the reference itself expects to be wrong: mean of one less
            the probability of the best class.
        problem: Why the two are not comparable, in words; else empty.
        resized: How a size differs that depends on values, in words; else empty. The numbers are
            those of the samples without such a difference then.
        resized_floats: In how many samples that is so, of floats: how far these are is not known.
        worst_slice: The slice with the largest error; None where none is judged on its own.
        elements: How many elements were compared.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    snr_db: float | None
    agreement: float | None = None
    label_agreement: float | None = None
    labels: int | None = None
    label_doubt: float | None = None
    problem: str = ""
    resized: str = ""
    resized_floats: int = 0
    worst_slice: WorstSlice | None = None
    elements: int = 0

    @property
    def judged(self) -> float:
        """The error that limits are held against: that of the whole, or of its worst slice."""
        return max(self.rel_l2, 0.0 if self.worst_slice is None else self.worst_slice.rel_l2)

    def to_json(self) -> dict[str, Any]:
        """The metrics by name; infinite numbers become None, optional ones are left out."""
        numbers = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in (
                ("rel_l2", self.rel_l2),
                ("max_abs", self.max_abs),
                ("cosine", self.cosine),
                ("snr_db", self.snr_db),
            )
        }
        extra = {
            "agreement": self.agreement,
            "label_agreement": self.label_agreement,
            "labels": self.labels,
            "label_doubt": self.label_doubt,
            "problem": self.problem or None,
            "resized": self.resized or None,
            "resized_floats": self.resized_floats or None,
            "worst_slice": None if self.worst_slice is None else self.worst_slice.to_json(),
        }
        return {**numbers, **{name: value for name, value in extra.items() if value is not None}}


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """What a model declares of the sizes of an output.

    Attributes:
        dims: Size of each axis, None for one that may depend on values; None where not even the
            number of axes is known.
    """

    dims: tuple[int | None, ...] | None = None

    def allow(self, reference: tuple[int, ...], value: tuple[int, ...]) -> bool:
        """Whether an output that has had one shape may have the other as well."""
        if self.dims is None:
            return True
        if not len(self.dims) == len(reference) == len(value):
            return False
        pairs = zip(self.dims, reference, value, strict=True)
        return all(dim is None or one == other for dim, one, other in pairs)

    @property
    def fixed(self) -> tuple[int, ...] | None:
        """Axes of a declared size; None where nothing is known."""
        if self.dims is None:
            return None
        return tuple(axis for axis, dim in enumerate(self.dims) if dim is not None)


class Comparison:
    """Adds up the differences of pairs of arrays.

    Args:
        name: Name of the output; tells whether it looks like scores of classes.
        sizes: Its declared sizes; None where any difference of shape is an error.
        stepped: Whether integers are floats rounded to steps.
    """

    def __init__(
        self, name: str = "", sizes: Sizes | None = None, *, stepped: bool = False
    ) -> None:
        self._classes = bool(_CLASSES.search(name))
        self._sizes, self._stepped = sizes, stepped
        self._slices = SliceErrors(None if sizes is None else sizes.fixed)
        self._resized, self._resized_floats = "", 0
        self._elements = self._equal = self._discrete = 0
        self._labels = self._same_labels = self._exclusive = 0
        self._doubt = 0.0
        self._reference = self._value = self._difference = self._product = 0.0
        self._largest = 0.0
        self._problem = ""

    def add(self, reference: Array, value: Array, sizes: Sizes | None = None) -> None:
        """Add one pair of arrays; `sizes` are those of this pair where they are known."""
        sizes = self._sizes if sizes is None else sizes
        reference, value = np.asarray(reference), np.asarray(value)
        if reference.shape != value.shape:
            text = f"shape {value.shape} instead of {reference.shape}"
            if sizes is not None and sizes.allow(reference.shape, value.shape):
                self._resized = self._resized or text
                self._resized_floats += is_float(reference)
            else:
                self._note(text)
            return
        if reference.dtype != value.dtype:
            self._note(f"type {value.dtype} instead of {reference.dtype}")
            return
        self._elements += reference.size
        if not is_float(reference):
            self._discrete += reference.size
            self._equal += int(np.count_nonzero(_equal(reference, value, stepped=self._stepped)))
        if reference.dtype.kind in "OSUT":
            reference, value = np.ones(reference.shape), (reference == value).astype(np.float64)
        for start in range(0, reference.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._sum(reference.reshape(-1)[part], value.reshape(-1)[part])
        if is_float(reference):
            self._slices.add(reference, value)
        self._add_labels(reference, value)

    def _sum(self, reference: Array, value: Array) -> None:
        a, b = reference.astype(np.float64), value.astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(b)
        if not finite.all():
            same = (a == b) | (np.isnan(a) & np.isnan(b))
            if np.isnan(a).any() and np.isfinite(a).any():
                # The model itself leaves its domain there, as Log does: a value more or less that
                # does is a loss, all of that value.
                one = np.isnan(a) ^ np.isnan(b)
                a, b = np.where(one & np.isnan(a), 0.0, a), np.where(one & np.isnan(b), 0.0, b)
                same |= one
                finite = np.isfinite(a) & np.isfinite(b)
            wrong = int(np.count_nonzero(~finite & ~same))
            if wrong:
                self._note(f"{wrong} values are NaN or infinite in one of the two only")
            a, b = a[finite], b[finite]
        difference = b - a
        self._reference += float(a @ a)
        self._value += float(b @ b)
        self._product += float(a @ b)
        self._difference += float(difference @ difference)
        self._largest = max(self._largest, float(np.abs(difference).max(initial=0.0)))

    def _add_labels(self, reference: Array, value: Array) -> None:
        scores = _scores(reference) if is_float(reference) and reference.size else None
        if scores is None or not (self._classes or _sums_to_one(scores)):
            return
        guess = value.reshape(scores.shape).argmax(axis=-1)
        self._labels += guess.size
        self._same_labels += int(np.count_nonzero(guess == scores.argmax(axis=-1)))
        best = _probabilities_of_best(scores)
        if best is not None:
            self._exclusive += best.size
            self._doubt += float((1.0 - best).sum())

    def _note(self, problem: str) -> None:
        self._problem = self._problem or problem

    def result(self) -> Metrics:
        """Metrics over all pairs so far."""
        rel_l2 = _ratio(self._difference, self._reference)
        return Metrics(
            rel_l2=math.inf if self._problem else rel_l2,
            max_abs=math.inf if self._problem else self._largest,
            cosine=_cosine(self._product, self._reference, self._value),
            snr_db=None if self._problem or rel_l2 == 0 else -20 * math.log10(rel_l2),
            agreement=self._equal / self._discrete if self._discrete else None,
            label_agreement=self._same_labels / self._labels if self._labels else None,
            labels=self._exclusive if 0 < self._exclusive == self._labels else None,
            label_doubt=self._doubt / self._labels if 0 < self._exclusive == self._labels else None,
            problem=self._problem,
            resized=self._resized,
            resized_floats=self._resized_floats,
            worst_slice=None if self._problem else self._slices.worst(),
            elements=self._elements,
        )


def _equal(reference: Array, value: Array, *, stepped: bool) -> Array:
    """Which elements are equal, or a step apart at most."""
    if stepped and reference.dtype.kind in "iu":
        return np.asarray(np.abs(reference.astype(np.int64) - value.astype(np.int64)) <= 1)
    return np.asarray(reference == value)


def is_float(array: Array) -> bool:
    """Whether the type is floating point, the types of ml_dtypes included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def _scores(array: Array) -> Array | None:
    """The array as ``(..., classes)``, trailing axes of one element dropped; None if it is not."""
    shape = array.shape
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return array.reshape(shape) if len(shape) in (2, 3) and shape[-1] > 1 else None


def _sums_to_one(scores: Array) -> bool:
    wide = scores.astype(np.float64)
    return bool((wide >= 0).all() and np.allclose(wide.sum(axis=-1), 1.0, atol=1e-2))


def _probabilities_of_best(scores: Array) -> Array | None:
    """Of the best class of each label, ``(...)``; None where several classes may hold in one."""
    if _sums_to_one(scores):
        return np.asarray(scores.max(axis=-1), np.float64)
    if (scores >= 0).all() and (scores <= 1).all():
        return None  # a probability for each class
    wide = scores.astype(np.float32)
    wide -= wide.max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        return np.asarray(np.nan_to_num(1.0 / np.exp(wide).sum(axis=-1, dtype=np.float64)))


def _ratio(difference: float, reference: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / reference) if reference > 0 else math.inf


def _cosine(product: float, reference: float, value: float) -> float:
    if reference == 0 or value == 0:
        return 1.0 if reference == value else 0.0
    return max(-1.0, min(1.0, product / math.sqrt(reference) / math.sqrt(value)))


def metrics(reference: Array, value: Array, name: str = "") -> Metrics:
    """Compare two arrays of any type.

    Args:
        reference: What should have come out.
        value: What came out.
        name: Name of the output.
    """
    comparison = Comparison(name)
    comparison.add(reference, value)
    return comparison.result()


def fidelity_tolerance(
    operators: int, terms: int, dtype: str = "float32", *, int8: bool = False
) -> float:
    """Largest relative L2 difference of outputs that two correct forms of a model may have.

    Both forms multiply with the same decoded weights, exactly; they differ in the order in which
    float32 sums are taken. A sum of n products rounds n times, with errors that add up like a
    random walk: ``d = sqrt(n) * 2^-24`` relative to the norm of the result. Where a result is
    rounded to a narrower type of unit roundoff u, a share ``d / u`` of the results falls on the
    other side of a rounding boundary and moves by u: the root mean square is ``sqrt(d * u)``.
    The weights that the portable form multiplies with are of the narrower type as well, while the
    kernels decode to float32: rounding them is an error of up to u of each product.
    Errors of m operators add up like ``sqrt(m)``, and the network between magnifies them.

    Args:
        operators: Operators that compute on codes, m.
        terms: Longest sum among them, n.
        dtype: Type of their results.
        int8: Whether one form rounds activations to int8.
    """
    step, weights = math.sqrt(max(terms, 1)) * UNIT_ROUNDOFF["float32"], 0.0
    if UNIT_ROUNDOFF[dtype] > UNIT_ROUNDOFF["float32"]:
        step, weights = math.sqrt(step * UNIT_ROUNDOFF[dtype]), UNIT_ROUNDOFF[dtype]
    depth = math.sqrt(max(operators, 1))
    rounded = _ROUNDED_GAIN * depth * max(weights, _INT8_ERROR if int8 else 0.0)
    return max(_GAIN * depth * step, rounded)


def export_tolerance(products: int, terms: int, dtype: str = "float32") -> float:
    """Largest relative L2 difference of a module in torch and its exported graph.

    Both compute the same sums of n products in float32 at least, in different orders: an error of
    ``sqrt(n) * 2^-24`` relative to the norm of each result. In a narrower type of unit roundoff u,
    one of the two may round where the other does not: an error of u. As in `fidelity_tolerance`,
    errors of m products add up like ``sqrt(m)``, and the network between magnifies them.

    Args:
        products: Weights that are multiplied with, m.
        terms: Longest sum among them, n.
        dtype: Type that the module computes in.
    """
    unit = UNIT_ROUNDOFF.get(dtype, UNIT_ROUNDOFF["bfloat16"])
    # Exporters may turn constants of a float64 module into float32.
    step = max(math.sqrt(max(terms, 1)) * UNIT_ROUNDOFF["float32"], unit)
    return _GAIN * math.sqrt(max(products, 1)) * step
