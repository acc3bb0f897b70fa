"""Memory that expanding a weight takes while a session is created, and bodies that take less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import onnx

from onnxcomp.passes.codecs.builder import Builder
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.payload import Payload
from onnxcomp.passes.weight import WeightSite

__all__ = ["Joining", "LoadMemory", "SpecialBodies"]

V = TypeVar("V")


@dataclasses.dataclass(frozen=True, slots=True)
class LoadMemory:
    """Memory in bytes that a session without the operator library takes to expand one use.

    Attributes:
        kept: Intermediate results that stay until a pass over the model is over.
        working: What is needed on top while this use is expanded.
        result: What of `kept` the session needs from then on.
        passes: In how many passes, one after another, equal parts of this are expanded.
    """

    kept: int
    working: int
    result: int = 0
    passes: int = 1

    def share(self, parts: int) -> LoadMemory:
        """That of one of several equal parts."""
        return LoadMemory(self.kept // parts, self.working // parts, self.result // parts)


class Joining(Protocol):
    """How weights with equal settings are expanded by the nodes of one.

    They become parts of the rows of one matrix, in their order.
    """

    def settings(self, inputs: Sequence[V]) -> tuple[V, ...]:
        """Those inputs of a call that have to be the same for weights that are joined."""
        ...

    def width(self, attributes: Mapping[str, int]) -> int:
        """Columns of the matrix, from the attributes of a call that are numbers."""
        ...

    def parts(self, extent: tuple[int, int], width: int) -> tuple[int, int]:
        """Rows of the matrix that a weight becomes.

        Args:
            extent: Rows and columns of the weight.
            width: Columns of the matrix.

        Returns:
            Those that are the weight, and those behind them that are padding.
        """
        ...

    def emit(self, builder: Builder[V], calls: Sequence[Sequence[V]], groups: Sequence[int]) -> V:
        """The matrix.

        Args:
            builder: Makes nodes.
            calls: Inputs of the calls that expand the weights.
            groups: Rows of the matrix that each of their rows becomes; in order.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialBodies:
    """Definitions of a codec's operators for some weights, with the signature of the general ones.

    Attributes:
        weight: For a whole weight in a model of an opset; None where the general one is as good.
        product: For products with these payloads, which are expanded in so many passes and compute
            in these element types; None where the general one is as good.
        rows: For rows of several weights together; None where the general one is as good.
        joining: How weights with equal settings become these rows.
    """

    weight: Callable[[int, WeightSite, Params], onnx.FunctionProto | None]
    product: Callable[[int, Sequence[Payload], int, frozenset[str]], onnx.FunctionProto | None]
    rows: Callable[[int, WeightSite, Params], onnx.FunctionProto | None]
    joining: Joining
