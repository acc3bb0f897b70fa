"""The sparse codec: weights that were pruned without structure, bit for bit.

Format: ops/sparse/spec.md. A mask has a bit for every element, or for every block where elements
are kept in blocks; those with no bit set are left out. How many are kept, and in which blocks, is
found by `passes.analysis.zeros`, so that sizes are exact before anything is encoded.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.half import HALF_ERROR
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.format import MOST_KEPT
from onnxcomp.passes.codecs.sparse.masks import BLOCK_SIDES, MaskForm, stored_form
from onnxcomp.passes.weight import DTYPES, Array, Attribute, Kind, WeightSite

__all__ = ["CodedZeros", "SparseCodec", "SparseParams"]

V = TypeVar("V")


class CodedZeros(Codec):
    """A codec of weights with zeros whose other elements take fewer bits, in several sizes."""

    @abc.abstractmethod
    def _offered(self, site: WeightSite) -> Sequence[Params]:
        """Settings from most to fewest bytes, those that make it no smaller among them."""

    def refuse(self, site: WeightSite) -> str | None:
        """Only weights with zeros, which analysis counts, that become smaller."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        if site.kept is None:
            return "too few of its elements are zero"
        least = min(self.size(site, params) for params in self._offered(site))
        if least < site.nbytes:
            return None
        return f"{site.rows} x {site.length} needs {least} bytes, {site.nbytes} dense"

    def candidates(self, site: WeightSite) -> Sequence[Params]:
        """Those that make it smaller."""
        if self.refuse(site):
            return []
        return [params for params in self._offered(site) if self.size(site, params) < site.nbytes]


@dataclasses.dataclass(frozen=True, slots=True)
class SparseParams(Params):
    """Settings of the sparse codec.

    Attributes:
        kept: Elements that are not zero, as many as the weight has; found when it is read.
        high: Rows of a block that is kept as a whole or not at all; found as well.
        wide: Columns of such a block.
        value_bits: 16 to round elements of float32 weights to half precision; 0 to keep every bit.
    """

    kept: int = 0
    high: int = 1
    wide: int = 1
    value_bits: int = 0

    def to_json(self) -> dict[str, Any]:
        """Parameters by name; without those that older files lack, where they say nothing."""
        found = dataclasses.asdict(self)
        if (self.high, self.wide) == (1, 1):
            del found["high"], found["wide"]
        if not self.value_bits:
            del found["value_bits"]
        return found

    def stored(self, site: WeightSite) -> np.dtype[Any]:
        """The type that elements are stored in."""
        own = DTYPES[site.dtype]
        return np.dtype(np.float16) if self.value_bits and own.itemsize > 2 else own


def _form(site: WeightSite, params: SparseParams) -> MaskForm:
    return MaskForm(site.rows, site.length, block=(params.high, params.wide))


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        found = values.astype(dtype, copy=False)
    if not np.array_equal(np.isfinite(found), np.isfinite(values)):
        raise ModelError("some values do not fit in float16")
    return found


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
        if sparse.high not in BLOCK_SIDES or sparse.wide not in BLOCK_SIDES:
            raise UsageError(
                f"sparse: blocks of {sparse.high} x {sparse.wide}",
                hint=f"sides are {', '.join(map(str, BLOCK_SIDES))}",
            )
        if sparse.value_bits not in (0, 16):
            raise UsageError(
                f"sparse: value_bits={sparse.value_bits}", hint="16, or 0 to keep every bit"
            )

    def candidates(self, site: WeightSite) -> Sequence[SparseParams]:
        """The weight as it is, without its zeros."""
        if self.refuse(site) or site.kept is None:
            return []
        plain, blocks = SparseParams(site.kept), SparseParams(site.kept, *site.block)
        return [min(plain, blocks, key=lambda params: self.size(site, params))]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Mask and values of spec.md section 1."""
        sparse = SparseParams.of(params)
        return {
            "mask": TensorLayout(_form(site, sparse).shape, np.dtype(np.uint8)),
            "values": TensorLayout((1 + sparse.kept,), sparse.stored(site)),
        }

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Constants of the portable body."""
        form = _form(site, SparseParams.of(params))
        return {**sparse_format.shared_tensors(site.rows, site.length), **form.shared()}

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The blocks, where there are any."""
        sparse = SparseParams.of(params)
        block = (sparse.high, sparse.wide)
        return {} if block == (1, 1) else {"block": block}

    def predict(self, site: WeightSite, params: Params) -> float:
        """Zero, or the error of normal data in half precision."""
        return 0.0 if SparseParams.of(params).stored(site) == DTYPES[site.dtype] else HALF_ERROR

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Store ``(rows, length)``; without changing a bit unless settings say otherwise.

        Raises:
            ModelError: The weight has other elements that are not zero than were planned, or some
                that half precision cannot hold.
        """
        sparse = SparseParams.of(params)
        tensors = sparse_format.pack(np.asarray(weight, DTYPES[site.dtype]))
        found = len(tensors["values"]) - 1
        if found != sparse.kept:
            raise ModelError(f"{found} elements are not zero, {sparse.kept} were planned")
        tensors["mask"] = _form(site, sparse).pack_bits(tensors["mask"])
        tensors["values"] = _rounded(tensors["values"], sparse.stored(site))
        return Payload(tensors, self.shared(site, params), self.attributes(site, params))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """The weight in float32, ``(rows, length)``."""
        bits = stored_form(site, payload).bits(payload.tensors["mask"])
        tensors = {"mask": bits, "values": payload.tensors["values"]}
        tensors["values"] = tensors["values"].astype(DTYPES[site.dtype], copy=False)
        restored = sparse_format.decode(tensors, (site.rows, site.length))
        return restored.astype(np.float32, copy=False)

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> SparseWeight(mask, values, ...) or SparseDecode(mask, values, ...)."""
        from onnxcomp.passes.codecs.sparse import bodies

        if kind not in ("weight", "decode"):
            raise UsageError(f"the codec sparse has no {kind}")
        mask = bodies.bits_of(builder, stored_form(site, payload), builder.tensor("mask"))
        values = builder.tensor("values")
        if payload.tensors["values"].dtype != DTYPES[site.dtype]:
            values = builder.node("Cast", [values], {"to": int(onnx.TensorProto.FLOAT)})
        return bodies.place(builder, site, mask, values, kind)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.load_memory(site)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset; none before 11, which has CumSum."""
        from onnxcomp.passes.codecs.sparse import bodies

        return bodies.functions(opset)
