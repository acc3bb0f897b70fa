"""Fold linear maps that follow one another without a non-linearity in between.

``MatMul(MatMul(x, A), B) -> MatMul(x, AB)``, with biases in Add or Gemm;
``Conv(Conv(x, A), B) -> Conv(x, BA)`` where one of the two windows is 1 x 1. Models trained with
factors (LoRITa) are full of such chains, others have some by accident. A chain is folded where the
product has no more weights than its parts: two thin factors stay what they are, unless their
product is about to be truncated: then a lower rank is chosen for the product. Products are
computed in float64, piece by piece; folded weights stay in memory until the model is written, so
that there is a limit to all of them. Visits the main graph and all subgraphs; function bodies are
not visited.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.manifest import compressed_tensors
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import WEIGHT_TYPES, shape_of
from onnxcomp.passes.ir.traversal import (
    LISTING_IR,
    Names,
    is_default_domain,
    new_initializer,
    remove_dead,
    remove_initializer,
    replace_value,
    scopes,
)

__all__ = ["fold_linear_chains"]

Array = npt.NDArray[Any]

# Rows and columns of a product that are computed at a time.
_PIECE = 256

# Bytes of folded weights that are held in memory; chains beyond are left as they are.
_MOST_HELD = 256 << 20

_LARGEST = {ir.DataType.FLOAT16: 65504.0}


# Whether a weight will be stored with two factors: its names and those of its nodes, the operator
# that uses it, its rows and columns.
Truncated = Callable[[Sequence[str], str, tuple[int, int]], bool]


def _never(names: Sequence[str], operator: str, shape: tuple[int, int]) -> bool:
    """No weight will."""
    del names, operator, shape
    return False


def fold_linear_chains(
    model: ir.Model,
    *,
    min_size: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    freeze_inputs: bool = False,
    truncated: Truncated = _never,
) -> Change:
    """Fold chains in place until none is left that pays.

    Args:
        model: A canonical model.
        min_size: Bytes of a chain's weights below which it is left alone.
        include: Regular expressions; when given, all weights or nodes of a chain must match one.
        exclude: Regular expressions; no weight and no node of a chain may match one.
        freeze_inputs: Whether initializers that are also graph inputs are constants.
        truncated: Whether a weight will get factors of lower rank, or those it has.

    Returns:
        The number of foldings, with a note for each.
    """
    work = _Folder(model, min_size, tuple(include), tuple(exclude), freeze_inputs, truncated)
    notes: list[str] = []
    while True:
        found = work.fold_next()
        if found is None:
            return Change(len(notes), tuple(notes))
        notes.append(found)


@dataclasses.dataclass(frozen=True, slots=True)
class _Link:
    """One linear map ``y = x W + b``, or a convolution.

    Attributes:
        nodes: Its nodes, first to last: the product, and the Add of a bias behind it.
        weight: What the product reads: an initializer, or the transpose of one.
        matrix: ``(k, n)`` as it is stored, not copied; of a convolution ``(out, in, ...)``.
        bias: Float64 ``(n,)``; None without one.
        constants: Initializers it reads.
        factor: What products with the matrix are multiplied by.
    """

    nodes: tuple[ir.Node, ...]
    weight: ir.Value
    matrix: Array
    bias: Array | None
    constants: tuple[ir.Value, ...]
    factor: float = 1.0

    @property
    def product(self) -> ir.Node:
        """The node of the product or convolution."""
        return self.nodes[0]

    @property
    def output(self) -> ir.Value:
        """What the map gives."""
        return self.nodes[-1].outputs[0]


def _only_use(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _is(node: ir.Node | None, *op_types: str) -> bool:
    return node is not None and is_default_domain(node.domain) and node.op_type in op_types


class _Folder:
    """The state of one pass."""

    def __init__(
        self,
        model: ir.Model,
        min_size: int,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        freeze_inputs: bool,
        truncated: Truncated,
    ) -> None:
        self._model = model
        self._truncated = truncated
        self._compressed = compressed_tensors(model)
        self._min_size = min_size
        self._include, self._exclude = include, exclude
        self._listed_are_free = model.ir_version >= LISTING_IR and not freeze_inputs
        self._names = Names(model)
        self._held = 0

    def fold_next(self) -> str | None:
        """Fold one pair of maps; what was done, or None where nothing is left to do."""
        for scope in scopes(self._model):
            for node in scope.graph:
                for first, second in self._pairs(node):
                    # Products are computed last: many pairs do not pay, and all are seen often.
                    if not self._pays(first, second):
                        continue
                    folded = _folded(first, second)
                    if folded is not None and _holds(second, folded[0]):
                        return self._replace(first, second, *folded)
        return None

    def _pairs(self, node: ir.Node) -> Iterator[tuple[_Link, _Link]]:
        """The maps that end in a node's input and start at the node."""
        value = node.inputs[0] if node.inputs else None
        if value is None or not _only_use(value) or self._source(node) is None:
            return
        first = self._ending(value)
        second = self._link(node) if first is not None else None
        if first is not None and second is not None and first.product.graph is node.graph:
            yield first, second

    def _ending(self, value: ir.Value) -> _Link | None:
        """The map that gives a value."""
        node = value.producer()
        if node is None or not _is(node, "Add"):
            return None if node is None else self._link(node)
        if len(node.inputs) < 2:
            return None
        for product, vector in (tuple(node.inputs[:2]), tuple(node.inputs[1::-1])):
            producer = None if product is None else product.producer()
            if product is None or vector is None or producer is None or not _only_use(product):
                continue
            link = self._link(producer) if _is(producer, "MatMul") else None
            bias = None if link is None else self._vector(vector, link.matrix.shape[1], axes=1)
            if link is not None and bias is not None:
                constants = (*link.constants, vector)
                return dataclasses.replace(
                    link, nodes=(*link.nodes, node), bias=bias, constants=constants
                )
        return None

    def _link(self, node: ir.Node) -> _Link | None:
        """The map of one MatMul, Gemm or Conv with a constant weight."""
        source, weight = self._source(node), node.inputs[1] if len(node.inputs) > 1 else None
        if source is None or source.const_value is None or weight is None:
            return None
        matrix, factor = np.asarray(source.const_value.numpy()), 1.0
        matrix = matrix if source is weight else matrix.T
        if node.op_type == "Gemm":
            matrix = matrix.T if node.attributes.get_int("transB", False) else matrix
            factor = node.attributes.get_float("alpha", 1.0)
        given = node.inputs[2] if len(node.inputs) > 2 else None
        if given is None:
            return _Link((node,), weight, matrix, None, (source,), factor)
        bias = self._vector(given, matrix.shape[0 if node.op_type == "Conv" else 1], axes=2)
        if bias is None:
            return None
        bias = bias * node.attributes.get_float("beta", 1.0)
        return _Link((node,), weight, matrix, bias, (source, given), factor)

    def _constant(self, value: ir.Value | None) -> ir.TensorProtocol | None:
        """The tensor of an initializer that nobody can override."""
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or tensor.dtype not in WEIGHT_TYPES:
            return None
        if value.is_graph_output() or (value.is_graph_input() and self._listed_are_free):
            return None
        return tensor

    def _source(self, node: ir.Node) -> ir.Value | None:
        """The initializer that the weight of a product is, or is the transpose of."""
        if not _is(node, "MatMul", "Gemm", "Conv") or len(node.inputs) < 2:
            return None
        value = node.inputs[1]
        producer = None if value is None else value.producer()
        if producer is not None and _is(producer, "Transpose"):
            perm = tuple(producer.attributes.get_ints("perm", (1, 0)))
            value = producer.inputs[0] if perm == (1, 0) and producer.inputs else None
        tensor = self._constant(value)
        axes = 0 if tensor is None else len(shape_of(tensor))
        return value if axes == 2 or (axes > 2 and node.op_type == "Conv") else None

    def _vector(self, value: ir.Value, width: int, *, axes: int) -> Array | None:
        """A bias of one number for each output, or one for all, with at most this many axes."""
        tensor = self._constant(value)
        if tensor is None:
            return None
        shape = shape_of(tensor)
        if len(shape) > axes or any(size != 1 for size in shape[:-1]):
            return None
        if (shape or (1,))[-1] not in (1, width):
            return None
        return np.broadcast_to(tensor.numpy().astype(np.float64).reshape(-1), (width,))

    def _pays(self, first: _Link, second: _Link) -> bool:
        """Whether the product is allowed and has no more weights than what goes for it."""
        extent = _extent(first, second)
        if extent is None or not (self._allowed(first) and self._allowed(second)):
            return False
        weights = [first.constants[0], second.constants[0]]
        tensors = [w.const_value for w in weights if w.const_value is not None]
        if sum(tensor.nbytes for tensor in tensors) < self._min_size:
            return False
        if self._held + math.prod(extent) * tensors[0].dtype.itemsize > _MOST_HELD:
            return False
        same = first.constants[0] is second.constants[0]
        if same or tensors[0].dtype != tensors[1].dtype:
            return False
        return _smaller(first, second, extent) or self._thin(first, second, extent)

    def _thin(self, first: _Link, second: _Link, extent: tuple[int, int]) -> bool:
        """Whether two thin maps, needed by nobody else, will be replaced by thinner ones."""
        tail = second.product
        if not (_goes(first) and _goes(second)) or (tail.op_type == "Conv" and not _behind(tail)):
            return False
        made = [f"{second.constants[0].name}/folded", tail.name or ""]
        if second.bias is not None or first.bias is not None:
            made[1:] = [f"{tail.name}/product"] if tail.op_type == "MatMul" else made[1:]
        known = [_names_of(first), _names_of(second), made]
        if not all(self._selected(names) for names in known):
            return False
        shape = extent if tail.op_type == "Conv" else extent[::-1]
        return all(self._truncated(names, tail.op_type, shape) for names in known)

    def _allowed(self, link: _Link) -> bool:
        """Whether the patterns allow a map to be touched."""
        names = _names_of(link)
        return names[0] not in self._compressed and self._selected(names)

    def _selected(self, names: Sequence[str]) -> bool:
        """Whether the patterns allow something with these names to be touched."""
        included = not self._include or any(
            re.search(pattern, name) for pattern in self._include for name in names
        )
        return included and not any(
            re.search(pattern, name) for pattern in self._exclude for name in names
        )

    def _replace(self, first: _Link, second: _Link, matrix: Array, bias: Array | None) -> str:
        """Put one map in the place of two."""
        head, tail = first.product, second.product
        tensor = second.constants[0].const_value
        assert tensor is not None and tail.graph is not None
        name = f"{second.constants[0].name}/folded"
        weight = self._initializer(name, matrix, tensor.dtype)
        if not _smaller(first, second, (len(matrix), matrix.size // len(matrix))):
            weight.meta[metadata.RANK] = _rank(first, second)
        self._held += weight.const_value.nbytes if weight.const_value is not None else 0
        kind = "Gemm" if "Gemm" in (head.op_type, tail.op_type) else tail.op_type
        inputs: list[ir.Value | None] = [head.inputs[0], weight]
        if bias is not None and kind != "MatMul":
            inputs.append(self._initializer(f"{name}/bias", bias, tensor.dtype))
        made = ir.Node("", kind, inputs, _attributes(kind, head, tail))
        tail.graph.insert_before(tail, made)
        result = made.outputs[0]
        result.name = self._names.value(f"{name}/output")
        if bias is not None and kind == "MatMul":
            made.name = self._names.node(f"{tail.name}/product")
            vector = self._initializer(f"{name}/bias", bias, tensor.dtype)
            made = ir.Node("", "Add", [result, vector])
            tail.graph.insert_before(tail, made)
            result = made.outputs[0]
            result.name = self._names.value(f"{name}/sum")
        replace_value(tail.outputs[0], result)
        tail.graph.remove(tail, safe=True)
        made.name = tail.name
        if metadata.GENERATED_NAME in tail.meta:
            made.meta[metadata.GENERATED_NAME] = tail.meta[metadata.GENERATED_NAME]
        remove_dead(reversed(first.nodes))
        self._clean((first, second))
        return f"{first.constants[0].name} and {second.constants[0].name} became {weight.name}"

    def _initializer(self, name: str, array: Array, dtype: ir.DataType) -> ir.Value:
        stored = np.ascontiguousarray(array).astype(dtype.numpy(), copy=False)
        return new_initializer(self._model, self._names.value(name), ir.Tensor(stored, dtype=dtype))

    def _clean(self, links: Sequence[_Link]) -> None:
        """Remove what nobody reads any more."""
        for link in links:
            producer = link.weight.producer()
            if producer is not None:
                remove_dead([producer])
            for value in link.constants:
                if not value.uses():
                    remove_initializer(value)


def _names_of(link: _Link) -> list[str]:
    """Names that patterns may speak of: the weight's, then those of the nodes."""
    return [link.constants[0].name or "", *(node.name or "" for node in link.nodes)]


def _extent(first: _Link, second: _Link) -> tuple[int, int] | None:
    """Rows and columns of a product as it is stored, the window with the columns; None if none."""
    inner, outer, tail = first.matrix, second.matrix, second.product
    if (first.product.op_type == "Conv") != (tail.op_type == "Conv"):
        return None
    if tail.op_type != "Conv":
        fits = inner.shape[1] == outer.shape[0]
        return (inner.shape[0], outer.shape[1]) if fits else None
    if inner.ndim != outer.ndim or len(inner) != outer.shape[1]:
        return None
    window = inner.shape[2:] if _behind(tail) else outer.shape[2:]
    return len(outer), inner.shape[1] * math.prod(window)


def _holds(link: _Link, matrix: Array) -> bool:
    """Whether the type of a weight holds all values of a product."""
    tensor = link.constants[0].const_value
    assert tensor is not None
    largest = max(float(matrix.max(initial=0.0)), -float(matrix.min(initial=0.0)))
    return largest <= _LARGEST.get(tensor.dtype, float(np.finfo(np.float32).max))


def _smaller(first: _Link, second: _Link, extent: tuple[int, int]) -> bool:
    """Whether a product has no more weights than what goes for it."""
    return math.prod(extent) <= sum(_size(link) for link in (first, second) if _goes(link))


def _size(link: _Link) -> int:
    """Weights that a map needs: of a product that is about to be split, those of its factors."""
    rank, outputs = link.constants[0].meta.get(metadata.RANK), len(link.matrix)
    return link.matrix.size if rank is None else rank * (outputs + link.matrix.size // outputs)


def _rank(first: _Link, second: _Link) -> int:
    """The most that the rank of a product can be, by the width in between."""
    widths = [first.matrix.shape[0 if first.product.op_type == "Conv" else 1]]
    known = [link.constants[0].meta.get(metadata.RANK) for link in (first, second)]
    return int(min(widths + [rank for rank in known if rank is not None]))


def _goes(link: _Link) -> bool:
    """Whether a map's weight is needed by nobody else."""
    return len(link.weight.uses()) == 1 and len(link.constants[0].uses()) == 1


def _folded(first: _Link, second: _Link) -> tuple[Array, Array | None] | None:
    """Weight and bias of both maps in one, as the node that is made wants them; None where not."""
    tail = second.product
    if tail.op_type == "Conv":
        return _folded_windows(first, second)
    if tail.op_type == "Gemm" and tail.attributes.get_int("transA", False):
        return None
    matrix = _product(first.matrix, second.matrix, first.factor * second.factor)
    return matrix, _sum(first.bias, second.matrix, second.bias, second.factor)


def _product(left: Array, right: Array, factor: float) -> Array:
    """``factor * left @ right``, summed in float64, piece by piece, in the type of the parts.

    Values that the type cannot hold become infinite.
    """
    result = np.empty((left.shape[0], right.shape[1]), np.result_type(left, right))
    with np.errstate(over="ignore"):
        for top in range(0, left.shape[0], _PIECE):
            rows = left[top : top + _PIECE].astype(np.float64) * factor
            for start in range(0, right.shape[1], _PIECE):
                part = rows @ right[:, start : start + _PIECE].astype(np.float64)
                result[top : top + _PIECE, start : start + _PIECE] = part
    return result


def _sum(
    bias: Array | None, matrix: Array, added: Array | None, factor: float = 1.0
) -> Array | None:
    """``b1 W2 + b2``."""
    if bias is None:
        return added
    pieces = range(0, matrix.shape[1], _PIECE)
    moved = [bias @ matrix[:, start : start + _PIECE].astype(np.float64) for start in pieces]
    return factor * np.concatenate(moved) + (0.0 if added is None else added)


def _folded_windows(first: _Link, second: _Link) -> tuple[Array, Array | None] | None:
    """Two convolutions without groups, one of which looks at single points.

    Points behind a window: exact with any stride of either, unless padding is automatic: that
    depends on the stride. Points in front of a window: exact when
    they have no stride of their own, and when what is padded in between is zero in both orders,
    that is without padding or without a bias.
    """
    head, tail = first.product, second.product
    inner, outer = first.matrix.astype(np.float64), second.matrix.astype(np.float64)
    if any(node.attributes.get_int("group", 1) != 1 for node in (head, tail)):
        return None
    bias = _sum(first.bias, outer.sum(axis=tuple(range(2, outer.ndim))).T, second.bias)
    if _behind(tail):
        automatic = head.attributes.get_string("auto_pad", "NOTSET").startswith("SAME")
        if automatic and any(step != 1 for step in tail.attributes.get_ints("strides", ())):
            return None
        return np.tensordot(outer.reshape(outer.shape[:2]), inner, axes=(1, 0)), bias
    plain = not any(step != 1 for step in head.attributes.get_ints("strides", ()))
    if _is_points(head) and _unpadded(head) and plain:
        if first.bias is not None and not _unpadded(tail):
            return None
        points = inner.reshape(inner.shape[:2])
        return np.moveaxis(np.tensordot(outer, points, axes=(1, 0)), -1, 1), bias
    return None


def _window(node: ir.Node) -> tuple[int, ...]:
    """Sizes of a convolution's window."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    return shape_of(weight.const_value)[2:]


def _is_points(node: ir.Node) -> bool:
    return all(size == 1 for size in _window(node))


def _behind(tail: ir.Node) -> bool:
    """Whether the second of two convolutions looks at single points of what the first gives."""
    return _is_points(tail) and _unpadded(tail)


def _unpadded(node: ir.Node) -> bool:
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "VALID":
        return True
    return automatic == "NOTSET" and not any(node.attributes.get_ints("pads", ()))


def _attributes(kind: str, head: ir.Node, tail: ir.Node) -> list[ir.Attr]:
    """Attributes of the node that does the work of both."""
    if kind == "Gemm":
        flipped = head.op_type == "Gemm" and head.attributes.get_int("transA", False)
        return [ir.AttrInt64("transA", 1)] if flipped else []
    if kind != "Conv":
        return []
    window, point = (head, tail) if _behind(tail) else (tail, head)
    found = [a for a in window.attributes.values() if a.name not in ("strides", "kernel_shape")]
    one = (1,) * len(_window(window))
    steps = zip(
        window.attributes.get_ints("strides", one),
        point.attributes.get_ints("strides", one),
        strict=True,
    )
    return [*found, ir.AttrInt64s("strides", [a * b for a, b in steps])]
