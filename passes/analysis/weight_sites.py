"""Find the weights of a model: one site per tensor with all its uses, and a reason for each rest.

Visits the main graph and all subgraphs. Tensors in function bodies are only listed: those that can
be moved out have been inlined by canonicalisation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.def_use import (
    Leaf,
    filters_input,
    leaves,
    qualified_type,
    view_of,
)
from onnxcomp.passes.analysis.stacks import Orientation
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.manifest import compressed_tensors
from onnxcomp.passes.ir.tensors import (
    WEIGHT_TYPES,
    SparseTensor,
    all_finite,
    dtype_name,
    is_float,
    is_matrix,
    shape_of,
)
from onnxcomp.passes.ir.threads import in_threads
from onnxcomp.passes.ir.traversal import LISTING_IR, Scope, default_opset, find_initializer, scopes
from onnxcomp.passes.weight import DOMAIN, Array, Use, WeightSite, release_pages

__all__ = [
    "COMPRESSED_PART",
    "MIN_SIZE",
    "Sites",
    "SkippedWeight",
    "find_sites",
    "read_weight",
    "small_bytes",
    "stored_matrix",
]

MIN_SIZE = 16384

# Why a tensor stays as it is that is not dense any more.
COMPRESSED_PART = "part of a weight already compressed by onnxcomp"
_TRAINED_PART = f"{COMPRESSED_PART}: trained to share, exact"
_LEAST_OPSET = 7

# Weights that are named of those in a memory.
_TOLD = 3

# The largest value that codes of a float64 weight can stand for.
_LARGEST = float(np.finfo(np.float32).max)

# Elements tested for NaN and infinity at a time.
_SCAN = 1 << 18

# Operators that read quantised weights, with their scales and zero points.
_QUANTISED = re.compile(r"Dequantize|^QLinear|Integer$|NBits|BlockQuantized|MatMulBnb4|QMoE|QGemm")


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedWeight:
    """A tensor that no codec is asked about.

    Attributes:
        name: Name of the initializer or constant.
        shape: Its shape.
        dtype: Its element type: "float32", "int64", ...
        bytes: Its bytes.
        uses: Operators that read it.
        reason: Why it is left alone, in words for people.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    uses: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """One line of a plan file."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Sites:
    """The weights of a model.

    Attributes:
        sites: What can be compressed, in graph order.
        skipped: Every other tensor that is floating-point or not small, with the reason.
    """

    sites: tuple[WeightSite, ...]
    skipped: tuple[SkippedWeight, ...]


class _Patterns:
    """Regular expressions that name tensors, or nodes that use them."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = []
        for pattern in patterns:
            try:
                self._patterns.append(re.compile(pattern))
            except re.error as error:
                raise UsageError(f"{pattern!r} is not a regular expression: {error}") from error

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def match(self, names: Sequence[str]) -> str | None:
        """The first pattern found in one of the names."""
        found = (p.pattern for p in self._patterns for name in names if p.search(name))
        return next(found, None)


@dataclasses.dataclass(frozen=True, slots=True)
class _SiteFinder:
    """What every tensor is measured against."""

    model: ir.Model
    min_size: int
    include: _Patterns
    exclude: _Patterns
    freeze_inputs: bool
    compressed: frozenset[str]
    refusal: str | None

    def reason(self, scope: Scope, value: ir.Value, found: Sequence[Leaf]) -> str | None:
        """Why a tensor is not a site, whatever it holds; None when it may be one."""
        tensor = value.const_value
        assert tensor is not None
        return (
            self._foreign(value, tensor, found)
            or self._bound(scope, value, found)
            or self._shape(tensor)
            or self._named(value, found)
            or self.refusal
        )

    def _foreign(
        self, value: ir.Value, tensor: ir.TensorProtocol, found: Sequence[Leaf]
    ) -> str | None:
        """Tensors that are not plain weights."""
        quantised = [leaf for leaf in found if _QUANTISED.search(leaf.node.op_type)]
        if value.name in self.compressed or any(leaf.node.domain == DOMAIN for leaf in found):
            return _TRAINED_PART if metadata.TRAINED in value.meta else COMPRESSED_PART
        if metadata.TRAINED in value.meta:
            return f"memory of {', '.join(value.meta[metadata.TRAINED][:_TOLD])}, left as it is"
        if isinstance(tensor, SparseTensor):
            return "sparse initializer"
        if quantised:
            return f"quantised already ({quantised[0].node.op_type})"
        if tensor.dtype == ir.DataType.STRING:
            return "strings"
        if tensor.dtype not in (*WEIGHT_TYPES, ir.DataType.DOUBLE):
            kind = "type" if is_float(tensor.dtype) else "integers"
            return f"{kind} {dtype_name(tensor.dtype)}, which no codec stores"
        return None

    def _bound(self, scope: Scope, value: ir.Value, found: Sequence[Leaf]) -> str | None:
        """Tensors that belong to the interface of the model, or to nothing."""
        listed = value.is_graph_input()
        if listed and scope.parent is not None:
            return "input of a subgraph"
        if listed and self.model.ir_version >= LISTING_IR and not self.freeze_inputs:
            return "overridable graph input (--freeze-inputs makes it a constant)"
        if value.is_graph_output():
            return "graph output"
        return None if found else "not used by any node"

    def _shape(self, tensor: ir.TensorProtocol) -> str | None:
        if 0 in shape_of(tensor):
            return "empty: a dimension is 0"
        if not is_matrix(tensor):
            return "vector or scalar: at most one dimension is greater than 1"
        if tensor.nbytes < self.min_size:
            return f"smaller than the minimum size ({self.min_size:,} bytes)"
        return None

    def _named(self, value: ir.Value, found: Sequence[Leaf]) -> str | None:
        names = [value.name or "", *(leaf.node.name or "" for leaf in found)]
        if self.include and self.include.match(names) is None:
            return "matches no --include pattern"
        pattern = self.exclude.match(names)
        return None if pattern is None else f"excluded by {pattern!r}"


