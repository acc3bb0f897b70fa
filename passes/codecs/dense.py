"""The dense codec: the weight as it is, to compare with and to fall back on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.weight import DTYPES, Array, Kind, WeightSite

__all__ = ["DenseCodec", "DenseParams"]

V = TypeVar("V")


@dataclasses.dataclass(frozen=True, slots=True)
class DenseParams(Params):
    """The dense codec has no settings."""


class DenseCodec(Codec):
    """The canonical matrix in the dtype of the site."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "the weight as it is"
    params_type: ClassVar[type[Params]] = DenseParams

    def refuse(self, site: WeightSite) -> str | None:
        """Only a dtype the codec does not know is refused."""
        return site.refusal(self.name) if site.size else None

    def candidates(self, site: WeightSite) -> Sequence[DenseParams]:
        """One setting."""
        return [DenseParams()]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """One tensor, ``(rows, length)`` in the site's dtype."""
        return {"weight": TensorLayout((site.rows, site.length), DTYPES[site.dtype])}

    def predict(self, site: WeightSite, params: Params) -> float:
        """Zero: the weight came in the dtype it is stored in."""
        return 0.0

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round ``(rows, length)`` to the site's dtype."""
        return Payload({"weight": np.array(weight, DTYPES[site.dtype], order="C")})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The weight in float32."""
        return payload.tensors["weight"].astype(np.float32)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> the initializer ``(rows, length)``."""
        if kind not in ("weight", "decode"):
            raise UsageError(f"the codec dense cannot make nodes of kind {kind}")
        return builder.tensor("weight")

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """A copy where the stored tensor is the transposed one."""
        return LoadMemory(site.nbytes if site.transposed else 0, 0)
