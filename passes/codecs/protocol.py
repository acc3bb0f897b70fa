"""The codec protocol: how one weight is described, stored, restored and put into a graph.

A codec never sees a graph. It gets a `WeightSite` (what the weight is and who uses it), its values
as one canonical matrix, and a `Builder` that makes nodes. The canonical matrix is
``(rows, length)``: `length` is the axis a fused product sums over, a row is one output channel
(or one embedding vector).

Every codec stores and restores a weight. What only some can do is a field of the codec that is None
for the others; callers ask for the field, never for the class::

    if codec.measure is not None:
        errors = codec.measure(site, weight, params)
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import onnx

from onnxcomp.passes.codecs.bases import SharedBases, SharedValues
from onnxcomp.passes.codecs.builder import Builder
from onnxcomp.passes.codecs.load_memory import LoadMemory, SpecialBodies
from onnxcomp.passes.codecs.params import DenseFallback, Params, Qualities
from onnxcomp.passes.codecs.payload import Payload
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite

__all__ = [
    "Builder",
    "CalibratedEncoding",
    "Codec",
    "DenseFallback",
    "EmitExperts",
    "LoadMemory",
    "Payload",
    "Qualities",
    "RankGoals",
    "RowParts",
    "Scaling",
    "SharedValues",
    "SpecialBodies",
    "TensorLayout",
    "ValueSharing",
]

V = TypeVar("V")

# Whether a codec has operators of its own does not depend on the opset.
_ANY_OPSET = 13


@dataclasses.dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and dtype of one stored tensor, known before any encoding."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Measure(Protocol):
    """Errors of some settings for one weight, for much less work than encoding it."""

    def __call__(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """Measure all settings at once.

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


class SingularValues(Protocol):
    """All singular values of a weight."""

    def __call__(self, weight: Array) -> Array:
        """Singular values of ``(rows, length)``, largest first."""
        ...


class EmitFactors(Protocol):
    """The two factors of a weight that is stored as their product."""

    def __call__(self, builder: Builder[V], site: WeightSite, payload: Payload) -> tuple[V, V]:
        """``left (rows, rank)`` and ``right (rank, length)`` in the site's dtype, constant."""
        ...


class EmitExperts(Protocol):
    """A product with some matrices of a stack."""

    def __call__(
        self, builder: Builder[V], site: WeightSite, payload: Payload, x: V, experts: V
    ) -> V:
        """``x @ matrices[experts]`` as ONNX's MatMul does it, in the site's dtype.

        Args:
            builder: Makes nodes.
            site: A stack of matrices, each ``(rows / experts, length)`` and used transposed.
            payload: What is stored.
            x: ``(..., m, length)``, or ``(length,)``.
            experts: Which of them, integers of any shape.

        Returns:
            ``(..., m, rows / experts)``; what stands in front is broadcast.
        """
        ...


