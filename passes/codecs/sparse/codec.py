"""The sparse codec: weights that were pruned without structure, bit for bit.

Format: ops/sparse/spec.md. A mask has a bit for every element, and elements with no bit set are
left out. How many are kept is found by `passes.analysis.zeros`, so that sizes are exact before
anything is encoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.format import MOST_KEPT, MaskLayout
from onnxcomp.passes.weight import DTYPES, Array, Kind, WeightSite

__all__ = ["SparseCodec", "SparseParams"]

V = TypeVar("V")


@dataclasses.dataclass(frozen=True, slots=True)
class SparseParams(Params):
    """Settings of the sparse codec.

    Attributes:
        kept: Elements that are not zero, as many as the weight has; found when it is read.
    """

    kept: int = 0


def _geometry(site: WeightSite, params: SparseParams) -> MaskLayout:
    return MaskLayout(site.rows, site.length, params.kept, DTYPES[site.dtype].itemsize)


class SparseCodec(Codec):
    """SparseDecode and SparseWeight of ops/sparse/spec.md."""

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "weights with zeros, exactly: a bit for each element, and the others"
    params_type: ClassVar[type[Params]] = SparseParams
    automatic: ClassVar[bool] = True

    def refuse(self, site: WeightSite) -> str | None:
        """Only weights with so many zeros that they become smaller, which analysis counts."""
        refusal = site.refusal(self.name)
        if refusal is None and site.kept is None:
            return "too few of its elements are zero"
        return refusal

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        sparse = SparseParams.of(params)
        if not 0 <= sparse.kept <= MOST_KEPT:
            raise UsageError(f"sparse: kept={sparse.kept}", hint=f"0 to {MOST_KEPT} elements")

    def candidates(self, site: WeightSite) -> Sequence[SparseParams]:
        """The weight as it is, without its zeros."""
        return [] if self.refuse(site) or site.kept is None else [SparseParams(site.kept)]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Mask and values of spec.md section 1."""
        geometry = _geometry(site, SparseParams.of(params))
        return {
            "mask": TensorLayout(geometry.mask_shape, np.dtype(np.uint8)),
            "values": TensorLayout(geometry.values_shape, DTYPES[site.dtype]),
        }

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Constants of the portable body."""
        return sparse_format.shared_tensors(site.rows, site.length)

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of mask and values, exactly."""
        return _geometry(site, SparseParams.of(params)).nbytes

    def predict(self, site: WeightSite, params: Params) -> float:
        """Zero."""
        return 0.0

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Store ``(rows, length)`` without changing a bit.

        Raises:
            ModelError: The weight has more or fewer elements that are not zero than was planned.
        """
        planned = SparseParams.of(params).kept
        tensors = sparse_format.pack(np.asarray(weight, DTYPES[site.dtype]))
        found = len(tensors["values"]) - 1
        if found != planned:
            raise ModelError(f"{found} elements are not zero, {planned} were planned")
        return Payload(tensors, self.shared(site, params))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The weight in float32, ``(rows, length)``."""
        restored = sparse_format.decode(payload.tensors, (site.rows, site.length))
        return restored.astype(np.float32, copy=False)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> SparseWeight(mask, values, ...) or SparseDecode(mask, values, ...)."""
        from onnxcomp.passes.codecs.sparse import bodies

        if kind not in ("weight", "decode"):
            raise UsageError(f"the codec sparse has no {kind}")
        return bodies.emit(builder, site, payload, kind)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.load_memory(site)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset; none before 11, which has CumSum."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.functions(opset)
