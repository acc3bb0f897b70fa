"""What the whole compiler says of a weight: where it lives, who uses it, what its uses read.

The ground of `passes`: this file imports nothing of the project. The canonical matrix of a weight
is ``(rows, length)``: `length` is the axis a fused product sums over, a row is one output channel
(or one embedding vector).
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = [
    "DOMAIN",
    "DTYPES",
    "Array",
    "Attribute",
    "Constant",
    "ConstantForm",
    "Family",
    "Feed",
    "Held",
    "HeldMoments",
    "HeldVectors",
    "Kind",
    "Means",
    "Missing",
    "Mode",
    "Need",
    "Shift",
    "Stats",
    "Use",
    "WeightSite",
    "picked_rows",
    "release_pages",
]

DOMAIN = "com.onnxcomp"

# Element types of the weights that codecs store, in ONNX words.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Array = npt.NDArray[Any]

# Elements that `picked_rows` looks at together.
_PIECE = 1 << 18

# Value of a node's attribute.
Attribute = int | float | str | Sequence[int]

# Inputs of one run of a model: arrays by input name.
Feed = Mapping[str, Array]

# What a use of a weight needs from its codec.
#   matmul  y (..., rows) = x (..., length) @ weight.T
#   gather  y (..., length) = weight[indices]
#   experts y = x @ weight[indices], where the weight is a stack of matrices, as MatMul does it
#   batch   the same with all of them, or with some that are known when a session is created
#   dense   the whole weight, for any other consumer
Need = Literal["matmul", "gather", "experts", "batch", "dense"]

# How a use is served. `fused` computes on the codes; `folded` is expanded to a dense constant when
# the session is created; `decode` is expanded by a kernel at every run.
Mode = Literal["fused", "folded", "decode"]

# What `Codec.emit` is asked to produce.
Kind = Literal["matmul", "gather", "experts", "batch", "weight", "decode"]


# Ways to keep every bit of a constant.
#   table  the distinct values, and an index into them for each element
#   range  the first element and the step to the next one
#   half   float16, where it holds every value
#   dense  as it is
ConstantForm = Literal["table", "range", "half", "dense"]


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """Why a tensor is a constant and no trained weight, and how it is kept bit for bit.

    Attributes:
        reason: In words for people.
        form: The smallest exact form.
        values: Distinct values, where the form is a table.
        transform: Whether it is a transform that products apply: dense, and none of its values
            matters more than others, so that rounding it does what rounding a weight does.
    """

    reason: str
    form: ConstantForm
    values: int = 0
    transform: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """One place where a weight enters a node.

    Attributes:
        node: Name of the consuming node (unique in the model after canonicalisation).
        op_type: Operator of that node, with its domain in front when it is not the default one.
        input_index: Position of the weight among the node's inputs.
        need: What the node needs: a product, a row look-up, or the dense tensor.
        path: Names of the Transpose, Reshape, ... nodes between the initializer and the node.
    """

    node: str
    op_type: str
    input_index: int
    need: Need
    path: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """Weights whose products read the same value.

    Attributes:
        name: Name of the first of them.
        members: Names of all.
        rows: Rows of all together.
    """

    name: str
    members: tuple[str, ...]
    rows: int


@dataclasses.dataclass(frozen=True, slots=True)
class WeightSite:
    """One weight tensor with all its uses.

    Attributes:
        name: Name of the initializer; unique in the model.
        shape: Shape of the stored tensor.
        dtype: Element type of the stored tensor in ONNX words: "float32", "float16", "bfloat16".
        uses: All uses, in graph order.
        scope: Where the initializer lives: "" for the main graph, else the path of the subgraph.
        rows: Rows of the canonical matrix.
        length: Columns of the canonical matrix; ``rows * length`` is the number of elements.
        transposed: True when the stored 2-D tensor is ``(length, rows)``, or when each matrix of
            a stack is the transpose of its rows of the canonical matrix.
        filters_input: Whether a convolution filters an input of the model with it.
        rank: The most that its rank can be, where it is the product of two thin weights that were
            in its place: stored with this rank it is what it was. None for all others.
        constant: What is known of it where it is no trained weight; else None.
        wide: Whether the stored tensor is float64. Codecs see it as float32, and all its uses read
            the dense weight, converted back.
        kept: Elements with a bit that is set, where leaving out the others makes it smaller; else
            None.
        paired: Whether at most two of every four elements of its rows are kept.
        block: Rows and columns of blocks that are kept as a whole or not at all, powers of two;
            known where `kept` is.
        experts: Matrices of a stack that is stored as one tensor of three dimensions; their rows
            follow one another in the canonical matrix. 1 for all others.
        family: Other weights whose products read the same value; None where there are none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[Use, ...]
    scope: str
    rows: int
    length: int
    transposed: bool
    filters_input: bool = False
    rank: int | None = None
    constant: Constant | None = None
    wide: bool = False
    kept: int | None = None
    paired: bool = False
    block: tuple[int, int] = (1, 1)
    experts: int = 1
    family: Family | None = None

    def matrix(self, stored: Array) -> Array:
        """The canonical matrix ``(rows, length)`` of a stored tensor; a view where that is one."""
        if not self.transposed:
            return stored.reshape(self.rows, self.length)
        if self.experts == 1:
            return stored.reshape(self.length, self.rows).T
        return stored.reshape(self.shape).swapaxes(1, 2).reshape(self.rows, self.length)

    def stored_form(self, matrix: Array) -> Array:
        """The stored tensor of a canonical matrix, contiguous; the inverse of `matrix`."""
        if self.transposed:
            matrix = matrix.reshape(self.experts, -1, self.length).swapaxes(1, 2)
        return np.ascontiguousarray(matrix).reshape(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.length

    @property
    def itemsize(self) -> int:
        """Bytes per element of the stored tensor."""
        return 8 if self.wide else 4 if self.dtype == "float32" else 2

    @property
    def stored_dtype(self) -> str:
        """Element type of the stored tensor."""
        return "float64" if self.wide else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.size * self.itemsize

    def refusal(self, codec: str) -> str | None:
        """Why no codec for floating-point weights can store it; None when one may."""
        if self.dtype not in DTYPES:
            *others, last = DTYPES
            return f"{codec} stores {', '.join(others)} and {last}, not {self.dtype}"
        return None if self.size else "the weight is empty"

    @property
    def kinds(self) -> frozenset[Kind]:
        """What its uses could ask for, apart from stacks: the dense weight always."""
        kinds: set[Kind] = {"weight", "decode"}
        kinds.update(use.need for use in self.uses if use.need in ("matmul", "gather"))
        return frozenset(kinds)

    @property
    def stack_kinds(self) -> frozenset[Kind]:
        """What its uses could ask for of a stack."""
        return frozenset(use.need for use in self.uses if use.need in ("experts", "batch"))

    @property
    def fusable(self) -> bool:
        """Whether at least one use is a product or a row look-up."""
        return any(use.need != "dense" for use in self.uses)


@dataclasses.dataclass(frozen=True, slots=True)
class Missing:
    """What a stream lacks that the product of a weight is added to, over calibration data.

    Attributes:
        cross: ``E[d x^T]`` with what is missing, d, and the inputs x, float64 ``(rows, length)``.
        reference: ``E[d x_ref^T]`` with the inputs of the reference model; None where no errors
            are measured with it.
        power: ``E[d^T d]``.
        mean: ``E[d]``, float64 ``(rows,)``.
    """

    cross: Array
    reference: Array | None
    power: float
    mean: Array

    def of_rows(self, rows: slice) -> Missing:
        """The same for some rows of the weight; the power stays that of all of them."""
        exact = None if self.reference is None else self.reference[rows]
        return dataclasses.replace(self, cross=self.cross[rows], reference=exact)


@dataclasses.dataclass(frozen=True, slots=True)
class Means:
    """Means of what is multiplied with a weight, over calibration data, in float64.

    Attributes:
        inputs: ``E[x]``, ``(length,)``; of a convolution in groups ``(groups, length)``.
        reference: ``E[x_ref]`` with the inputs of the reference model; None without one.
    """

    inputs: Array
    reference: Array | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class HeldVectors:
    """Inputs that were set aside, to judge by, as they are: where they are few.

    Attributes:
        inputs: float32 ``(n, length)``.
        reference: The same of a reference model; None without one.
        missing: What the stream behind the product lacks beside each, float32 ``(n, rows)``; None
            without one.
    """

    inputs: Array
    reference: Array | None = None
    missing: Array | None = None

    def without_reference(self) -> HeldVectors:
        """What is known without the reference model."""
        return dataclasses.replace(self, reference=None)

    def of_rows(self, rows: slice) -> HeldVectors:
        """The same for some rows of the weight."""
        missing = None if self.missing is None else self.missing[:, rows]
        return dataclasses.replace(self, missing=missing)


@dataclasses.dataclass(frozen=True, slots=True)
class HeldMoments:
    """Inputs that were set aside, to judge by, summed up: where they are many.

    Attributes:
        inputs: ``E[x x^T]``, float64 ``(length, length)``; of a convolution in groups with one more
            axis in front, and so are the others.
        cross: ``E[x_ref x^T]`` with the inputs of a reference model; None without one.
        reference: ``E[x_ref x_ref^T]``.
        missing: What the stream behind the product lacks; None without one.
        means: Means of the same vectors, where the products are of one convolution; else None.
    """

    inputs: Array
    cross: Array | None = None
    reference: Array | None = None
    missing: Missing | None = None
    means: Means | None = None

    def without_reference(self) -> HeldMoments:
        """What is known without the reference model."""
        return dataclasses.replace(self, cross=None, reference=None)

    def of_rows(self, rows: slice) -> HeldMoments:
        """The same for some rows of the weight."""
        missing = None if self.missing is None else self.missing.of_rows(rows)
        return dataclasses.replace(self, missing=missing)


Held = HeldVectors | HeldMoments


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """What is added to an initializer of the model, so that means of products stay.

    Attributes:
        name: Name of the initializer.
        change: One number for each element, float32.
    """

    name: str
    change: Array


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """What the uses of a weight read, over calibration data.

    Moments of a convolution in groups have one more axis in front, ``(groups, ...)``: each group
    has its own inputs and its own rows of the weight.

    Attributes:
        site: The weight.
        tokens: Number of input vectors.
        gram: Second moments ``E[x x^T]`` of the inputs of its products, float32
            ``(length, length)``, from sums of float64.
        mean: ``E[x]``, float64 ``(length,)``.
        held: Inputs that are in none of the others; None where there was too little data to keep
            any back.
        drift: ``E[(x_ref - x) x^T]`` with the inputs `x_ref` of a reference model, float32
            ``(length, length)``; None without one, and where it is in `lack`.
        lack: What products of the weight, W, lack beside those of its drift, ``E[d x^T]``, float32
            ``(rows, length)``: d is what the stream behind the product lacks, and where there is no
            drift, and fewer rows than columns, ``W (x_ref - x)`` as well. None for nothing.
        frequencies: How often each row was looked up, float64 ``(rows,)``; None without look-ups.
        means: Means of the same vectors, where the products are of one convolution; else None.
        outputs: How the loss of the model's outputs curves by the products, float64
            ``(rows, rows)``; None where that is not known.
        last: Whether nobody reads `gram` behind this weight: an encoder may change it.
    """

    site: WeightSite
    tokens: int
    gram: Array
    mean: Array
    held: Held | None = None
    drift: Array | None = None
    lack: Array | None = None
    frequencies: Array | None = None
    means: Means | None = None
    outputs: Array | None = None
    last: bool = False

    def without_reference(self) -> Stats:
        """What is known without the reference model."""
        held = None if self.held is None else self.held.without_reference()
        return dataclasses.replace(self, drift=None, lack=None, held=held)

    def of_rows(self, rows: slice) -> Stats:
        """The statistics for some rows of the weight."""
        lack = None if self.lack is None else self.lack[rows]
        held = None if self.held is None else self.held.of_rows(rows)
        return dataclasses.replace(self, lack=lack, held=held)


def release_pages(array: Array) -> None:
    """Release the pages of an array that is mapped from a file; reading it maps them again."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def picked_rows(matrix: Array, chosen: slice | Array) -> Array:
    """Some rows of a matrix in float32; no more of its file than a piece is in memory at a time.

    Args:
        matrix: ``(rows, length)``, by rows or by columns.
        chosen: Which rows.
    """
    if matrix.strides[0] >= matrix.strides[1]:
        picked = np.array(matrix[chosen], np.float32)
        release_pages(matrix)
        return picked
    index = np.arange(len(matrix))[chosen]
    picked = np.empty((len(index), matrix.shape[1]), np.float32)
    step = max(1, _PIECE // max(1, len(matrix)))
    for start in range(0, matrix.shape[1], step):
        columns = slice(start, start + step)
        picked[:, columns] = matrix.T[columns, index].T
        release_pages(matrix)
    return picked
