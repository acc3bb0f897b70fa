"""The fp16 codec: float32 weights stored in half precision and converted back when they are used.

``W -> Cast(W16)``, which a session folds to the float32 weight when it starts; look-ups convert the
rows that are looked up. The file holds no custom operator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.weight import Array, Kind, Stats, WeightSite

__all__ = ["HALF_ERROR", "HalfCodec", "HalfParams"]

V = TypeVar("V")

_HALF = np.dtype(np.float16)
_LARGEST = float(np.finfo(np.float16).max)

# Relative error of normal data rounded to half precision; measured on twenty million values.
HALF_ERROR = 2.076e-4

# Relative error above which too many values are below the smallest normal number of float16: the
# weight is not one that half precision can hold.
_WORST = 1e-3

# Values that are compared at a time.
_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class HalfParams(Params):
    """The fp16 codec has no settings."""


def _relative_error(weight: Array) -> float:
    """Error of a weight in half precision; infinite where it has values out of range."""
    noise = power = 0.0
    rows = max(1, _CHUNK // max(1, weight.shape[-1]))
    for start in range(0, len(weight), rows):
        part = np.asarray(weight[start : start + rows], np.float32)
        if np.abs(part).max(initial=0.0) > _LARGEST:
            return math.inf
        difference = part.astype(_HALF).astype(np.float64) - part
        noise += float(np.square(difference).sum())
        power += float(np.square(part, dtype=np.float64).sum())
    return math.sqrt(noise / power) if power > 0.0 else 0.0


class HalfCodec(Codec):
    """The canonical matrix in float16."""

    name: ClassVar[str] = "fp16"
    summary: ClassVar[str] = "half precision in the file, float32 when a session starts; no library"
    params_type: ClassVar[type[Params]] = HalfParams

    def refuse(self, site: WeightSite) -> str | None:
        """Only float32 weights become smaller."""
        if site.dtype == "float32":
            return None if site.size else "the weight is empty"
        return f"fp16 stores float32 weights, not {site.dtype}"

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """One tensor, ``(rows, length)`` in float16."""
        return {"half": TensorLayout((site.rows, site.length), _HALF)}

    def predict(self, site: WeightSite, params: Params) -> float:
        """The error of normal data."""
        return HALF_ERROR

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """The error of this weight; infinite where half precision cannot hold it."""
        error = _relative_error(weight)
        return [error if error <= _WORST else math.inf for _ in params]

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round ``(rows, length)`` to float16.

        Raises:
            ModelError: Values beyond the range of float16.
        """
        largest = max(-float(weight.min(initial=0.0)), float(weight.max(initial=0.0)))
        if largest > _LARGEST:
            raise ModelError(f"values up to {largest:.3g} do not fit in float16")
        return Payload({"half": np.array(weight, _HALF, order="C")})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The weight in float32."""
        return payload.tensors["half"].astype(np.float32)

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Look-ups where the site has them; the dense weight always."""
        kinds: set[Kind] = {"weight", "decode"}
        kinds.update(use.need for use in site.uses if use.need == "gather")
        return frozenset(kinds)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> Cast(half), Gather(W, x) -> Cast(Gather(half, x))."""
        value = builder.tensor("half")
        if kind == "gather" and x is not None:
            value = builder.node("Gather", [value, x])
        elif kind not in ("weight", "decode"):
            raise UsageError(f"the codec fp16 cannot make nodes of kind {kind}")
        return builder.node("Cast", [value], {"to": int(onnx.TensorProto.FLOAT)})

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """The float32 weight, and a copy where the stored tensor is the transposed one."""
        if kind == "gather":
            return LoadMemory(0, 0)
        return LoadMemory(site.nbytes * (2 if site.transposed else 1), 0)