def find_sites(
    model: ir.Model,
    *,
    min_size: int = MIN_SIZE,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    freeze_inputs: bool = False,
    threads: int = 1,
) -> Sites:
    """Find every weight that can be compressed, and say of every other tensor why not.

    Reads each weight once, to refuse those with NaN or infinities.

    Args:
        model: A canonical model (see `canonicalize`); not changed.
        min_size: Bytes below which a tensor is left alone.
        include: Regular expressions; when given, only tensors whose name or one of whose nodes'
            names matches are sites.
        exclude: Regular expressions of tensors and nodes to leave alone.
        freeze_inputs: Treat initializers that are also graph inputs as constants.
        threads: How many weights are read at once.

    Raises:
        UsageError: A pattern is not a regular expression.
        ModelError: Names are not unique; canonicalise the model first.
    """
    finder = _SiteFinder(
        model,
        min_size,
        _Patterns(include),
        _Patterns(exclude),
        freeze_inputs,
        compressed_tensors(model),
        _refusal(model),
    )
    examined = _examined(finder, threads)
    sites: list[WeightSite] = []
    skipped: list[SkippedWeight] = []
    for scope, value, tensor, found, reason in examined:
        if reason is None:
            sites.append(_site(model, scope, value, tensor, found))
        elif is_float(tensor.dtype) or tensor.nbytes >= min_size:
            ops = (qualified_type(leaf.node) for leaf in found)
            skipped.append(_skip(value.name or "", tensor, ops, reason))
    skipped += _constants(model, min_size)
    return Sites(tuple(sites), tuple(skipped))


def small_bytes(model: ir.Model, least: int) -> int:
    """Bytes of matrices of the main graph below `MIN_SIZE` that have `least` bytes or more."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(
        tensor.nbytes
        for tensor in tensors
        if tensor is not None
        and least <= tensor.nbytes < MIN_SIZE
        and tensor.dtype in WEIGHT_TYPES
        and is_matrix(tensor)
    )


# A tensor with its graph, what reads it, and why it is no weight to compress, if so.
_Examined = tuple[Scope, ir.Value, ir.TensorProtocol, Sequence[Leaf], str | None]


def _examined(finder: _SiteFinder, threads: int) -> list[_Examined]:
    """All tensors in the order of the model; of those that may be weights every value is read."""
    order = _node_order(finder.model)
    known: list[_Examined] = []
    for scope in scopes(finder.model):
        for value in scope.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                found = sorted(leaves(value, view_of(tensor)), key=lambda leaf: order[leaf.node])
                known.append((scope, value, tensor, found, finder.reason(scope, value, found)))
    tensors = [one[2] for one in known if one[4] is None]
    read = in_threads(_not_finite, tensors, threads, total=len(tensors))
    return [one if one[4] is not None else (*one[:4], next(read)) for one in known]


def _refusal(model: ir.Model) -> str | None:
    """Why no tensor of the model can be compressed."""
    opset = default_opset(model)
    if opset is None:
        return "the model imports no standard operator set"
    if opset < _LEAST_OPSET:
        return f"the model's operator set {opset} is older than {_LEAST_OPSET}"
    return None


def _node_order(model: ir.Model) -> dict[ir.Node, int]:
    order: dict[ir.Node, int] = {}
    names: set[str] = set()
    for scope in scopes(model):
        for node in scope.graph:
            order[node] = len(order)
            if not node.name or node.name in names:
                raise ModelError(
                    f"node {node.name or node.op_type!r} has no name of its own",
                    hint="run canonicalize(model) first",
                )
            names.add(node.name)
    return order


def _not_finite(tensor: ir.TensorProtocol) -> str | None:
    flat = np.asarray(tensor.numpy()).reshape(-1)
    for start in range(0, flat.size, _SCAN):
        part = flat[start : start + _SCAN]
        finite = all_finite(part)
        release_pages(flat)
        if not finite:
            return "contains NaN or infinite values"
        if part.dtype == np.float64 and np.abs(part).max(initial=0.0) > _LARGEST:
            return "contains values that only float64 holds"
    return None


def _orientation(found: Sequence[Leaf], tensor: ir.TensorProtocol) -> Orientation:
    """The orientation that most products need, else most look-ups, else the operator's own."""
    for needs in (("matmul",), ("experts", "batch"), ("gather",)):
        wanted = Counter(leaf.orientation for leaf in found if leaf.need in needs)
        if wanted:
            best = wanted.most_common(1)[0][0]
            assert best is not None
            return best
    shape = shape_of(tensor)
    # A convolution sums over all but the first axis; elsewhere the last one is the inner one.
    split = 1 if any("Conv" in leaf.node.op_type for leaf in found) else len(shape) - 1
    return Orientation(math.prod(shape[:split]), math.prod(shape[split:]), False)


