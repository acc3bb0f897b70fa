"""What weights share: numbers that their elements are copies of, and tensors found for several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.weight import Array, Stats, WeightSite

__all__ = ["BasisSums", "SharedBases", "SharedValues"]

C = TypeVar("C", covariant=True)


class BasisSums(Protocol):
    """What a basis is found from: sums over the weights that share it, added one at a time."""

    def add(self, weight: Array, stats: Stats | None = None) -> None:
        """Add a weight ``(rows, length)``, and what is known of its inputs and outputs."""
        ...

    def basis(self, rank: int) -> Array:
        """The best basis for all weights: float64 ``(rank, length)``."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class SharedBases(Generic[C]):
    """How weights share a basis.

    Attributes:
        key: Weights with equal keys share one, from a site and its settings.
        sums: Empty sums, for rows of a length.
        rank: Rows of the basis that settings stand for.
        bound: The codec that stores weights by a given basis, and is the same else.
    """

    key: Callable[[WeightSite, Params], str]
    sums: Callable[[int], BasisSums]
    rank: Callable[[Params], int]
    bound: Callable[[Array], C]


@dataclasses.dataclass(frozen=True, slots=True)
class SharedValues:
    """A weight as signed copies of fewer numbers, which can be trained.

    Attributes:
        name: Name of the initializer.
        shape: Shape of the stored tensor.
        values: float32, a vector.
        index: int64, which of them each element of the stored tensor is a copy of, flat.
        factors: float32, what each is multiplied by, flat.
    """

    name: str
    shape: tuple[int, ...]
    values: Array
    index: Array
    factors: Array
