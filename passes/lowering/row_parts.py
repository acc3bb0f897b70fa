"""Expand a large weight in parts, so that each takes little memory while a session is created.

``HyperWeight(codes, ...) -> W`` becomes ``Concat(HyperWeight(codes[a:b], ...), ...) -> W``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs.protocol import Codec, LoadMemory, Payload
from onnxcomp.passes.ir.manifest import WEIGHT_KEY
from onnxcomp.passes.ir.tensors import ELEMENT_TYPES
from onnxcomp.passes.lowering.builder import GraphBuilder
from onnxcomp.passes.weight import Array, Attribute, Kind, WeightSite

__all__ = [
    "Part",
    "divided",
    "joined",
    "largest_part",
    "parts_of",
    "row_bounds",
    "some_rows",
    "stored_form",
]

# A weight is cut where it has more than this share of all weights, in parts of about that size:
# each takes about eight times its own memory, and so half of what all weights take in the end.
_SHARE = 16

# Smaller parts cost more time than they save memory.
_LEAST = 1 << 20


def largest_part(sites: Sequence[WeightSite]) -> int:
    """Bytes, in float32, of parts for a model with these weights."""
    return max(_LEAST, sum(4 * site.size for site in sites) // _SHARE)


class _PartBuilder:
    """The `Builder` of a part: own tensors are those entries of the weight's that it needs."""

    def __init__(self, whole: GraphBuilder, payload: Payload, entries: slice) -> None:
        self._whole = whole
        self._payload = payload
        self._entries = entries

    @property
    def opset(self) -> int:
        """Version of the default domain in the model."""
        return self._whole.opset

    def tensor(self, key: str) -> ir.Value:
        """As in the codec protocol."""
        if key not in self._payload.tensors:
            return self._whole.constant(key, self._payload.shared[key])
        bounds = {"starts": self._entries.start, "ends": self._entries.stop, "axes": 0}
        value = self._whole.tensor(key)
        if self.opset < 10:
            return self.node("Slice", [value], {name: (end,) for name, end in bounds.items()})
        ends = [
            self._whole.constant(f"ints.{end}", np.array([end], np.int64))
            for end in bounds.values()
        ]
        return self.node("Slice", [value, *ends])

    def constant(self, key: str, array: Array) -> ir.Value:
        """As in the codec protocol."""
        return self._whole.constant(key, array)

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """As in the codec protocol."""
        return self._whole.node(op_type, inputs, attributes, domain=domain)

    def outputs(self, op_type: str, inputs: Sequence[ir.Value], count: int) -> Sequence[ir.Value]:
        """As in the codec protocol."""
        return self._whole.outputs(op_type, inputs, count)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a weight.

    Attributes:
        builder: Makes its nodes.
        site: The rows as a weight of their own.
        payload: What is stored of them.
    """

    builder: GraphBuilder | _PartBuilder
    site: WeightSite
    payload: Payload


def parts_of(
    codec: Codec, site: WeightSite, payload: Payload, builder: GraphBuilder, largest: int | None
) -> list[Part]:
    """The parts in which a weight is expanded; one where it is small or cannot be cut.

    Args:
        codec: Its codec.
        site: The weight.
        payload: What is stored.
        builder: Makes nodes.
        largest: Bytes of a part in float32, about; None to cut nothing.
    """
    cut = codec.row_parts
    rows_first = site.shape[:1] == (site.rows,) and not site.transposed
    if largest is None or cut is None or not (rows_first or len(site.shape) == 2):
        return [Part(builder, site, payload)]
    unit = cut.unit(site, payload)
    step = max(1, largest // (4 * site.length * unit)) * unit
    if site.rows < 2 * step:
        return [Part(builder, site, payload)]
    return [
        Part(_PartBuilder(builder, part, entries), some_rows(site, stop - start), part)
        for start, stop in row_bounds(site.rows, step)
        for part, entries in [cut.part(site, payload, start, stop)]
    ]


def divided(
    need: LoadMemory, site: WeightSite, codec: Codec, kind: Kind, largest: int | None
) -> list[LoadMemory]:
    """Memory to expand a weight, for each of its parts."""
    cut = kind == "weight" and largest is not None and codec.row_parts is not None
    count = max(1, 4 * site.size // largest) if cut and largest else 1
    return [need.share(count)] * count


def row_bounds(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """First row of each part of at most `step` rows, and the row behind its last one."""
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def some_rows(site: WeightSite, count: int) -> WeightSite:
    """A weight with so many rows of another one."""
    shape = (site.length, count) if site.transposed else (count, *site.shape[1:])
    return dataclasses.replace(site, shape=shape, rows=count)


def joined(parts: Sequence[ir.Value], site: WeightSite, builder: GraphBuilder) -> ir.Value:
    """The weight in its stored shape from its parts in theirs."""
    if len(parts) == 1:
        return parts[0]
    return builder.node("Concat", parts, {"axis": int(site.transposed)})


def _expanded(codec: Codec, part: Part, kind: Kind) -> ir.Value:
    """A decoded weight, or some rows of it, in the stored shape."""
    site, builder = part.site, part.builder
    value = codec.emit(builder, site, part.payload, kind, None)
    shape: tuple[int, ...] = (site.rows, site.length)
    if site.transposed and site.experts > 1:
        each = (site.experts, site.rows // site.experts, site.length)
        target = builder.constant(f"shape.{'x'.join(map(str, each))}", np.array(each, np.int64))
        value = builder.node("Reshape", [value, target])
        value = builder.node("Transpose", [value], {"perm": [0, 2, 1]})
        shape = site.shape
    elif site.transposed:
        value = builder.node("Transpose", [value], {"perm": [1, 0]})
        shape = shape[::-1]
    if shape != site.shape:
        dims = "x".join(map(str, site.shape))
        target = builder.constant(f"shape.{dims}", np.array(site.shape, np.int64))
        value = builder.node("Reshape", [value, target])
    return value


def stored_form(
    codec: Codec,
    site: WeightSite,
    payload: Payload,
    mode: str,
    builder: GraphBuilder,
    largest: int | None,
) -> ir.Value:
    """The decoded weight in the shape and type of the tensor it replaces.

    Args:
        codec: Its codec.
        site: The weight.
        payload: What is stored.
        mode: "decode" for a weight that is decoded at every run where the codec can do that.
        builder: Makes nodes.
        largest: As for `parts_of`.
    """
    kinds = codec.kinds(site)
    wanted: Kind = "decode" if mode == "decode" else "weight"
    kind: Kind = wanted if wanted in kinds else "weight" if "weight" in kinds else "decode"
    parts = parts_of(codec, site, payload, builder, largest if kind == "weight" else None)
    value = joined([_expanded(codec, part, kind) for part in parts], site, builder)
    producer = value.producer()
    if producer is not None:
        value.shape = ir.Shape(site.shape)
        value.type = ir.TensorType(ELEMENT_TYPES[site.dtype])
        producer.metadata_props[WEIGHT_KEY] = site.name
    return builder.node("Cast", [value], {"to": int(ir.DataType.DOUBLE)}) if site.wide else value