def _site(
    model: ir.Model,
    scope: Scope,
    value: ir.Value,
    tensor: ir.TensorProtocol,
    found: Sequence[Leaf],
) -> WeightSite:
    chosen = _orientation(found, tensor)
    wide = tensor.dtype == ir.DataType.DOUBLE
    uses = tuple(
        Use(
            node=leaf.node.name or "",
            op_type=qualified_type(leaf.node),
            input_index=leaf.index,
            need=leaf.need if leaf.orientation == chosen and not wide else "dense",
            path=tuple(node.name or "" for node in leaf.path),
        )
        for leaf in found
    )
    return WeightSite(
        name=value.name or "",
        shape=shape_of(tensor),
        dtype="float32" if wide else dtype_name(tensor.dtype),
        uses=uses,
        scope=scope.path,
        rows=chosen.rows,
        length=chosen.length,
        transposed=chosen.transposed,
        filters_input=any(filters_input(leaf.node, model) for leaf in found),
        rank=value.meta.get(metadata.RANK),
        wide=wide,
        experts=chosen.experts,
    )


def _skip(name: str, tensor: ir.TensorProtocol, ops: Iterator[str], reason: str) -> SkippedWeight:
    shape, dtype = shape_of(tensor), dtype_name(tensor.dtype)
    size = 0 if tensor.dtype == ir.DataType.STRING else tensor.nbytes
    return SkippedWeight(name, shape, dtype, size, tuple(dict.fromkeys(ops)), reason)


def _constants(model: ir.Model, min_size: int) -> Iterator[SkippedWeight]:
    """Tensors in Constant nodes: what canonicalisation does not lift, and function bodies."""
    for scope in scopes(model):
        for node, tensor in _constant_nodes(scope.graph):
            reason = "Constant node, not an initializer" if is_matrix(tensor) else "small constant"
            yield from _listed(node, tensor, "", reason, min_size)
    for function in model.functions.values():
        prefix = f"{function.domain}::{function.name}/"
        reason = f"in the body of function {function.domain}::{function.name}"
        reason += ", which cannot be inlined"
        for node, tensor in _constant_nodes(function.all_nodes()):
            yield from _listed(node, tensor, prefix, reason, min_size)


def _constant_nodes(nodes: Iterable[ir.Node]) -> Iterator[tuple[ir.Node, ir.TensorProtocol]]:
    for node in nodes:
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
            yield node, attribute.as_tensor()


def _listed(
    node: ir.Node, tensor: ir.TensorProtocol, prefix: str, reason: str, min_size: int
) -> Iterator[SkippedWeight]:
    large = tensor.dtype != ir.DataType.STRING and tensor.nbytes >= min_size
    if is_float(tensor.dtype) or large:
        output = node.outputs[0]
        ops = (qualified_type(consumer) for consumer, _ in output.uses())
        yield _skip(f"{prefix}{output.name}", tensor, ops, reason)


def read_weight(model: ir.Model, site: WeightSite) -> Array:
    """The weight as canonical matrix ``(rows, length)`` in float32.

    A float32 weight that is not transposed is returned as a read-only view of its file where its
    place in the file permits it; nothing else of the model is read.

    Raises:
        ModelError: The model has no such initializer.
    """
    return stored_matrix(model, site).astype(np.float32, copy=False)


def stored_matrix(model: ir.Model, site: WeightSite) -> Array:
    """The same in its own type: a view of its file.

    Raises:
        ModelError: The model has no such initializer.
    """
    value = find_initializer(model, site.name)
    if value is None or value.const_value is None:
        raise ModelError(f"the model has no initializer {site.name!r}")
    return site.matrix(np.asarray(value.const_value.numpy()))
