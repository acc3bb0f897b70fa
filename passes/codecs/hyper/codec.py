"""The hyperfunction codec: one cyclic bit string and one scale per group of a weight's row.

Format: ops/hyper/spec.md. A row's weights are the orbit of a shift map under the string, read on a
winding through the normal distribution; the encoder is a tail-biting Viterbi search.
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
from onnxcomp.passes.codecs.anchoring import objective
from onnxcomp.passes.codecs.hyper import (
    feedback as hyper_feedback,
)
from onnxcomp.passes.codecs.hyper import (
    format as hyper_format,
)
from onnxcomp.passes.codecs.hyper import (
    native,
)
from onnxcomp.passes.codecs.hyper.feedback import Coder
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.structured import (
    KINDS,
    TARGETS,
    code,
    kind_of,
    state_bits_of,
)
from onnxcomp.passes.codecs.hyper.tables import GROUP_GAIN, WINDINGS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    EmitExperts,
    LoadMemory,
    Payload,
    Qualities,
    RowParts,
    Scaling,
    SpecialBodies,
    TensorLayout,
)
from onnxcomp.passes.weight import Array, Attribute, Kind, Stats, WeightSite

__all__ = ["HyperCodec", "HyperParams"]

V = TypeVar("V")


@dataclasses.dataclass(frozen=True, slots=True)
class HyperParams(Params):
    """Settings of the hyperfunction codec.

    Attributes:
        bits: Bits per weight, 1..6.
        state_bits: Bits of a state: 6, 7, 8, 10 or 12, at least ``bits + 2``. Seven decode fastest;
            more are more accurate and slower to encode.
        group: Largest group of weights with one scale: 32, 64, 128 or 256. A smaller one is taken
            where padding would make it cheaper.
        table: Kind of table: ``winding``, or ``structured``, which CPUs without AVX-512 run two to
            three times as fast, for 3 % more error power at 4 bits and less at 3. It comes
            with its own states; where there is none (1, 5 and 6 bits), a winding serves.
    """

    bits: int = 4
    state_bits: int = 7
    group: int = 128
    table: str = "winding"

    @property
    def states(self) -> int:
        """Bits of a state of the table that there is."""
        return state_bits_of(self.bits, self.state_bits, self.table)

    def to_json(self) -> dict[str, Any]:
        """Parameters by name; without `table` where it is a winding, as in older files."""
        found = dataclasses.asdict(self)
        if self.table == "winding":
            del found["table"]
        return found


_QUALITIES = {
    "fast": "state_bits=6: least time to encode, and on CPUs without AVX-512 to run",
    "balanced": "state_bits=7, the default",
    "best": "state_bits=12: 8 to 16 % less error power up to 4 bits; slow to encode",
}

# What a planner may choose from; seven state bits suffice up to five bits per weight. Groups other
# than 128 are the small change with which a plan meets a size.
_OFFERED = tuple(
    HyperParams(bits, 8 if bits == 6 else 7, group)
    for bits in (6, 5, 4, 3, 2, 1)
    for group in (128, 32, 64, 256)
)


# Columns of rows that are calibrated together, at most: times are cubic in them.
_WIDEST = 1 << 12


def _geometry(site: WeightSite, params: HyperParams) -> GroupLayout:
    """The smallest view of the weight."""
    return _smallest(site.rows, site.length, site.fusable, params)


@functools.lru_cache(maxsize=1 << 12)
def _smallest(rows: int, length: int, fusable: bool, params: HyperParams) -> GroupLayout:
    """The smallest way to cut a weight into groups; of equally small ones the largest groups.

    A weight that is only ever used dense may also be read flat, as rows of one group each: short
    rows, such as those of depthwise convolutions, then need no padding. Models have many weights
    of few shapes, and planning asks for each setting of each several times.
    """
    size = rows * length
    groups = [g for g in sorted(hyper_format.GROUPS, reverse=True) if g <= params.group]
    extents = [(g, rows, length) for g in groups]
    if not fusable:
        extents += [(g, size // g, g) for g in groups if size % g == 0]
    views = [GroupLayout(params.bits, params.states, *extent) for extent in extents]
    return min(views, key=lambda view: view.nbytes)


def _together(site: WeightSite, geometry: GroupLayout) -> int:
    """How many rows of a weight, one after the other, are whole groups of its stored form."""
    if (geometry.rows, geometry.length) == (site.rows, site.length):
        return 1
    return geometry.length // math.gcd(geometry.length, site.length)


def _stored_geometry(payload: Payload, table: Array) -> GroupLayout:
    """The geometry of a payload, from its tensors and attributes, which may come from a file.

    Raises:
        ValueError: They contradict each other.
    """
    group, extent = payload.attributes.get("group"), payload.attributes.get("extent")
    codes = payload.tensors["codes"]
    if (
        not isinstance(group, int)
        or group not in hyper_format.GROUPS
        or codes.ndim != 5
        or not len(table)
    ):
        raise ValueError(f"codes {codes.shape}, table {table.shape} and group {group} do not fit")
    if not isinstance(extent, Sequence) or isinstance(extent, str) or len(extent) != 2:
        raise ValueError(f"extent {extent} is not a pair")
    rows, length = (int(size) for size in extent)
    bits = codes.shape[2] * 32 // group
    return GroupLayout(bits, len(table).bit_length() - 1, group, rows, length)


def _coder(geometry: GroupLayout, params: Params, threads: int) -> Coder:
    kind = HyperParams.of(params).table
    return Coder(geometry.bits, geometry.state_bits, geometry.group, threads, kind)


def _table_of(payload: Payload) -> Array:
    for key, array in payload.shared.items():
        if key.startswith("hyper.table.") and array.ndim == 1:
            return array
    raise ValueError("the table is missing")


def _group_of(site: WeightSite, payload: Payload) -> int:
    """Columns of a group."""
    return _stored_geometry(payload, _table_of(payload)).group


def _scales_of(site: WeightSite, payload: Payload) -> Array:
    """Scales ``(rows, groups)``, float32."""
    panels = payload.tensors["scales"][..., 0].transpose(0, 2, 1)
    return panels.reshape(-1, panels.shape[-1])[: site.rows].astype(np.float32)


def _row_unit(site: WeightSite, payload: Payload) -> int:
    """Rows of the weight that are whole panels of the stored form."""
    stored = _stored_geometry(payload, _table_of(payload))
    return math.lcm(hyper_format.LANES * stored.length, site.length) // site.length


def _row_part(site: WeightSite, payload: Payload, start: int, stop: int) -> tuple[Payload, slice]:
    """The panels that hold some rows, and their payload."""
    stored = _stored_geometry(payload, _table_of(payload))
    first, last = (row * site.length // stored.length for row in (start, stop))
    panels = slice(first // hyper_format.LANES, -(-last // hyper_format.LANES))
    part = dataclasses.replace(stored, rows=last - first)
    key, extent = hyper_format.shared_extent(part)
    shared = {k: v for k, v in payload.shared.items() if not k.startswith("hyper.extent.")}
    tensors = {name: tensor[panels] for name, tensor in payload.tensors.items()}
    attributes = {**payload.attributes, "extent": (part.rows, part.length)}
    return Payload(tensors, {**shared, key: extent}, attributes), panels


def _rescaled(site: WeightSite, payload: Payload, scales: Array) -> Payload:
    """The payload with scales ``(rows, groups)``, rounded to float16."""
    stored = payload.tensors["scales"]
    panels, groups, lanes, _ = stored.shape
    padded = np.zeros((panels * lanes, groups), np.float16)
    padded[: site.rows] = np.minimum(scales, float(np.finfo(np.float16).max))
    turned = padded.reshape(panels, lanes, groups).transpose(0, 2, 1)[..., None]
    tensors = {**payload.tensors, "scales": np.ascontiguousarray(turned)}
    return dataclasses.replace(payload, tensors=tensors)


class HyperCodec(Codec):
    """HyperMatMul, HyperGather, HyperDecode and HyperWeight of ops/hyper/spec.md."""

    name: ClassVar[str] = "hyper"
    summary: ClassVar[str] = (
        "hyperfunction: 1 to 6 bits per weight, trellis-coded, by values or for given inputs"
    )
    params_type: ClassVar[type[Params]] = HyperParams
    automatic: ClassVar[bool] = True
    width: ClassVar[str | None] = "bits"
    encodes_stored: ClassVar[bool] = True

    @property
    def calibration(self) -> CalibratedEncoding:
        """For inputs with known moments, towards the outputs of the dense model."""
        return CalibratedEncoding(
            self.encode_calibrated, self.calibrates, anchored=True, streams=True
        )

    @property
    def scaling(self) -> Scaling:
        """The scales of groups."""
        return Scaling(self._in_rows, _group_of, _scales_of, _rescaled)

    @property
    def qualities(self) -> Qualities:
        """Numbers of states."""
        return Qualities(_QUALITIES, self.graded)

    def refuse(self, site: WeightSite) -> str | None:
        """Why no setting of this codec suits the site; None when one does."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        least = min(self.size(site, params) for params in _OFFERED)
        if least >= site.nbytes:
            shape = f"{site.rows} x {site.length}"
            return f"{shape} needs {least} bytes padded to whole groups, {site.nbytes} dense"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        hyper = HyperParams.of(params)
        if not 1 <= hyper.bits <= 6:
            raise UsageError(f"hyper: bits={hyper.bits}", hint="bits are 1 to 6 per weight")
        if hyper.state_bits not in hyper_format.STATE_BITS:
            sizes = ", ".join(map(str, hyper_format.STATE_BITS))
            raise UsageError(
                f"hyper: state_bits={hyper.state_bits}", hint=f"state_bits are one of {sizes}"
            )
        if (hyper.bits, hyper.state_bits) not in WINDINGS:
            raise UsageError(
                f"hyper: state_bits={hyper.state_bits} are too few for bits={hyper.bits}",
                hint=f"bits={hyper.bits} need state_bits of {hyper.bits + 2} or more",
            )
        if hyper.table not in KINDS:
            raise UsageError(
                f"hyper: table={hyper.table}", hint=f"tables are {' and '.join(KINDS)}"
            )
        if hyper.group not in hyper_format.GROUPS:
            sizes = ", ".join(map(str, hyper_format.GROUPS))
            raise UsageError(f"hyper: group={hyper.group}", hint=f"groups are one of {sizes}")

    def graded(self, params: Params, quality: str) -> HyperParams:
        """The settings with the states of that quality, where they exist for so many bits."""
        hyper = HyperParams.of(params)
        state_bits = {"fast": 6, "best": 12}.get(quality, hyper.state_bits)
        known = (hyper.bits, state_bits) in WINDINGS
        return dataclasses.replace(hyper, state_bits=state_bits) if known else hyper

    def targeted(self, params: Params, target: str) -> HyperParams:
        """The settings with the kind of table that suits a class of machines.

        Args:
            params: Settings of this codec; other numbers of states than the usual ones stay.
            target: A key of `TARGETS`: ``any``, ``avx2``, ``avx512``, ``neon`` or ``cuda``.

        Raises:
            UsageError: There is no such class.
        """
        if target not in TARGETS:
            raise UsageError(f"hyper: target {target!r}", hint=f"targets are {', '.join(TARGETS)}")
        hyper = HyperParams.of(params)
        if hyper.state_bits != (8 if hyper.bits == 6 else 7):
            return hyper
        return dataclasses.replace(hyper, table=kind_of(hyper.bits, TARGETS[target]))

    def kind(self, params: Params) -> str:
        """Kind of the table that there is."""
        hyper = HyperParams.of(params)
        return kind_of(hyper.bits, hyper.table)

    def cost_key(self, params: Params) -> str | None:
        """Codec, bits and kind of table."""
        kind = self.kind(params)
        return f"{super().cost_key(params)}" + ("" if kind == "winding" else f" {kind}")

    def candidates(self, site: WeightSite) -> Sequence[HyperParams]:
        """Settings smaller than the dense tensor, from most to fewest bytes."""
        found = {
            dataclasses.replace(params, group=_geometry(site, params).group): None
            for params in _OFFERED
        }
        smaller = [params for params in found if self.size(site, params) < site.nbytes]
        return sorted(smaller, key=lambda params: -self.size(site, params))

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Codes and scales of spec.md section 1."""
        geometry = _geometry(site, HyperParams.of(params))
        return {
            "codes": TensorLayout(geometry.codes_shape, np.dtype(np.uint8)),
            "scales": TensorLayout(geometry.scales_shape, np.dtype(np.float16)),
        }

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """Table and constants of the portable body, spec.md section 4."""
        hyper = HyperParams.of(params)
        g = _geometry(site, hyper)
        return hyper_format.shared_tensors(
            g.bits, g.state_bits, g.group, g.rows, g.length, hyper.table
        )

    def attributes(self, site: WeightSite, params: Params) -> Mapping[str, Attribute]:
        """The group and the extent that is stored, which is another than the site's when flat."""
        geometry = _geometry(site, HyperParams.of(params))
        return {"group": geometry.group, "extent": (geometry.rows, geometry.length)}

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of codes and scales, exactly."""
        return _geometry(site, HyperParams.of(params)).nbytes

    def predict(self, site: WeightSite, params: Params) -> float:
        """Relative error measured on normal data; the rotation makes all weights alike."""
        hyper = HyperParams.of(params)
        geometry = _geometry(site, hyper)
        decibels = code(hyper.bits, hyper.state_bits, hyper.table).sqnr
        decibels += GROUP_GAIN[geometry.bits, geometry.group]
        # Noise is even within a group; what falls on the padding is cut off.
        last = geometry.length % geometry.group
        kept = 1.0 - last * (1.0 - last / geometry.group) / geometry.length
        return math.sqrt(kept) * math.pow(10.0, -decibels / 20.0)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Encode ``(rows, length)``; equal bytes with and without native code.

        Raises:
            ModelError: Values too large for float16 scales, or not finite.
        """
        geometry = _geometry(site, HyperParams.of(params))
        weight = weight.reshape(geometry.rows, geometry.length)
        codes, scales = _coder(geometry, params, threads).encode_stored(weight)
        return self._payload(site, params, codes, scales)

    def _in_rows(self, site: WeightSite, params: Params) -> bool:
        """Whether rows of the weight are rows of the stored form: not so where it is read flat."""
        geometry = _geometry(site, HyperParams.of(params))
        return (geometry.rows, geometry.length) == (site.rows, site.length)

    def calibrates(self, site: WeightSite, params: Params) -> bool:
        """Whether a row is whole groups, or a few rows together are, of not too many columns."""
        together = _together(site, _geometry(site, HyperParams.of(params)))
        return together == 1 or together * site.length <= _WIDEST

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """Encode for inputs with the second moments of `stats`, with feedback between groups.

        With moments beside those of the dense model, errors of earlier weights are made up for.
        Rows that are looked up as well count a little for themselves, too.

        Raises:
            ModelError: Values too large for float16 scales.
        """
        geometry = _geometry(site, HyperParams.of(params))
        target, moments = objective(weight, stats, np.float32, in_place=stats.last)
        together = _together(site, geometry)
        if together > 1:  # each of these rows has errors of its own, of the same inputs
            target = target.reshape(site.rows // together, -1)
            moments = np.kron(np.eye(together, dtype=moments.dtype), moments)
        codes, scales = hyper_feedback.encode(target, _coder(geometry, params, threads), moments)
        if not self._in_rows(site, params):
            codes, scales = (hyper_format.flat(part, len(target)) for part in (codes, scales))
        return self._payload(site, params, codes, scales)

    def _payload(self, site: WeightSite, params: Params, codes: Array, scales: Array) -> Payload:
        shared, attributes = self.shared(site, params), self.attributes(site, params)
        return Payload({"codes": codes, "scales": scales}, shared, attributes)

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32; equal values with and without native code."""
        values = _table_of(payload)
        geometry = _stored_geometry(payload, values)
        codes, scales = payload.tensors["codes"], payload.tensors["scales"]
        if native.available():
            weight = native.hyper_decode(codes, scales, values, geometry)
        else:
            extent = (geometry.rows, geometry.length)
            weight = hyper_format.decode(codes, scales, values, extent, geometry.group)
        return weight.reshape(site.rows, site.length)

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products and look-ups where the site has such uses; the dense weight always.

        Matrices of a stack are told apart where each is whole panels.
        """
        whole = site.rows // site.experts % hyper_format.LANES == 0
        return site.kinds | site.stack_kinds if whole else site.kinds

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> Hyper...(codes, scales, ...), then Reshape where the weight is stored flat."""
        from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies

        geometry = _stored_geometry(payload, _table_of(payload))
        stored = dataclasses.replace(site, rows=geometry.rows, length=geometry.length)
        result = hyper_bodies.emit(builder, stored, payload, kind, x)
        if (stored.rows, stored.length) == (site.rows, site.length):
            return result
        extent = np.array([site.rows, site.length], np.int64)
        shape = builder.constant(f"hyper.shape.{site.rows}x{site.length}", extent)
        return builder.node("Reshape", [result, shape])

    @property
    def experts(self) -> EmitExperts:
        """HyperExperts."""
        from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies

        return hyper_bodies.emit_experts

    @property
    def row_parts(self) -> RowParts:
        """Whole panels."""
        return RowParts(_row_unit, _row_part)

    @property
    def pacing(self) -> str | None:
        """The target of the Reshape that codes go through."""
        return "hyper.blocks."

    @property
    def special(self) -> SpecialBodies:
        """For weights of four bits, together too, and for products that are most of a model."""
        from onnxcomp.passes.codecs.hyper import special_bodies

        joining = special_bodies.HyperJoining()
        return SpecialBodies(_weight_body, _product_body, _rows_body, joining)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies

        return hyper_bodies.load_memory(site, _geometry(site, HyperParams.of(params)), kind)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset."""
        from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies

        return hyper_bodies.functions(opset)


def _weight_body(opset: int, site: WeightSite, params: Params) -> onnx.FunctionProto | None:
    from onnxcomp.passes.codecs.hyper import special_bodies

    return special_bodies.weight(opset, _geometry(site, HyperParams.of(params)))


def _rows_body(opset: int, site: WeightSite, params: Params) -> onnx.FunctionProto | None:
    from onnxcomp.passes.codecs.hyper import special_bodies

    return special_bodies.rows(opset, _geometry(site, HyperParams.of(params)))


def _product_body(
    opset: int, payloads: Sequence[Payload], passes: int, types: frozenset[str]
) -> onnx.FunctionProto | None:
    from onnxcomp.passes.codecs.hyper import special_bodies

    layouts = [_stored_geometry(payload, _table_of(payload)) for payload in payloads]
    return special_bodies.product(opset, layouts, passes, types)
