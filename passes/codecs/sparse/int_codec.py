"""The codec sparse+int: weights with zeros, the other elements as integers of 4 or 8 bits.

Format: ops/sparse/spec.md, section 4. Products are computed on it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.codecs.sparse import integers
from onnxcomp.passes.codecs.sparse.codec import CodedZeros
from onnxcomp.passes.codecs.sparse.format import MOST_KEPT, count_kept, is_kept
from onnxcomp.passes.codecs.sparse.integers import ANY, BITS, GROUPS, PAIRED, IntLayout
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite, picked_rows

__all__ = ["SparseIntCodec", "SparseIntParams"]

V = TypeVar("V")

# Shares of the largest element that scales of few bits are tried with: to cut off the largest ones
# pays where there are few levels.
_SHARES: Mapping[int, Sequence[float]] = {8: (1.0,), 4: (1.0, 0.92, 0.85, 0.78, 0.7)}

# Elements of a weight that are rounded to find its error.
_MEASURED = 1 << 18


@dataclasses.dataclass(frozen=True, slots=True)
class SparseIntParams(Params):
    """Settings of the codec sparse+int.

    Attributes:
        bits: Bits of an element that is kept, 4 or 8.
        group: Columns of a row that share a scale: 64, 128 or 256.
        paired: 1 where two of every four elements of a row are kept and a byte says which of
            twelve; 0 for any pattern, with a bit for each element.
        kept: Elements that are not zero, as many as the weight has; found when it is read.
    """

    bits: int = 8
    group: int = 128
    paired: int = 0
    kept: int = 0


def _layout(site: WeightSite, params: SparseIntParams) -> IntLayout:
    paired = params.paired == 1
    return IntLayout(site.rows, site.length, params.bits, params.group, paired, params.kept)


def _scales(weight: Array, layout: IntLayout) -> Array:
    """The scales (rows, G, 1) in float16 that lose least.

    Raises:
        ModelError: Values are too large for float16 scales.
    """
    groups = layout.groups
    wide = np.pad(weight, ((0, 0), (0, groups * layout.group - layout.length)))
    parts = wide.reshape(layout.rows, groups, layout.group)
    most = 2 ** (layout.bits - 1) - 1
    largest = np.abs(parts).max(axis=2, keepdims=True)
    best = np.full(largest.shape, np.inf, np.float32)
    found = np.zeros(largest.shape, np.float16)
    for share in _SHARES[layout.bits]:
        with np.errstate(over="ignore"):
            scales = (largest * np.float32(share / most)).astype(np.float16)
        if not np.isfinite(scales).all():
            raise ModelError("values are too large for float16 scales")
        factor = scales.astype(np.float32)
        codes = np.divide(parts, factor, out=np.zeros_like(parts), where=factor > 0)
        codes = np.clip(np.rint(codes), -most, most)
        noise = np.square(codes * factor - parts).sum(axis=2, keepdims=True)
        better = noise < best
        best, found = np.where(better, noise, best), np.where(better, scales, found)
    return found


def _encoded(weight: Array, layout: IntLayout) -> dict[str, Array]:
    """Mask, codes and scales of float32 ``(rows, length)``; of rows at a time."""
    return integers.encode(weight, is_kept(weight), _scales(weight, layout), layout)


@functools.lru_cache(maxsize=16)
def _usual_error(bits: int, group: int) -> float:
    """Relative error of normal weights, half of them zero."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 1024), np.float32)
    weight[rng.random(weight.shape) < 0.5] = 0
    return _error(weight, bits, group)


def _error(weight: Array, bits: int, group: int) -> float:
    """Relative error of rounding the elements that are kept."""
    kept = count_kept(weight)
    rows, length = weight.shape
    layout = IntLayout(rows, length, bits, group, False, kept)
    decoded = integers.decode(_encoded(weight, layout), layout)
    power = float(np.square(weight, dtype=np.float64).sum())
    noise = float(np.square(decoded - weight, dtype=np.float64).sum())
    return math.sqrt(noise / power) if power > 0.0 else 0.0


