"""Memory that expanding a weight takes while a session is created, and bodies that take less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.payload import Payload
from onnxcomp.passes.weight import WeightSite

__all__ = ["LoadMemory", "SpecialBodies"]


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


@dataclasses.dataclass(frozen=True, slots=True)
class SpecialBodies:
    """Definitions of a codec's operators for some weights, with the signature of the general ones.

    Attributes:
        weight: For a whole weight in a model of an opset; None where the general one is as good.
        product: For products with these payloads, which are expanded in so many passes; None where
            there is no such definition.
    """

    weight: Callable[[int, WeightSite, Params], onnx.FunctionProto | None]
    product: Callable[[int, Sequence[Payload], int], onnx.FunctionProto | None]
