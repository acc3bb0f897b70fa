"""What is in a model, and what differs between two."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.passes.analysis.def_use import qualified_type
from onnxcomp.passes.analysis.weight_sites import MIN_SIZE, SkippedWeight, find_sites
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.manifest import ManifestEntry, Recipe, own_name, read_manifest, shared_name
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.tensors import dtype_name
from onnxcomp.passes.ir.traversal import initializers, scopes
from onnxcomp.passes.report.form import form_of
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import DOMAIN, WeightSite

__all__ = [
    "CompressedWeight",
    "Difference",
    "Inspection",
    "Interface",
    "diff",
    "inspect_model",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """One input or output of a model.

    Attributes:
        name: Its name.
        dtype: Element type; "" where the model does not say or it is not a tensor.
        shape: Sizes and names of dimensions, "?" where unknown; None for an unknown rank.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None


@dataclasses.dataclass(frozen=True, slots=True)
class CompressedWeight:
    """A weight that is stored by a codec.

    Attributes:
        name: Name of the tensor it was.
        shape: Shape of that tensor.
        dtype: Its element type.
        codec: Who stores it.
        params: Settings of the codec.
        mode: The mode that was asked for.
        operators: Operators that read it; "inlined" where a definition stands for one of our own.
        bytes_before: Bytes of the dense tensor.
        bytes_after: Bytes of its own tensors now.
        kind: Kind of its codes, for a codec that has several: "winding" or "structured" for hyper.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    codec: str
    params: Mapping[str, Any]
    mode: str
    operators: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a model.

    Attributes:
        path: Its file.
        bytes: Bytes of the file and its external data.
        ir_version: Version of the IR.
        opsets: Imported operator sets by domain, "" for the standard one.
        producer: Name and version of the tool that wrote it.
        inputs: What a session must be given; initializers that are also inputs are not listed.
        outputs: What it returns.
        operators: How often each operator occurs, subgraphs included.
        functions: Functions the model brings along.
        sites: Weights that can be compressed.
        compressed: Weights that are compressed already.
        shared_bytes: Bytes of tensors that compressed weights have in common.
        skipped: Other tensors, with the reason why they are none of these.
        notes: Remarks, such as tensors stored twice.
    """

    path: str
    bytes: int
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    operators: Mapping[str, int]
    functions: tuple[str, ...]
    sites: tuple[WeightSite, ...]
    compressed: tuple[CompressedWeight, ...]
    shared_bytes: int
    skipped: tuple[SkippedWeight, ...]
    notes: tuple[str, ...]

    @property
    def site_bytes(self) -> int:
        """Bytes of all weights that can be compressed."""
        return sum(site.nbytes for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        plain = dataclasses.asdict(self)
        for site, values in zip(self.sites, plain["sites"], strict=True):
            values["nbytes"] = site.nbytes
        plain["skipped"] = [
            {"nbytes" if key == "bytes" else key: value for key, value in tensor.items()}
            for tensor in plain["skipped"]
        ]
        return {**plain, "site_bytes": self.site_bytes}


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two models.

    Attributes:
        bytes: Bytes of the first and the second.
        interface: Inputs and outputs that are not the same; empty when a session sees no change.
        opsets: Domains whose version differs, with both versions; None where not imported.
        operators: Operators whose number differs, with both numbers.
        weights: Weights stored in another way: before and after, with bytes.
    """

    bytes: tuple[int, int]
    interface: tuple[str, ...]
    opsets: Mapping[str, tuple[int | None, int | None]]
    operators: Mapping[str, tuple[int, int]]
    weights: Mapping[str, tuple[str, str]]

    def to_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return dataclasses.asdict(self)


def inspect_model(path: str | os.PathLike[str], *, min_size: int = MIN_SIZE) -> Inspection:
    """Look into a model file.

    Args:
        path: The .onnx file.
        min_size: Bytes below which a tensor is not counted as compressible.

    Raises:
        ModelError: The file is not a model.
    """
    model = load(path)
    operators, functions = _operators(model), tuple(f"{k[0]}::{k[1]}" for k in model.functions)
    interface = _interfaces(model.graph.inputs), _interfaces(model.graph.outputs)
    compressed = tuple(_compressed(model))
    form = form_of(model)
    notes = (*form.notes, *canonicalize(model).notes)
    found = find_sites(model, min_size=min_size)
    files: frozenset[str] = model.graph.meta.get(metadata.SOURCE, frozenset())
    return Inspection(
        path=str(path),
        bytes=sum(map(os.path.getsize, files | {os.path.realpath(Path(path))})),
        ir_version=model.ir_version,
        opsets=dict(model.graph.opset_imports),
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        inputs=interface[0],
        outputs=interface[1],
        operators=operators,
        functions=functions,
        sites=found.sites,
        compressed=compressed,
        shared_bytes=_shared_bytes(model),
        skipped=found.skipped,
        notes=notes,
    )


def _operators(model: ir.Model) -> dict[str, int]:
    counts = Counter(qualified_type(node) for scope in scopes(model) for node in scope.graph)
    return dict(counts.most_common())


def _interfaces(values: Iterable[ir.Value]) -> tuple[Interface, ...]:
    return tuple(_interface(value) for value in values if not value.is_initializer())


def _interface(value: ir.Value) -> Interface:
    dims = None if value.shape is None else tuple(_dim(dim) for dim in value.shape)
    dtype = "" if value.dtype is None else dtype_name(value.dtype)
    return Interface(value.name or "", dtype, dims)


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else str(dim.value or "?")


def _compressed(model: ir.Model) -> Iterable[CompressedWeight]:
    values = initializers(model)
    for name, record in read_manifest(model).items():
        own = [values[n] for n in _own_names(record) if n in values]
        if not own:
            continue  # undone by another tool, see `form_of`
        recipe, site = record.recipe, record.site
        nodes = [node for value in own for node, _ in value.uses()]
        stock = recipe.codec not in CODECS or CODECS[recipe.codec].stock
        readers = {n.op_type if stock or n.domain == DOMAIN else "inlined": None for n in nodes}
        yield CompressedWeight(
            name,
            site.shape,
            site.dtype,
            recipe.codec,
            recipe.params,
            recipe.mode,
            tuple(readers),
            site.nbytes,
            sum(value.const_value.nbytes for value in own if value.const_value is not None),
            _kind(recipe),
        )


def _kind(recipe: Recipe) -> str:
    """Kind of the codes; empty where the codec has one only, or is not known here."""
    codec = CODECS.get(recipe.codec)
    if codec is None or not recipe.params:
        return ""
    kind = codec.kind(typed_params(codec.params_type, recipe.params, codec.name))
    return "" if kind == codec.name else kind


def _own_names(record: ManifestEntry) -> list[str]:
    return [own_name(record.site.name, key) for key in record.recipe.tensors]


def _shared_bytes(model: ir.Model) -> int:
    prefix = shared_name("")
    return sum(
        value.const_value.nbytes
        for name, value in initializers(model).items()
        if name.startswith(prefix) and value.const_value is not None
    )


def diff(first: Inspection, second: Inspection) -> Difference:
    """Compare two models, say a dense one and what became of it."""
    domains = dict.fromkeys([*first.opsets, *second.opsets])
    opsets = {name: (first.opsets.get(name), second.opsets.get(name)) for name in domains}
    names = dict.fromkeys([*first.operators, *second.operators])
    counts = {name: (first.operators.get(name, 0), second.operators.get(name, 0)) for name in names}
    stored = _stored(first), _stored(second)
    weights = {
        name: (stored[0].get(name, "absent"), stored[1].get(name, "absent"))
        for name in dict.fromkeys([*stored[0], *stored[1]])
    }
    return Difference(
        (first.bytes, second.bytes),
        tuple(_interface_changes(first, second)),
        {name: pair for name, pair in opsets.items() if pair[0] != pair[1]},
        {name: pair for name, pair in counts.items() if pair[0] != pair[1]},
        {name: pair for name, pair in weights.items() if pair[0] != pair[1]},
    )


def _stored(model: Inspection) -> dict[str, str]:
    """How each weight is stored, in words."""
    dense = {site.name: f"{site.dtype}, {site.nbytes:,} bytes" for site in model.sites}
    others = {
        weight.name: f"{weight.codec}, {weight.bytes_after:,} bytes" for weight in model.compressed
    }
    kept = {
        tensor.name: f"{tensor.dtype}, {tensor.bytes:,} bytes"
        for tensor in model.skipped
        if not _is_payload(tensor.name, others)
    }
    return {**kept, **dense, **others}


def _is_payload(name: str, compressed: Mapping[str, str]) -> bool:
    return name.startswith(f"{DOMAIN}::") or name.rpartition("::")[0] in compressed


def _interface_changes(first: Inspection, second: Inspection) -> Iterable[str]:
    for kind in ("inputs", "outputs"):
        before, after = getattr(first, kind), getattr(second, kind)
        if before != after:
            yield f"{kind}: {_words(before)} became {_words(after)}"


def _words(interfaces: Iterable[Interface]) -> str:
    return ", ".join(f"{i.name} {i.dtype} {list(i.shape or ())}" for i in interfaces)
