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
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.policy import Policy, selected
from onnxcomp.passes.config.settings import Settings
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
from onnxcomp.passes.transforms.folding_cost import affordable
from onnxcomp.passes.transforms.linear_products import (
    Link,
    extent_of,
    folded_attributes,
    folded_product,
    goes,
    holds,
    is_pointwise_tail,
    is_smaller,
    product_rank,
)
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.weight import Use, WeightSite

__all__ = ["LinearChains", "fold_linear_chains"]

Array = npt.NDArray[Any]

# Bytes of folded weights that are held in memory; chains beyond are left as they are.
_MOST_HELD = 256 << 20

# Whether a weight will be stored with two factors: its names and those of its nodes, the operator
# that uses it, its rows and columns.
Truncated = Callable[[Sequence[str], str, tuple[int, int]], bool]

# Methods that leave values as they are, or nearly so: the graph stays, too.
_EXACT_METHODS = frozenset({"dense", "fp16"})


def _never(names: Sequence[str], operator: str, shape: tuple[int, int]) -> bool:
    """No weight will."""
    del names, operator, shape
    return False


class LinearChains(GraphPass):
    """Fold linear maps that follow one another, before their weights are looked for."""

    name: ClassVar[str] = "linear_chains"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize",)
    subgraphs: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Wherever values may change by a rounding."""
        return not set(settings.method) <= _EXACT_METHODS

    def run(self, model: ir.Model, context: Context) -> Change:
        """``MatMul(MatMul(x, A), B) -> MatMul(x, AB)``, and so on: see `fold_linear_chains`."""
        settings = context.settings
        return fold_linear_chains(
            model,
            min_size=settings.min_size,
            include=settings.include,
            exclude=settings.exclude,
            freeze_inputs=settings.freeze_inputs,
            truncated=functools.partial(_truncated, settings),
        )


def _truncated(
    settings: Settings, names: Sequence[str], operator: str, shape: tuple[int, int]
) -> bool:
    """Whether a weight gets two factors and nothing else is asked for."""
    policy = Policy.of(dataclasses.replace(settings, rest="keep"), names, [operator])
    codecs = [CODECS[name] for name in policy.methods]
    rows, length = shape
    use = Use("", operator, 1, "dense" if operator == "Conv" else "matmul")
    site = WeightSite("", shape, "float32", (use,), "", rows, length, False)
    return all(c.spectrum is not None and c.refuse(site) is None for c in codecs)


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
        self._asked: dict[str, bool] = {}

    def fold_next(self) -> str | None:
        """Fold one pair of maps; what was done, or None where nothing is left to do."""
        for scope in scopes(self._model):
            for node in scope.graph:
                for first, second in self._pairs(node):
                    # Products are computed last: many pairs do not pay, and all are seen often.
                    if not self._pays(first, second) or not self._affordable(first, second):
                        continue
                    folded = folded_product(first, second)
                    if folded is not None and holds(second, folded[0]):
                        return self._replace(first, second, *folded)
        return None

    def _pairs(self, node: ir.Node) -> Iterator[tuple[Link, Link]]:
        """The maps that end in a node's input and start at the node."""
        value = node.inputs[0] if node.inputs else None
        if value is None or not _only_use(value) or self._source(node) is None:
            return
        first = self._ending(value)
        second = self._link(node) if first is not None else None
        if first is not None and second is not None and first.product.graph is node.graph:
            yield first, second

    def _ending(self, value: ir.Value) -> Link | None:
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

    def _link(self, node: ir.Node) -> Link | None:
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
            return Link((node,), weight, matrix, None, (source,), factor)
        bias = self._vector(given, matrix.shape[0 if node.op_type == "Conv" else 1], axes=2)
        if bias is None:
            return None
        bias = bias * node.attributes.get_float("beta", 1.0)
        return Link((node,), weight, matrix, bias, (source, given), factor)

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

    def _pays(self, first: Link, second: Link) -> bool:
        """Whether the product is allowed and has no more weights than what goes for it."""
        extent = extent_of(first, second)
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
        return is_smaller(first, second, extent) or self._thin(first, second, extent)

    def _affordable(self, first: Link, second: Link) -> bool:
        """Whether the product takes no more time than it is worth; asked once for each pair."""
        name = f"{first.constants[0].name} with {second.constants[0].name}"
        if name not in self._asked:
            inner = first.matrix.shape[0 if first.product.op_type == "Conv" else 1]
            rows = first.matrix.size // max(1, inner)
            columns = second.matrix.size // max(1, inner)
            self._asked[name] = affordable(name, rows, inner, columns)
        return self._asked[name]

    def _thin(self, first: Link, second: Link, extent: tuple[int, int]) -> bool:
        """Whether two thin maps, needed by nobody else, will be replaced by thinner ones."""
        tail = second.product
        if not (goes(first) and goes(second)):
            return False
        if tail.op_type == "Conv" and not is_pointwise_tail(tail):
            return False
        made = [f"{second.constants[0].name}/folded", tail.name or ""]
        if second.bias is not None or first.bias is not None:
            made[1:] = [f"{tail.name}/product"] if tail.op_type == "MatMul" else made[1:]
        known = [_names_of(first), _names_of(second), made]
        if not all(self._selected(names) for names in known):
            return False
        shape = extent if tail.op_type == "Conv" else extent[::-1]
        return all(self._truncated(names, tail.op_type, shape) for names in known)

    def _allowed(self, link: Link) -> bool:
        """Whether the patterns allow a map to be touched."""
        names = _names_of(link)
        return names[0] not in self._compressed and self._selected(names)

    def _selected(self, names: Sequence[str]) -> bool:
        """Whether the patterns allow something with these names to be touched."""
        return selected(names, self._include, self._exclude)

    def _replace(self, first: Link, second: Link, matrix: Array, bias: Array | None) -> str:
        """Put one map in the place of two."""
        head, tail = first.product, second.product
        tensor = second.constants[0].const_value
        assert tensor is not None and tail.graph is not None
        name = f"{second.constants[0].name}/folded"
        weight = self._initializer(name, matrix, tensor.dtype)
        if not is_smaller(first, second, (len(matrix), matrix.size // len(matrix))):
            weight.meta[metadata.RANK] = product_rank(first, second)
        self._held += weight.const_value.nbytes if weight.const_value is not None else 0
        kind = "Gemm" if "Gemm" in (head.op_type, tail.op_type) else tail.op_type
        inputs: list[ir.Value | None] = [head.inputs[0], weight]
        if bias is not None and kind != "MatMul":
            inputs.append(self._initializer(f"{name}/bias", bias, tensor.dtype))
        made = ir.Node("", kind, inputs, folded_attributes(kind, head, tail))
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

    def _clean(self, links: Sequence[Link]) -> None:
        """Remove what nobody reads any more."""
        for link in links:
            producer = link.weight.producer()
            if producer is not None:
                remove_dead([producer])
            for value in link.constants:
                if not value.uses():
                    remove_initializer(value)


def _names_of(link: Link) -> list[str]:
    """Names that patterns may speak of: the weight's, then those of the nodes."""
    return [link.constants[0].name or "", *(node.name or "" for node in link.nodes)]
