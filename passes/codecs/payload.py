"""What is stored of a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from onnxcomp.passes.weight import Array, Attribute

__all__ = ["Payload"]


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
