"""The codec sparse+hyper: weights with zeros, the other elements by the codec hyper.

Elements that are kept follow one another, row by row, as the rows of a matrix of one group each:
scales and rotations are theirs alone, and no code is spent on a zero. Format: ops/sparse/spec.md,
section 7. Every use reads the dense weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.lowrank.factor_pair import PartBuilder
from onnxcomp.passes.codecs.lowrank.lowrank_hyper import part_of
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.codec import CodedZeros
from onnxcomp.passes.codecs.sparse.format import MOST_KEPT, is_kept
from onnxcomp.passes.codecs.sparse.masks import BLOCK_SIDES, MaskForm, can_pair, stored_form
from onnxcomp.passes.weight import Array, Attribute, Kind, Use, WeightSite

__all__ = ["SparseHyperCodec", "SparseHyperParams"]

V = TypeVar("V")

_HYPER = HyperCodec()
_VALUES = "values"
_BITS = (6, 5, 4, 3, 2)

# Share of two in every four elements that have to be kept for a mask of pairs: the others are
# stored as if they were kept, and come back as small numbers.
_PAIRED = 0.99


@dataclasses.dataclass(frozen=True, slots=True)
class SparseHyperParams(Params):
    """Settings of the codec sparse+hyper.

    Attributes:
        bits: Bits of an element that is kept, 1..6.
        state_bits: Bits of a state, as for `hyper`.
        group: Elements that are kept, one after the other, with one scale: 32, 64, 128 or 256.
        paired: 1 where two of every four elements of a row are kept and a byte says which of
            twelve; 0 for a bit for each element or block.
        high: Rows of a block that is kept as a whole or not at all.
        wide: Columns of such a block.
        kept: Elements that are not zero, as many as the weight has; found when it is read.
    """

    bits: int = 4
    state_bits: int = 7
    group: int = 128
    paired: int = 0
    high: int = 1
    wide: int = 1
    kept: int = 0


def _coding(params: SparseHyperParams) -> HyperParams:
    return HyperParams(params.bits, params.state_bits, params.group)


def _form(site: WeightSite, params: SparseHyperParams) -> MaskForm:
    block = (params.high, params.wide)
    return MaskForm(site.rows, site.length, params.paired == 1, block)


def _count(site: WeightSite, params: SparseHyperParams) -> int:
    """Elements that are stored."""
    return site.size // 2 if params.paired else params.kept


def _values_site(site: WeightSite, count: int, group: int) -> WeightSite:
    """What is kept, as a weight of its own with a group in each row."""
    rows = max(1, -(-count // group))
    use = Use("", "Reshape", 0, "dense")
    name = f"{site.name}.{_VALUES}"
    return WeightSite(name, (rows, group), site.dtype, (use,), "", rows, group, False)


class SparseHyperCodec(CodedZeros):
    """HyperWeight and SparseWeight, or HyperDecode and SparseDecode."""

    name: ClassVar[str] = "sparse+hyper"
    summary: ClassVar[str] = "weights with zeros: what is not zero in 1 to 6 bits, trellis-coded"
    params_type: ClassVar[type[Params]] = SparseHyperParams
    width: ClassVar[str | None] = "bits"
    composite: ClassVar[bool] = True

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        sparse = SparseHyperParams.of(params)
        limits = (
            ("paired", sparse.paired in (0, 1), "it is 0 or 1"),
            ("high", sparse.high in BLOCK_SIDES, f"blocks have {BLOCK_SIDES} rows"),
            ("wide", sparse.wide in BLOCK_SIDES, f"blocks have {BLOCK_SIDES} columns"),
            ("kept", 0 <= sparse.kept <= MOST_KEPT, f"0 to {MOST_KEPT} elements"),
        )
        for name, valid, hint in limits:
            if not valid:
                raise UsageError(f"sparse+hyper: {name}={getattr(sparse, name)}", hint=hint)
        _HYPER.check(_coding(sparse))

    def _offered(self, site: WeightSite) -> list[SparseHyperParams]:
        """All bits, with the smaller mask of those that the weight permits."""
        kept = site.kept or 0
        high, wide = site.block
        found = []
        for bits in _BITS:
            own = SparseHyperParams(bits, 8 if bits == 6 else 7, high=high, wide=wide, kept=kept)
            forms = [own]
            if site.paired and can_pair(site.length) and kept >= _PAIRED * site.size / 2:
                forms.append(dataclasses.replace(own, paired=1, high=1, wide=1))
            found.append(min(forms, key=lambda params: self.size(site, params)))
        return found

    def _stored(self, site: WeightSite, params: Params) -> tuple[WeightSite, HyperParams]:
        """What is kept as a weight of its own, and its settings."""
        sparse = SparseHyperParams.of(params)
        return _values_site(site, _count(site, sparse), sparse.group), _coding(sparse)

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Mask, and codes and scales of what is kept."""
        mask = TensorLayout(_form(site, SparseHyperParams.of(params)).shape, np.dtype(np.uint8))
        values = _HYPER.layout(*self._stored(site, params))
        return {"mask": mask, **{f"{_VALUES}.{key}": own for key, own in values.items()}}

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Tables and constants of both bodies, and those that make a mask of its pattern."""
        return {
            **_HYPER.shared(*self._stored(site, params)),
            **sparse_format.shared_tensors(site.rows, site.length),
            **_form(site, SparseHyperParams.of(params)).shared(),
        }

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The pattern, and the group and extent of what is kept."""
        sparse = SparseHyperParams.of(params)
        values = _HYPER.attributes(*self._stored(site, params))
        found = {f"{_VALUES}_{key}": value for key, value in values.items()}
        return {**found, "paired": sparse.paired, "block": (sparse.high, sparse.wide)}

    def predict(self, site: WeightSite, params: Params) -> float:
        """That of the codec hyper: a rotation makes all weights alike, and parts of them."""
        return _HYPER.predict(*self._stored(site, params))

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Code what is not zero of ``(rows, length)`` float32.

        Raises:
            ModelError: The weight has other zeros than were planned, or values are too large.
        """
        sparse = SparseHyperParams.of(params)
        form = _form(site, sparse)
        matrix = np.ascontiguousarray(weight, np.float32)
        kept = is_kept(matrix)
        held, found = form.held(kept), int(np.count_nonzero(kept))
        if found != sparse.kept or np.count_nonzero(held) != _count(site, sparse):
            raise ModelError(f"{found} elements are not zero, {sparse.kept} were planned")
        mask = form.pack_bits(np.packbits(held, axis=1, bitorder="little"))
        values, coding = self._stored(site, params)
        flat = np.zeros(values.size, np.float32)
        flat[: _count(site, sparse)] = matrix[held]
        own = _HYPER.encode(values, flat.reshape(values.shape), coding, threads=threads)
        return Payload(
            {"mask": mask, **{f"{_VALUES}.{key}": tensor for key, tensor in own.tensors.items()}},
            self.shared(site, params),
            self.attributes(site, params),
        )

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32."""
        form = stored_form(site, payload)
        bits = form.bits(payload.tensors["mask"])
        count = int(np.count_nonzero(np.unpackbits(bits)))
        part = part_of(payload, _VALUES)
        values = _HYPER.decode(_values_of(site, part), part).reshape(-1)[:count]
        tensors = {"mask": bits, "values": np.concatenate([np.zeros(1, np.float32), values])}
        return sparse_format.decode(tensors, (site.rows, site.length))

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> SparseWeight(mask, Concat(0, HyperWeight(...))), or the same that decodes."""
        from onnxcomp.passes.codecs.sparse import bodies

        if kind not in ("weight", "decode"):
            raise UsageError(f"the codec sparse+hyper has no {kind}")
        form, part = stored_form(site, payload), part_of(payload, _VALUES)
        own: Builder[V] = PartBuilder(builder, _VALUES, part)
        stored = _values_of(site, part)
        matrix = _HYPER.emit(own, stored, part, kind, None)
        count = int(np.count_nonzero(np.unpackbits(form.bits(payload.tensors["mask"]))))
        values = bodies.first_values(builder, site, matrix, count, stored.size)
        mask = bodies.bits_of(builder, form, builder.tensor("mask"))
        return bodies.place(builder, site, mask, values, kind)

    @property
    def pacing(self) -> str | None:
        """That of the codec hyper."""
        return _HYPER.pacing

    @property
    def calls(self) -> int:
        """One for what is kept, one for where it is."""
        return 2

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding both bodies takes."""
        from onnxcomp.passes.codecs.sparse import bodies

        values = _HYPER.load_memory(*self._stored(site, params), kind)
        whole = bodies.load_memory(site)
        working = max(values.working, whole.working)
        return LoadMemory(values.kept + values.result + whole.kept, working, whole.result)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Those of hyper and sparse; none before opset 11, which has CumSum."""
        from onnxcomp.passes.codecs.sparse import bodies

        own = bodies.functions(opset)
        return (*_HYPER.functions(opset), *own) if own else ()


def _values_of(site: WeightSite, part: Payload) -> WeightSite:
    """What is kept as a weight of its own, from what is stored of it."""
    extent = part.attributes["extent"]
    assert not isinstance(extent, (int, float, str))
    rows, length = (int(size) for size in extent)
    return _values_site(site, rows * length, length)