class SparseIntCodec(CodedZeros):
    """SparseIntMatMul, SparseIntDecode and SparseIntWeight of ops/sparse/spec.md."""

    name: ClassVar[str] = "sparse+int"
    summary: ClassVar[str] = "weights with zeros: what is not zero in integers of 4 or 8 bits"
    params_type: ClassVar[type[Params]] = SparseIntParams
    width: ClassVar[str | None] = "bits"
    measures_rows: ClassVar[bool] = True

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        sparse = SparseIntParams.of(params)
        limits = (
            ("bits", sparse.bits in BITS, "bits are 4 or 8"),
            ("group", sparse.group in GROUPS, "groups are 64, 128 or 256 columns"),
            ("paired", sparse.paired in (0, 1), "it is 0 or 1"),
            ("kept", 0 <= sparse.kept <= MOST_KEPT, f"0 to {MOST_KEPT} elements"),
        )
        for name, valid, hint in limits:
            if not valid:
                raise UsageError(f"sparse+int: {name}={getattr(sparse, name)}", hint=hint)

    def _offered(self, site: WeightSite) -> list[SparseIntParams]:
        """Both numbers of bits, with the smaller mask of those that the weight permits."""
        found = []
        for bits in reversed(BITS):
            forms = [SparseIntParams(bits, kept=site.kept or 0)]
            if site.paired:
                forms.append(dataclasses.replace(forms[0], paired=1))
            found.append(min(forms, key=lambda params: self.size(site, params)))
        return found

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Mask, codes and scales of spec.md section 4."""
        layout = _layout(site, SparseIntParams.of(params))
        return {
            "mask": TensorLayout(layout.mask_shape, np.dtype(np.uint8)),
            "codes": TensorLayout(layout.codes_shape, np.dtype(np.uint8)),
            "scales": TensorLayout(layout.scales_shape, np.dtype(np.float16)),
        }

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Constants of the portable body."""
        return integers.shared_tensors(_layout(site, SparseIntParams.of(params)))

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """What the tensors mean."""
        sparse = SparseIntParams.of(params)
        pattern = PAIRED if sparse.paired else ANY
        return {"group": sparse.group, "bits": sparse.bits, "pattern": pattern}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of mask, codes and scales, exactly."""
        return _layout(site, SparseIntParams.of(params)).nbytes

    def predict(self, site: WeightSite, params: Params) -> float:
        """Relative error on normal weights."""
        sparse = SparseIntParams.of(params)
        return _usual_error(sparse.bits, sparse.group)

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """Errors of rounding to nearest on a sample of rows: outliers decide about them."""
        sample = picked_rows(weight, slice(None, None, max(1, weight.size // _MEASURED)))
        asked = [SparseIntParams.of(item) for item in params]
        return [_error(sample, item.bits, item.group) for item in asked]

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round what is not zero of ``(rows, length)`` float32.

        Raises:
            ModelError: The weight has other zeros than were planned, or values are too large.
        """
        layout = _layout(site, SparseIntParams.of(params))
        matrix = np.ascontiguousarray(weight, np.float32)
        found = count_kept(matrix)
        if found != layout.kept:
            raise ModelError(f"{found} elements are not zero, {layout.kept} were planned")
        tensors = _encoded(matrix, layout)
        return Payload(tensors, self.shared(site, params), self.attributes(site, params))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32."""
        bits, group = int(str(payload.attributes["bits"])), int(str(payload.attributes["group"]))
        paired = payload.attributes["pattern"] in (PAIRED, list(PAIRED))
        layout = IntLayout(site.rows, site.length, bits, group, paired, 0)
        return integers.decode(payload.tensors, layout)

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products where the site has such uses; the dense weight always."""
        kinds: set[Kind] = {"weight", "decode"}
        kinds.update(use.need for use in site.uses if use.need == "matmul")
        return frozenset(kinds)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> SparseIntMatMul(x, ...), SparseIntWeight(...) or SparseIntDecode(...)."""
        from onnxcomp.passes.codecs.sparse import bodies

        if kind not in self.kinds(site):
            raise UsageError(f"the codec sparse+int has no {kind}")
        return bodies.emit_integers(builder, site, payload, kind, x)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.int_load_memory(site)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset; none before 11, which has CumSum."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.int_functions(opset)
