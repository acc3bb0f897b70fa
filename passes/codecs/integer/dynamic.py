"""The dynamic codec: int8 weights, and activations that are rounded at every run.

A product is DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one kernel; the
file holds no custom operator. All activations of a product share one range, so large values among
them cost accuracy; planners know by how much (`Codec.rounds_inputs`).

Weights take the integers -63 .. 63: kernels of x86 processors without VNNI add two products of an
unsigned and a signed byte in 16 bits, and 2 * 255 * 64 still fits. So results are the same on every
machine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.weight import Array, Kind, Stats, WeightSite, picked_rows

__all__ = ["DynamicCodec", "DynamicParams"]

V = TypeVar("V")

_MOST = 63  # the largest integer

_FLOAT = int(onnx.TensorProto.FLOAT)

# The version of the standard operators that has all that products need.
_OPSET = 11

# Weights that an error is measured on.
_MEASURED = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicParams(Params):
    """Settings of the dynamic codec.

    Attributes:
        bits: Bits that a weight is stored in: 8.
    """

    bits: int = 8


def _rounded(weight: Array) -> tuple[Array, Array]:
    """Integers ``(rows, length)`` and the scale of each row ``(rows,)``."""
    matrix = np.asarray(weight, np.float32)
    scales = (np.abs(matrix).max(axis=1, initial=0.0) / _MOST).astype(np.float32)
    steps = np.divide(matrix, scales[:, None], out=np.zeros_like(matrix), where=scales[:, None] > 0)
    return np.clip(np.rint(steps), -_MOST, _MOST).astype(np.int8), scales


def _decoded(codes: Array, scales: Array) -> Array:
    return codes.astype(np.float32) * scales[:, None]


@functools.lru_cache(maxsize=1 << 10)
def _normal_error(length: int) -> float:
    """Relative error of rows of normal data: by the mean square of the largest of `length`."""
    x = np.linspace(0.0, 9.0, 1801)
    below = np.array([math.erf(value / math.sqrt(2.0)) for value in x])
    # E[max^2] is the integral of 2 x P(max > x).
    tail = 2.0 * x * (1.0 - below**length)
    most = float(np.sum((tail[1:] + tail[:-1]) / 2.0)) * float(x[1])
    return math.sqrt(most / 12.0) / _MOST


class DynamicCodec(Codec):
    """DynamicQuantizeLinear and MatMulInteger."""

    name: ClassVar[str] = "dynamic"
    summary: ClassVar[str] = (
        "8 bits, and activations rounded at every run: dynamic int8 products; no library"
    )
    params_type: ClassVar[type[Params]] = DynamicParams
    width: ClassVar[str | None] = "bits"
    rounds_inputs: ClassVar[bool] = True
    measures_rows: ClassVar[bool] = True

    def refuse(self, site: WeightSite) -> str | None:
        """Only float32 weights that are multiplied by: nothing else gains from this form."""
        if site.dtype != "float32":
            return f"dynamic stores float32 weights, not {site.dtype}"
        if any(use.need != "matmul" for use in site.uses):
            return "dynamic stores weights of products only"
        return super().refuse(site)

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        bits = DynamicParams.of(params).bits
        if bits != 8:
            raise UsageError(f"dynamic: bits={bits}", hint="bits are 8")

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Integers ``(length, rows)``, as MatMulInteger reads them, and a scale for each row."""
        return {
            "codes": TensorLayout((site.length, site.rows), np.dtype(np.int8)),
            "scales": TensorLayout((site.rows,), np.dtype(np.float32)),
        }

    def predict(self, site: WeightSite, params: Params) -> float:
        """The error of normal data."""
        return _normal_error(site.length)

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """The error of some rows, or of their products; that of activations is not part of it."""
        sample = picked_rows(weight, slice(None, None, max(1, weight.size // _MEASURED)))
        decoded = _decoded(*_rounded(sample))
        if stats is not None:
            error = output_error(sample, decoded, stats.gram)
        else:
            power = float(np.square(sample, dtype=np.float64).sum())
            noise = float(np.square(decoded - sample, dtype=np.float64).sum())
            error = math.sqrt(noise / power) if power > 0.0 else 0.0
        return [error for _ in params]

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round ``(rows, length)`` float32 to the nearest integers of each row."""
        codes, scales = _rounded(weight)
        return Payload({"codes": np.ascontiguousarray(codes.T), "scales": scales})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32."""
        return np.ascontiguousarray(_decoded(payload.tensors["codes"].T, payload.tensors["scales"]))

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products where the site has them; the dense weight always."""
        return frozenset(kind for kind in site.kinds if kind != "gather")

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """``(q, s, z) = DynamicQuantizeLinear(x)``, ``y = MatMulInteger(q, codes, z) s scales``.

        ONNX Runtime makes one product of the nodes, and rounds what several products read once.
        """
        codes, scales = builder.tensor("codes"), builder.tensor("scales")
        to: Mapping[str, Any] = {"to": _FLOAT}
        if kind in ("weight", "decode"):
            weight = builder.node("Mul", [builder.node("Cast", [codes], to), scales])
            return builder.node("Transpose", [weight], {"perm": [1, 0]})
        if kind != "matmul" or x is None:
            raise UsageError(f"the codec dynamic cannot make nodes of kind {kind}")
        if builder.opset < _OPSET:
            inputs = [x, codes, scales]
            return builder.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft")
        rounded, step, zero = builder.outputs("DynamicQuantizeLinear", [x], 3)
        sums = builder.node("Cast", [builder.node("MatMulInteger", [rounded, codes, zero])], to)
        return builder.node("Mul", [sums, builder.node("Mul", [step, scales])])

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """Nothing for products; the dense weight and what it is transposed from else."""
        return LoadMemory(0 if kind == "matmul" else 2 * site.nbytes, 0)