class EncodeForInputs(Protocol):
    """`Codec.encode` for inputs with known second moments."""

    def __call__(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """Encode ``(rows, length)`` for inputs with the second moments of `stats`."""
        ...


class SquaredSpectrum(Protocol):
    """Squared singular values of a weight, or of its products."""

    def __call__(self, weight: Array, stats: Stats | None = None) -> Array:
        """Of ``(rows, length)``, or of its products for inputs like `stats`, largest first."""
        ...


def _every(site: WeightSite, params: Params) -> bool:
    """Whether a calibrated encoding suits a weight: it does."""
    return True


@dataclasses.dataclass(frozen=True, slots=True)
class CalibratedEncoding:
    """Encoding that keeps the errors of products small instead of those of the weight.

    Attributes:
        encode: Encodes for inputs with given second moments; same layout and attributes as
            `Codec.encode`.
        suits: Whether `encode` can be used for a site with these settings.
        anchored: Whether it aims at the outputs of the dense model, errors of earlier weights
            included. Then it is given `Stats.drift`, and judged by how far its products are from
            those of the dense model.
        streams: Whether it also makes up for what is missing in the stream that the products are
            added to. Then that is in `Stats.lack`, and it is judged by it.
    """

    encode: EncodeForInputs
    suits: Callable[[WeightSite, Params], bool] = _every
    anchored: bool = False
    streams: bool = False
    outputs: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Scaling:
    """Access to the scales of a payload, which its decoded weight is proportional to.

    Attributes:
        suits: Whether columns of the stored form are those of the weight.
        width: Columns that share a scale in a row; the last ones may be fewer.
        read: The scales, ``(rows, groups)``.
        replace: The payload with other scales, rounded to how they are stored.
    """

    suits: Callable[[WeightSite, Params], bool]
    width: Callable[[WeightSite, Payload], int]
    read: Callable[[WeightSite, Payload], Array]
    replace: Callable[[WeightSite, Payload, Array], Payload]


@dataclasses.dataclass(frozen=True, slots=True)
class RankGoals:
    """Ranks that are asked for by what they keep, for codecs with the parameter `rank`.

    Attributes:
        names: What each goal stands for, by name.
        energies: Squared singular values, from which `rank_for` counts.
        rank_for: The rank that reaches a goal, from the site, the goal, its value and the energies;
            raises `UsageError` when the value is out of range.
    """

    names: Mapping[str, str]
    energies: SquaredSpectrum
    rank_for: Callable[[WeightSite, str, object, Array], int]


@dataclasses.dataclass(frozen=True, slots=True)
class ValueSharing:
    """Access to the numbers that a weight's elements are signed copies of.

    Attributes:
        read: The numbers, and which of them every element is.
        write: The payload of a site and its settings with other numbers; same layout, same
            attributes.
    """

    read: Callable[[WeightSite, Payload], SharedValues]
    write: Callable[[WeightSite, Params, Payload, Array], Payload]


@dataclasses.dataclass(frozen=True, slots=True)
class RowParts:
    """How a payload is cut into payloads of some rows each.

    Attributes:
        unit: Rows of which every part but the last has a multiple.
        part: Rows ``start`` to ``stop``, and their entries on the first axis of all own tensors.
    """

    unit: Callable[[WeightSite, Payload], int]
    part: Callable[[WeightSite, Payload, int, int], tuple[Payload, slice]]


class Codec(Protocol):
    """A way to store one weight. Stateless and deterministic.

    A new codec derives from this class. It defines what is abstract here; everything else has the
    value that suits a simple codec. `measure`, `spectrum` and `factors` are plain methods of the
    codecs that have them.

    Attributes:
        name: How users call it. A name with ``+`` in it is one codec, not a choice between two.
        summary: One line for ``onnxcomp codecs``.
        params_type: Its settings; every field has a default.
        automatic: Whether the method "auto" stands for this codec, too.
        width: Name of the parameter that counts bits per weight and that ``--bits`` sets; None
            where there is none: then ``--bits`` picks settings by the bytes they take.
        composite: Whether `emit` makes several of our operators for one use.
        trainable: Whether products read the stored tensors as they are, which can be trained then.
        rounds_inputs: Whether all activations of a product are rounded to 8 bits with one range.
            Where the time of a run counts, the method "auto" stands for such a codec, too.
        measures_rows: Whether `measure` looks at some rows only, of a weight in any type.
        encodes_stored: Whether `encode` takes a weight in any type; others get float32.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    params_type: ClassVar[type[Params]]
    automatic: ClassVar[bool] = False
    width: ClassVar[str | None] = None
    composite: ClassVar[bool] = False
    trainable: ClassVar[bool] = False
    rounds_inputs: ClassVar[bool] = False
    measures_rows: ClassVar[bool] = False
    encodes_stored: ClassVar[bool] = False

    @property
    def measure(self) -> Measure | None:
        """Errors that follow from a weight's values; planners use them instead of `predict`."""
        return None

    @property
    def spectrum(self) -> SingularValues | None:
        """Singular values, for a codec that keeps the largest ones.

        Errors of products that it measures are those of calibrated factors.
        """
        return None

    @property
    def factors(self) -> EmitFactors | None:
        """The two matrices whose product the weight is, to be used one after the other."""
        return None

    @property
    def experts(self) -> EmitExperts | None:
        """Products with stacks of matrices, of which only those that are used are decoded.

        A codec that has it names ``experts`` and ``batch`` among its `kinds` where it suits.
        """
        return None

    @property
    def calibration(self) -> CalibratedEncoding | None:
        """How weights are encoded for the inputs they have."""
        return None

    @property
    def scaling(self) -> Scaling | None:
        """Scales that weights are proportional to."""
        return None

    @property
    def ranks(self) -> RankGoals | None:
        """How ranks are found from what they are to keep."""
        return None

    @property
    def qualities(self) -> Qualities | None:
        """Named settings."""
        return None

    @property
    def fallback(self) -> DenseFallback | None:
        """When weights stay dense."""
        return None

    @property
    def sharing(self) -> ValueSharing | None:
        """The numbers that weights are copies of."""
        return None

    @property
    def bases(self) -> SharedBases[Codec] | None:
        """How weights share what is found for several of them together."""
        return None

    @property
    def row_parts(self) -> RowParts | None:
        """How its weights are expanded in parts."""
        return None

    @property
    def pacing(self) -> str | None:
        """Start of the key of a shared int64 tensor that bodies read first and kernels never."""
        return None

    @property
    def special(self) -> SpecialBodies | None:
        """Definitions for some weights that take less to expand."""
        return None

    @property
    def calls(self) -> int:
        """How many operators of ours one use becomes."""
        return 1

    @property
    def stock(self) -> bool:
        """Whether its models hold operators of ONNX and ONNX Runtime only."""
        return not self.functions(_ANY_OPSET)

    def refuse(self, site: WeightSite) -> str | None:
        """Why this codec cannot store the site at all; None when it can."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        size = self.size(site, self.params_type())
        if size < site.nbytes:
            return None
        return f"{site.rows} x {site.length} needs {size} bytes, {site.nbytes} dense"

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        self.params_type.of(params)

    def targeted(self, params: Params, target: str) -> Params:
        """The settings, with what suits a class of machines better at equal bytes.

        Args:
            params: Settings of this codec.
            target: A value of the option `target`.
        """
        return params

    def kind(self, params: Params) -> str:
        """Kind of the codes, for a codec that has several; else its name."""
        return self.name

    def cost_key(self, params: Params) -> str | None:
        """What products with these settings have in common in time; None where it is not known."""
        return None if self.width is None else f"{self.name} {getattr(params, self.width)}"

    def candidates(self, site: WeightSite) -> Sequence[Params]:
        """The settings a planner may choose from, from most to fewest bytes."""
        return [] if self.refuse(site) else [self.params_type()]

    @abc.abstractmethod
    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """The tensors `encode` will store for this site, exactly."""

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """The shared tensors the payload will refer to."""
        return {}

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The attributes of the payload, exactly."""
        return {}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of the site's own tensors, exactly."""
        return sum(tensor.nbytes for tensor in self.layout(site, params).values())

    @abc.abstractmethod
    def predict(self, site: WeightSite, params: Params) -> float:
        """Expected relative Frobenius error of the decoded weight, without looking at it."""

    @abc.abstractmethod
    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Encode the canonical matrix ``(rows, length)`` (float32, finite)."""

    @abc.abstractmethod
    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to the canonical matrix ``(rows, length)`` in float32. This is the definition."""

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """What `emit` can produce for this site."""
        return frozenset({"weight", "decode"})

    @abc.abstractmethod
    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """Put the payload into the graph.

        Kind ``matmul``: `x` ``(..., length)`` of the site's dtype gives ``(..., rows)`` of the same
        dtype. ``gather``: `x` holds indices of any shape, the result is ``(..., length)`` in the
        site's dtype. ``weight`` and ``decode``: the canonical matrix in the site's dtype.
        """

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """Expected memory to load what `emit` makes where the operators are not registered."""
        dense = site.nbytes if kind in ("weight", "decode") else 0
        return LoadMemory(dense, 0, dense)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies of the operators that `emit` uses, valid in models of this opset."""
        return ()
