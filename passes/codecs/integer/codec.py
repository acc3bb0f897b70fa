"""The integer codec: 4 or 8 bits and a scale for each block, run by ONNX Runtime's own operators.

A product becomes MatMulNBits; eight bits are two of them, one for each half of the integers, so
that every ONNX Runtime with 4-bit products runs them. Look-ups and dense uses are Cast, Sub and Mul
on the looked-up rows, or on the weight when a session starts. The file holds no custom operator.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.integer import grid as integer_grid
from onnxcomp.passes.codecs.integer import nodes as integer_nodes
from onnxcomp.passes.codecs.integer.grid import Integers
from onnxcomp.passes.codecs.integer.nodes import BlockLayout
from onnxcomp.passes.codecs.moments import damped, output_error, with_weight_error
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    LoadMemory,
    Payload,
    TensorLayout,
)
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite, picked_rows

__all__ = ["IntegerCodec", "IntegerParams"]

V = TypeVar("V")

_UINT8 = np.dtype(np.uint8)

# Scales have the type of the weight, as MatMulNBits asks; its kernels have no bfloat16.
_SCALES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.float32),
}

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)

# Decibels between normal data and its rounding error, by bits, block and zero points; measured on
# eight million values.
_NORMAL_SQNR = {
    (4, 16, 1): 23.162,
    (4, 32, 1): 21.854,
    (4, 64, 1): 20.811,
    (4, 128, 1): 19.956,
    (4, 256, 1): 19.224,
    (8, 16, 1): 47.770,
    (8, 32, 1): 46.463,
    (8, 64, 1): 45.422,
    (8, 128, 1): 44.564,
    (8, 256, 1): 43.831,
    (4, 16, 0): 22.400,
    (4, 32, 0): 21.317,
    (4, 64, 0): 20.452,
    (4, 128, 0): 19.731,
    (4, 256, 0): 19.108,
    (8, 16, 0): 46.624,
    (8, 32, 0): 45.500,
    (8, 64, 0): 44.601,
    (8, 128, 0): 43.853,
    (8, 256, 0): 43.216,
}


@dataclasses.dataclass(frozen=True, slots=True)
class IntegerParams(Params):
    """Settings of the integer codec.

    Attributes:
        bits: Bits per weight: 4 or 8.
        block: Largest number of weights with one scale: 16, 32, 64, 128 or 256. A smaller one is
            taken where padding would make it cheaper.
        zero_points: 1 stores a zero point for each block, so that its range need not be symmetric;
            0 does not.
    """

    bits: int = 4
    block: int = 128
    zero_points: int = 1


# Weights that an error is measured on before a codec is chosen.
_MEASURED = 1 << 16

# What a planner may choose from. Zero points take 4 or 8 bits for each block and always pay.
_OFFERED = tuple(IntegerParams(bits, block) for bits in (8, 4) for block in (32, 64, 128))

# For what a target leaves, beside the usual block; at 4 bits other codecs make more of the bytes.
_FINEST, _USUAL = IntegerParams(8, 16), IntegerParams(8, 128)


def _form(site: WeightSite, params: Params) -> BlockLayout:
    """The smallest form of the weight."""
    halved = any(use.need == "matmul" for use in site.uses)
    extent = (site.rows, site.length)
    return _smallest(extent, site.fusable, halved, site.dtype, IntegerParams.of(params))


@functools.lru_cache(maxsize=1 << 12)
def _smallest(
    extent: tuple[int, int], fusable: bool, halved: bool, dtype: str, params: IntegerParams
) -> BlockLayout:
    """The smallest way to cut a weight into blocks; of equally small ones the largest blocks.

    A weight that is only ever used dense may also be read flat, as rows of one block each.
    """
    rows, length = extent
    size = rows * length
    blocks = [block for block in sorted(BLOCKS, reverse=True) if block <= params.block]
    extents = [(b, rows, length) for b in blocks]
    if not fusable:
        extents += [(b, size // b, b) for b in blocks if size % b == 0]
    halves = halved and params.bits == 8
    forms = [
        BlockLayout(params.bits, *extent, bool(params.zero_points), halves, _SCALES[dtype])
        for extent in extents
    ]
    return min(forms, key=lambda form: form.nbytes)


def _sampled(weight: Array, rows: int, length: int) -> Array:
    """Some rows of a weight that is read as this many of this length."""
    matrix = weight.reshape(rows, length)
    return picked_rows(matrix, slice(None, None, max(1, matrix.size // _MEASURED)))


def _measured(form: BlockLayout, sample: Array, stats: Stats | None) -> float:
    """Relative error of some rows of a weight, or of their products where inputs are given."""
    decoded = integer_grid.rounded(sample, form.grid).decode(form.length)
    if stats is not None:
        return output_error(sample, decoded, stats.gram)
    power = float(np.square(sample, dtype=np.float64).sum())
    noise = float(np.square(decoded - sample, dtype=np.float64).sum())
    return math.sqrt(noise / power) if power > 0.0 else 0.0


class IntegerCodec(Codec):
    """MatMulNBits (domain com.microsoft) and standard operators."""

    name: ClassVar[str] = "int"
    summary: ClassVar[str] = (
        "4 or 8 bits and a scale for each block; ONNX Runtime's own operators, no library"
    )
    params_type: ClassVar[type[Params]] = IntegerParams
    automatic: ClassVar[bool] = True
    width: ClassVar[str | None] = "bits"
    measures_rows: ClassVar[bool] = True

    @property
    def calibration(self) -> CalibratedEncoding:
        """GPTQ, for inputs with known moments."""
        return CalibratedEncoding(self.encode_calibrated, self.calibrates)

    def refuse(self, site: WeightSite) -> str | None:
        """Why no setting of this codec suits the site; None when one does."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        least = min(self.size(site, params) for params in _OFFERED)
        if least >= site.nbytes:
            shape = f"{site.rows} x {site.length}"
            return f"{shape} needs {least} bytes padded to whole blocks, {site.nbytes} dense"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        settings = IntegerParams.of(params)
        if settings.bits not in BITS:
            raise UsageError(f"int: bits={settings.bits}", hint="bits are 4 or 8")
        if settings.block not in BLOCKS:
            sizes = ", ".join(map(str, BLOCKS))
            raise UsageError(f"int: block={settings.block}", hint=f"blocks are one of {sizes}")
        if settings.zero_points not in (0, 1):
            raise UsageError(f"int: zero_points={settings.zero_points}", hint="it is 0 or 1")

    def candidates(self, site: WeightSite) -> Sequence[IntegerParams]:
        """Settings smaller than the dense tensor, from most to fewest bytes."""
        if site.refusal(self.name):
            return []
        found = {
            dataclasses.replace(params, block=_form(site, params).block): None
            for params in _OFFERED
        }
        if _USUAL in found:
            found[_FINEST] = None
        smaller = [params for params in found if self.size(site, params) < site.nbytes]
        return sorted(smaller, key=lambda params: -self.size(site, params))

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Integers, scales and zero points; see docs/format.md."""
        form = _form(site, params)
        scales = TensorLayout((form.rows, form.blocks), form.scale_type)
        shapes = form.byte_shapes()
        return {"scales": scales, **{k: TensorLayout(s, _UINT8) for k, s in shapes.items()}}

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Zero points of lower halves that have none of their own."""
        return _form(site, params).shared()

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The block and the extent that is stored, which is another than the site's when flat."""
        form = _form(site, params)
        return {"bits": form.bits, "block": form.block, "extent": (form.rows, form.length)}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of integers, scales and zero points, exactly."""
        return _form(site, params).nbytes

    def predict(self, site: WeightSite, params: Params) -> float:
        """Relative error measured on normal data; weights with outliers have more."""
        form = _form(site, params)
        key = (form.bits, form.block, int(form.zero_points))
        return math.pow(10.0, -_NORMAL_SQNR[key] / 20.0)

    def measure(
        self,
        site: WeightSite,
        weight: Array,
        params: Sequence[Params],
        stats: Stats | None = None,
    ) -> Sequence[float]:
        """Errors of rounding to nearest on a sample of rows: outliers decide about them."""
        forms = [_form(site, item) for item in params]
        extents = {(form.rows, form.length) for form in forms}
        samples = {extent: _sampled(weight, *extent) for extent in extents}
        return [
            _measured(
                form,
                samples[form.rows, form.length],
                stats if (form.rows, form.length) == weight.shape else None,
            )
            for form in forms
        ]

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Round ``(rows, length)`` float32 to the nearest integers."""
        form = _form(site, params)
        matrix = np.asarray(weight, np.float32).reshape(form.rows, form.length)
        return self._payload(site, params, integer_grid.rounded(matrix, form.grid))

    def calibrates(self, site: WeightSite, params: Params) -> bool:
        """Whether rows of the weight are rows of the stored form: not so where it is read flat."""
        form = _form(site, params)
        return (form.rows, form.length) == (site.rows, site.length)

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """GPTQ for inputs with the second moments of `stats`; looked-up rows count a little."""
        moments = damped(stats)
        if stats.frequencies is not None:
            moments = with_weight_error(moments, weight)
        integers = integer_grid.gptq(np.asarray(weight), _form(site, params).grid, moments)
        return self._payload(site, params, integers)

    def _payload(self, site: WeightSite, params: Params, integers: Integers) -> Payload:
        form = _form(site, params)
        tensors = {"scales": integers.scales, **form.pack(integers)}
        return Payload(tensors, form.shared(), self.attributes(site, params))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32."""
        form = BlockLayout.of(payload)
        return form.unpack(payload).decode(form.length).reshape(site.rows, site.length)

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products and look-ups where the site has such uses; the dense weight always."""
        return site.kinds

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> MatMulNBits(x, ...), or rows and whole weights by standard operators."""
        return integer_nodes.emit(builder, site, payload, kind, x)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """Nothing for products and look-ups; what folding Cast, Sub and Mul takes for the rest."""
        if kind in ("matmul", "gather"):
            return LoadMemory(0, 0)
        form = _form(site, params)
        return LoadMemory(form.folding_bytes, 0)
