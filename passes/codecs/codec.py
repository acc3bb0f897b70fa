"""The codec protocol: how one weight is described, stored, restored and wired into a graph.

A codec never sees a graph. It gets a `WeightSite` (what the weight is and who uses it), its values
as one canonical matrix, and a `Builder` that makes nodes. The canonical matrix is
``(rows, length)``: `length` is the axis a fused product sums over, a row is one output channel
(or one embedding vector).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

__all__ = [
    "DOMAIN",
    "DTYPES",
    "AnchoredCodec",
    "Array",
    "Attribute",
    "Builder",
    "CalibratedCodec",
    "Codec",
    "FactoredCodec",
    "GradedCodec",
    "Kind",
    "LoadMemory",
    "MeasuredCodec",
    "Mode",
    "Params",
    "Payload",
    "RankedCodec",
    "SpectralCodec",
    "Stats",
    "TensorLayout",
    "Use",
    "WeightSite",
]

DOMAIN = "com.onnxcomp"

# Element types of the weights that codecs store, in ONNX words.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

Array = npt.NDArray[Any]
Attribute = int | float | str | Sequence[int]
V = TypeVar("V")

# What a use of a weight needs from its codec.
#   matmul  y (..., rows) = x (..., length) @ weight.T
#   gather  y (..., length) = weight[indices]
#   dense   the whole weight, for any other consumer
Need = Literal["matmul", "gather", "dense"]

# How a use is served. `fused` computes on the codes; `folded` is expanded to a dense constant when
# the session is created; `decode` is expanded by a kernel at every run.
Mode = Literal["fused", "folded", "decode"]

# What `Codec.emit` is asked to produce.
Kind = Literal["matmul", "gather", "weight", "decode"]


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
        transposed: True when the stored 2-D tensor is ``(length, rows)``.
        filters_input: Whether a convolution filters an input of the model with it.
        rank: The most that its rank can be, where it is the product of two thin weights that were
            in its place: stored with this rank it is what it was. None for all others.
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

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.rows * self.length

    @property
    def itemsize(self) -> int:
        """Bytes per element of the stored tensor."""
        return 4 if self.dtype == "float32" else 2

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
        """All that its uses could ask for: the dense weight always."""
        kinds: set[Kind] = {"weight", "decode"}
        kinds.update(use.need for use in self.uses if use.need != "dense")
        return frozenset(kinds)

    @property
    def fusable(self) -> bool:
        """Whether at least one use is a product or a row look-up."""
        return any(use.need != "dense" for use in self.uses)


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """What the uses of a weight read, over calibration data.

    Attributes:
        site: The weight.
        tokens: Number of input vectors.
        gram: Second moments ``E[x x^T]`` of the inputs of its products, float64
            ``(length, length)``.
        mean: ``E[x]``, float64 ``(length,)``.
        held_out: Second moments of inputs that are in none of the others; None where there was
            too little data to keep any back.
        cross: ``E[x_ref x^T]`` with the inputs `x_ref` of a reference model; None without one.
        held_cross: The same over the held-out inputs.
        held_reference: ``E[x_ref x_ref^T]`` over the held-out inputs.
        frequencies: How often each row was looked up, float64 ``(rows,)``; None without look-ups.
    """

    site: WeightSite
    tokens: int
    gram: Array
    mean: Array
    held_out: Array | None = None
    cross: Array | None = None
    frequencies: Array | None = None
    held_cross: Array | None = None
    held_reference: Array | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and dtype of one stored tensor, known before any encoding."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class LoadMemory:
    """Memory in bytes that a session without the operator library takes to expand one use.

    Attributes:
        kept: Intermediate results that stay until the whole model is loaded.
        working: What is needed on top while this use is expanded.
    """

    kept: int
    working: int


@dataclasses.dataclass(frozen=True, slots=True)
class Params:
    """Base of the parameter schemas of codecs: a frozen dataclass of ints, floats and strings."""

    @classmethod
    def of(cls, params: Params) -> Self:
        """The same parameters, known to be of this schema.

        Raises:
            UsageError: They belong to another codec.
        """
        if not isinstance(params, cls):
            raise UsageError(f"{type(params).__name__} are given where {cls.__name__} are wanted")
        return params

    def to_json(self) -> dict[str, Any]:
        """Parameters by name, in declaration order."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Payload:
    """What is stored instead of a weight. Every number needed for decoding is in it.

    Attributes:
        tensors: Tensors that belong to this weight alone.
        shared: Tensors that many weights with equal parameters have in common, by a key that
            determines their content; stored once per model.
        attributes: Node attributes.
    """

    tensors: Mapping[str, Array]
    shared: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    attributes: Mapping[str, Attribute] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight's own tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Builder(Protocol[V]):
    """Makes initializers and nodes at the place of one use. `V` is the graph's value type."""

    @property
    def opset(self) -> int:
        """Version of the default domain in the model."""
        ...

    def tensor(self, key: str) -> V:
        """The initializer that holds ``payload.tensors[key]`` or ``payload.shared[key]``."""
        ...

    def constant(self, key: str, array: Array) -> V:
        """A small initializer, stored once per model for each `key`."""
        ...

    def node(
        self,
        op_type: str,
        inputs: Sequence[V],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> V:
        """Add a node with one output before the use and return the output."""
        ...


class Codec(Protocol):
    """A way to store one weight. Stateless and deterministic.

    Attributes:
        name: How users call it. A name with ``+`` in it is one codec, not a choice between two.
        summary: One line for ``onnxcomp codecs``.
        params_type: Its settings; every field has a default.
        automatic: Whether the method "auto" stands for this codec, too.
        width: Name of the parameter that counts bits per weight and that ``--bits`` sets; None
            where there is none: then ``--bits`` picks settings by the bytes they take.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    params_type: ClassVar[type[Params]]
    automatic: ClassVar[bool]
    width: ClassVar[str | None]

    def refuse(self, site: WeightSite) -> str | None:
        """Why this codec cannot store the site at all; None when it can."""
        ...

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        ...

    def candidates(self, site: WeightSite) -> Sequence[Params]:
        """The settings a planner may choose from, from most to fewest bytes."""
        ...

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """The tensors `encode` will store for this site, exactly."""
        ...

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """The shared tensors the payload will refer to."""
        ...

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The attributes of the payload, exactly."""
        ...

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of the site's own tensors, exactly."""
        ...

    def predict(self, site: WeightSite, params: Params) -> float:
        """Expected relative Frobenius error of the decoded weight, without looking at it."""
        ...

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Encode the canonical matrix ``(rows, length)`` (float32, finite)."""
        ...

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to the canonical matrix ``(rows, length)`` in float32. This is the definition."""
        ...

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """What `emit` can produce for this site."""
        ...

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """Wire the payload into the graph.

        Kind ``matmul``: `x` ``(..., length)`` of the site's dtype gives ``(..., rows)`` of the same
        dtype. ``gather``: `x` holds indices of any shape, the result is ``(..., length)`` in the
        site's dtype. ``weight`` and ``decode``: the canonical matrix in the site's dtype.
        """
        ...

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """Expected memory to load what `emit` makes where the operators are not registered."""
        ...

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies of the operators that `emit` uses, valid in models of this opset."""
        ...


@runtime_checkable
class FactoredCodec(Codec, Protocol):
    """A codec whose weight is a product of two matrices that can be used one after the other."""

    def factors(self, builder: Builder[V], site: WeightSite, payload: Payload) -> tuple[V, V]:
        """``left (rows, rank)`` and ``right (rank, length)`` in the site's dtype, constant."""
        ...


@runtime_checkable
class MeasuredCodec(Codec, Protocol):
    """A codec whose errors follow from the weight's values, such as those of singular values."""

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """Errors of some settings for this very weight, for much less work than encoding it.

        Planners use them instead of `predict`.

        Args:
            site: The weight.
            weight: Its canonical matrix, float32 ``(rows, length)``.
            params: Settings, all of which are asked about at once.
            stats: Inputs of its products.

        Returns:
            For each of the settings the relative Frobenius error of the decoded weight; with
            `stats`, of its products: ``sqrt(tr(E G E^T) / tr(W G W^T))``.
        """
        ...


@runtime_checkable
class SpectralCodec(Codec, Protocol):
    """A codec that keeps the largest singular values of a weight, or of its products.

    Errors of products that it measures are those of calibrated factors.
    """

    def spectrum(self, weight: Array) -> Array:
        """All singular values of ``(rows, length)``, largest first."""
        ...


@runtime_checkable
class RankedCodec(Codec, Protocol):
    """A codec with the parameter `rank`, which may be asked for by what it keeps.

    Attributes:
        goals: What each name stands for.
    """

    goals: ClassVar[Mapping[str, str]]

    def energies(self, weight: Array, stats: Stats | None = None) -> Array:
        """Squared singular values of ``(rows, length)``, or of its products, largest first."""
        ...

    def rank_for(self, site: WeightSite, goal: str, value: object, energies: Array) -> int:
        """The rank that reaches a goal.

        Raises:
            UsageError: The value is out of range.
        """
        ...


@runtime_checkable
class GradedCodec(Codec, Protocol):
    """A codec with named settings: more speed, or less error, at equal bytes.

    Attributes:
        qualities: What each name stands for.
    """

    qualities: ClassVar[Mapping[str, str]]

    def graded(self, params: Params, quality: str) -> Params:
        """The settings of that name, as near to `params` as they exist."""
        ...


@runtime_checkable
class CalibratedCodec(Codec, Protocol):
    """A codec that can keep the errors of products small instead of those of the weight."""

    def calibrates(self, site: WeightSite, params: Params) -> bool:
        """Whether `encode_calibrated` can be used for the site with these settings."""
        ...

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """`encode` for inputs with the second moments of `stats`; same layout, same attributes."""
        ...


@runtime_checkable
class AnchoredCodec(CalibratedCodec, Protocol):
    """A calibrated codec that aims at the outputs of the dense model, earlier errors included.

    It is given `Stats.cross`, and judged by what its products differ from those of the dense model.

    Attributes:
        anchored: True.
    """

    anchored: ClassVar[Literal[True]]
