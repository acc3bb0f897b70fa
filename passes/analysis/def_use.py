"""Follow a weight from its initializer to the nodes that compute with it.

On the way a weight may pass through Transpose, Identity, Cast between float types, and Reshape,
Flatten, Squeeze or Unsqueeze to two dimensions. What arrives is described by a `View`: the stored
tensor read as a matrix, transposed or not. A tensor of three dimensions may also be a stack of
matrices, of which some are chosen on the way (`stacks`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.passes.analysis.constant_arguments import cast_type, integers
from onnxcomp.passes.analysis.stacks import Orientation, Stack, product_of, through
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.weight import Need

__all__ = ["Leaf", "View", "filters_input", "leaves", "qualified_type", "view_of"]

# Operators that only move or scale the samples of a signal.
_MOVES = frozenset(
    (
        *("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Pad"),
        *("Slice", "Split", "Concat", "Add", "Sub", "Mul", "Div", "BatchNormalization"),
    )
)


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """The value at some point of a weight's way, in terms of the stored tensor.

    Attributes:
        shape: Its shape.
        transposed: Whether it is the transpose of the stored tensor read as a matrix.
        dtype: Its element type.
    """

    shape: tuple[int, ...]
    transposed: bool
    dtype: ir.DataType

    def product(self, *, right_transposed: bool) -> Orientation:
        """``x @ view``, or ``x @ view.T`` when the consumer transposes it."""
        if right_transposed:
            rows, length = self.shape
            return Orientation(rows, length, self.transposed)
        length, rows = self.shape
        return Orientation(rows, length, not self.transposed)

    def rows_of(self) -> Orientation:
        """``view[indices]``."""
        rows, length = self.shape
        return Orientation(rows, length, self.transposed)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One end of a weight's way: a node that computes with it.

    Attributes:
        node: The node.
        index: Which of its inputs the weight is.
        path: Nodes between the initializer and the node.
        view: What arrives at the node.
        need: What the node does with it.
        orientation: How a product or look-up wants the canonical matrix; None for other needs.
    """

    node: ir.Node
    index: int
    path: tuple[ir.Node, ...]
    view: View
    need: Need
    orientation: Orientation | None


def qualified_type(node: ir.Node) -> str:
    """The operator, with its domain in front when it is not the default one."""
    return node.op_type if is_default_domain(node.domain) else f"{node.domain}::{node.op_type}"


def view_of(tensor: ir.TensorProtocol) -> View:
    """The stored tensor itself."""
    return View(shape_of(tensor), False, tensor.dtype)


def leaves(value: ir.Value, view: View, path: tuple[ir.Node, ...] = ()) -> Iterator[Leaf]:
    """Every node that computes with a value, whatever scope it is in."""
    stack = None if view.transposed else Stack.of(view.shape, view.dtype)
    for node, index in sorted(value.uses(), key=lambda use: use.idx):
        products = None if stack is None else _products(node, index, value, stack, path)
        if products is not None:
            yield from products
            continue
        onward = _through(node, index, view)
        if onward is not None and not node.outputs[0].is_graph_output():
            yield from leaves(node.outputs[0], onward, (*path, node))
            continue
        need, orientation = _need(node, index, value, view)
        yield Leaf(node, index, path, view, need, orientation)


def _products(
    node: ir.Node, index: int, value: ir.Value, stack: Stack, path: tuple[ir.Node, ...]
) -> list[Leaf] | None:
    """Products with matrices of a stack behind one of its uses; None where something else is."""
    onward = through(node, index, stack)
    if onward is None:
        product = product_of(node, index, value, stack)
        if product is None:
            return None
        view = View((stack.experts, *stack.shape), stack.transposed, stack.dtype)
        return [Leaf(node, index, path, view, "experts" if stack.chosen else "batch", product)]
    found: list[Leaf] = []
    output = node.outputs[0]
    if output.is_graph_output():
        return None
    for reader, place in sorted(output.uses(), key=lambda use: use.idx):
        products = _products(reader, place, output, onward, (*path, node))
        if products is None:
            return None
        found += products
    return found or None


def _through(node: ir.Node, index: int, view: View) -> View | None:
    """The view behind a node that only reorders or converts; None when the way ends here."""
    if index or not is_default_domain(node.domain) or len(node.outputs) != 1:
        return None
    match node.op_type:
        case "Identity":
            return view
        case "Transpose":
            return _transposed(node, view)
        case "Cast":
            dtype = cast_type(node)
            return None if dtype is None else dataclasses.replace(view, dtype=dtype)
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze":
            return _reshaped(node, view)
    return None


def _transposed(node: ir.Node, view: View) -> View | None:
    perm = node.attributes.get_ints("perm", None)
    if len(view.shape) != 2:
        return None
    if perm is None or tuple(perm) == (1, 0):
        return dataclasses.replace(view, shape=view.shape[::-1], transposed=not view.transposed)
    return view


def _reshaped(node: ir.Node, view: View) -> View | None:
    shape = _target_shape(node, view.shape)
    if shape is None or len(shape) != 2 or math.prod(shape) != math.prod(view.shape):
        return None
    # The transpose of the stored matrix, read in another shape, is no view of it any more.
    if view.transposed and shape != view.shape:
        return None
    return dataclasses.replace(view, shape=shape)


def _target_shape(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    if node.op_type == "Flatten":
        axis = int(node.attributes.get_int("axis", 1)) % max(1, len(shape))
        return math.prod(shape[:axis]), math.prod(shape[axis:])
    axes = integers(node, "axes" if node.op_type != "Reshape" else "shape")
    if axes is None:
        return None
    if node.op_type == "Reshape":
        return _resolved(axes, shape) if not node.attributes.get_int("allowzero", 0) else None
    if node.op_type == "Squeeze":
        gone = {axis % len(shape) for axis in axes}
        return tuple(dim for axis, dim in enumerate(shape) if axis not in gone)
    return None


def _resolved(wanted: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """A Reshape's target with its zeros and its -1 filled in."""
    if any(dim == 0 and axis >= len(shape) for axis, dim in enumerate(wanted)):
        return None
    dims = [shape[axis] if dim == 0 else dim for axis, dim in enumerate(wanted)]
    known = math.prod(dim for dim in dims if dim > 0)
    return tuple(math.prod(shape) // max(1, known) if dim == -1 else dim for dim in dims)


def _need(
    node: ir.Node, index: int, value: ir.Value, view: View
) -> tuple[Need, Orientation | None]:
    matrix = len(view.shape) == 2 and is_default_domain(node.domain)
    # A node that reads the weight twice keeps it dense: one of the two is no product with it.
    if not matrix or sum(given is value for given in node.inputs) > 1:
        return "dense", None
    match node.op_type, index:
        case "MatMul", 1:
            return "matmul", view.product(right_transposed=False)
        case "Gemm", 1:
            transposed = bool(node.attributes.get_int("transB", 0))
            return "matmul", view.product(right_transposed=transposed)
        case "Gather", 0 if node.attributes.get_int("axis", 0) in (0, -2):
            return "gather", view.rows_of()
    return "dense", None


def filters_input(node: ir.Node, model: ir.Model) -> bool:
    """Whether a node is a convolution of an input of the model, as it is, moved or scaled."""
    if node.op_type != "Conv" or not is_default_domain(node.domain):
        return False
    value = node.inputs[0]
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in _MOVES or not producer.inputs:
            return False
        value = producer.inputs[0]
    return value is not None and value.const_value is None and value.graph is model.graph
