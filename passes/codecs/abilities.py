"""What some codecs are able to do for passes that ask for it: rivals, and values to train."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["RivalledCodec", "SharedValues", "TrainableCodec"]


@runtime_checkable
class RivalledCodec(Codec, Protocol):
    """A codec that is mostly worse than another one at equal bytes, and says by how much.

    Attributes:
        rival: Name of the other codec.
    """

    rival: ClassVar[str]

    def limit(self, params: Params) -> float:
        """Relative error of products above which a weight stays dense."""
        ...


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


@runtime_checkable
class TrainableCodec(Codec, Protocol):
    """A codec whose weights are signed copies of fewer numbers."""

    def shared_values(self, site: WeightSite, payload: Payload) -> SharedValues:
        """The numbers, and which of them every weight is."""
        ...

    def with_values(
        self, site: WeightSite, params: Params, payload: Payload, values: Array
    ) -> Payload:
        """The payload with other numbers; same layout, same attributes."""
        ...
