"""The codec protocol: how one weight is described, stored, restored and wired into a graph.

A codec never sees a graph. It gets a `WeightSite` (what the weight is and who uses it), its values
as one canonical matrix, and a `Builder` that makes nodes. The canonical matrix is
``(rows, length)``: `length` is the axis a fused product sums over, a row is one output channel
(or one embedding vector).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import onnx

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite

__all__ = [
    "AnchoredCodec",
    "Builder",
    "CalibratedCodec",
    "Codec",
    "FactoredCodec",
    "GradedCodec",
    "LoadMemory",
    "MeasuredCodec",
    "Payload",
    "RankedCodec",
    "SpectralCodec",
    "TensorLayout",
]


V = TypeVar("V")


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
