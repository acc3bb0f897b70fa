"""The codec rows8: one byte for each weight and one scale for each row.

``W = codes * scale``, by standard operators, which a session folds to the weight when it starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, Payload, TensorLayout
from onnxcomp.passes.weight import Array, Kind, WeightSite

__all__ = ["Rows8Codec", "Rows8Params"]

V = TypeVar("V")

_LARGEST = 127


@dataclasses.dataclass(frozen=True, slots=True)
class Rows8Params(Params):
    """The codec rows8 has no settings."""


class Rows8Codec(Codec):
    """Integers of 8 bits, the largest of each row 127."""

    name: ClassVar[str] = "rows8"
    summary: ClassVar[str] = "one byte for each weight, one scale for each row; no library"
    params_type: ClassVar[type[Params]] = Rows8Params

    def refuse(self, site: WeightSite) -> str | None:
        """Only float32 weights are restored exactly as they are decoded."""
        if site.dtype != "float32":
            return f"rows8 stores float32 weights, not {site.dtype}"
        return super().refuse(site)

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """``codes (rows, length)`` and ``scale (rows, 1)``."""
        return {
            "codes": TensorLayout((site.rows, site.length), np.dtype(np.int8)),
            "scale": TensorLayout((site.rows, 1), np.dtype(np.float32)),
        }

    def predict(self, site: WeightSite, params: Params) -> float:
        """Even rounding to steps of a 127th of the largest of `length` normal numbers."""
        # Expected maximum of n normal numbers: Cramér (1946), 28.6.16.
        n = 2 * max(site.length, 2)
        root = math.sqrt(2 * math.log(n))
        largest = root - (math.log(math.log(n)) + math.log(4 * math.pi)) / (2 * root)
        largest += float(np.euler_gamma) / root
        return largest / _LARGEST / math.sqrt(12)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round ``(rows, length)``."""
        scale = np.abs(weight).max(axis=1, keepdims=True, initial=0) / np.float32(_LARGEST)
        codes = np.rint(weight / np.where(scale == 0, np.float32(1), scale)).astype(np.int8)
        return Payload({"codes": np.ascontiguousarray(codes), "scale": scale})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """``codes * scale`` in float32."""
        return np.asarray(payload.tensors["codes"].astype(np.float32) * payload.tensors["scale"])

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> Mul(Cast(codes), scale)."""
        floats = builder.node(
            "Cast", [builder.tensor("codes")], {"to": int(onnx.TensorProto.FLOAT)}
        )
        return builder.node("Mul", [floats, builder.tensor("scale")])
