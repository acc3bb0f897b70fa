"""Follow a stack of matrices, such as the experts of a layer, to the products with some of them.

A stack is a tensor of three dimensions. On the way it may pass through Identity, Cast, a Transpose
of its matrices, Gather (or GatherND) along the first axis, and from there on Reshape, Squeeze and
Unsqueeze of what stands before the last two axes: these change the shape of the indices, and of
nothing else.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnxcomp.passes.analysis.constant_arguments import cast_type, constant, integers
from onnxcomp.passes.analysis.einsum_products import einsum_product
from onnxcomp.passes.ir.traversal import is_default_domain

__all__ = ["Orientation", "Stack", "product_of", "through"]


@dataclasses.dataclass(frozen=True, slots=True)
class Orientation:
    """Which way round a fused use reads the canonical matrix.

    Attributes:
        rows: Rows of the canonical matrix: output channels, or embedding vectors.
        length: Its columns: the axis a product sums over.
        transposed: Whether the stored tensor is ``(length, rows)`` rather than ``(rows, length)``;
            of a stack, whether each of its matrices is.
        experts: Matrices of a stack, one after the other in the rows; 1 for a matrix.
    """

    rows: int
    length: int
    transposed: bool
    experts: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one tensor at some point of their way.

    Attributes:
        experts: How many the tensor holds.
        shape: Of each, as it is here.
        transposed: Whether each is the transpose of what is stored.
        dtype: Element type.
        gathered: Whether some of them were picked.
        chosen: Whether a run picks them.
    """

    experts: int
    shape: tuple[int, int]
    transposed: bool
    dtype: ir.DataType
    gathered: bool = False
    chosen: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: ir.DataType) -> Stack | None:
        """A stored tensor as a stack; None where it is none."""
        if len(shape) != 3 or min(shape) < 2:
            return None
        return cls(shape[0], (shape[1], shape[2]), False, dtype)

    def product(self, index: int) -> Orientation:
        """``x @ matrix``, or ``matrix @ x`` where the matrix is input 0."""
        outer, inner = self.shape if index == 0 else self.shape[::-1]
        transposed = self.transposed if index == 0 else not self.transposed
        return Orientation(self.experts * outer, inner, transposed, self.experts)


def product_of(node: ir.Node, index: int, value: ir.Value, stack: Stack) -> Orientation | None:
    """The product that a node makes with matrices of a stack; None where it does not."""
    if node.op_type not in ("MatMul", "Einsum") or not is_default_domain(node.domain):
        return None
    if len(node.inputs) != 2 or (other := node.inputs[1 - index]) is None or other is value:
        return None
    if node.op_type == "Einsum":
        found = einsum_product(node, index)
        return None if found is None else stack.product(0 if found.turned else 1)
    # Beside matrices on the left, the other operand is turned, and the result back.
    turned = (other.shape, node.outputs[0].shape)
    if index == 0 and any(shape is None or len(shape) < 2 for shape in turned):
        return None
    return stack.product(index)


def through(node: ir.Node, index: int, stack: Stack) -> Stack | None:
    """The stack behind a node; None where its way ends here."""
    if index or not is_default_domain(node.domain) or len(node.outputs) != 1:
        return None
    match node.op_type:
        case "Identity":
            return stack
        case "Cast":
            dtype = cast_type(node)
            return None if dtype is None else dataclasses.replace(stack, dtype=dtype)
        case "Transpose":
            return _transposed(node, stack)
        case "Gather" | "GatherND":
            return _gathered(node, stack)
        case "Squeeze" | "Unsqueeze" if stack.gathered:
            return stack if _before_matrices(node) else None
        case "Reshape" if stack.gathered:
            return stack if _keeps_matrices(node, stack) else None
    return None


def _transposed(node: ir.Node, stack: Stack) -> Stack | None:
    perm = node.attributes.get_ints("perm", None)
    if perm is None or len(perm) < 2:
        return None
    rank = len(perm)
    if list(perm) == list(range(rank)):
        return stack
    if list(perm) != [*range(rank - 2), rank - 1, rank - 2]:
        return None
    return dataclasses.replace(stack, shape=stack.shape[::-1], transposed=not stack.transposed)


def _gathered(node: ir.Node, stack: Stack) -> Stack | None:
    indices = node.inputs[1]
    if stack.gathered or indices is None:
        return None
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) not in (0, -3):
        return None
    if node.op_type == "GatherND" and not _picks_first(node, indices):
        return None
    return dataclasses.replace(stack, gathered=True, chosen=constant(indices) is None)


def _picks_first(node: ir.Node, indices: ir.Value) -> bool:
    """Whether tuples of indices have one entry each, of the first axis."""
    if node.attributes.get_int("batch_dims", 0):
        return False
    tensor, producer = constant(indices), indices.producer()
    if tensor is not None:
        return tensor.shape.dims[-1:] == (1,)
    if indices.shape:
        return indices.shape[-1] == 1
    return producer is not None and producer.op_type == "Unsqueeze" and _adds_last(producer)


def _adds_last(node: ir.Node) -> bool:
    axes = integers(node, "axes")
    return axes is not None and -1 in axes


def _before_matrices(node: ir.Node) -> bool:
    """Whether a Squeeze or Unsqueeze touches no axis of the matrices."""
    axes = integers(node, "axes")
    wider = node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0]
    if axes is None or wider is None:
        return False
    rank = None if wider.shape is None else len(wider.shape)
    if rank is None and node.op_type == "Unsqueeze" and min(axes) >= 0:
        return max(axes) < len(axes)  # in front of everything
    return all((axis < -2) if axis < 0 else (rank is not None and axis < rank - 2) for axis in axes)


def _keeps_matrices(node: ir.Node, stack: Stack) -> bool:
    """Whether a Reshape leaves the last two axes as they are."""
    if node.attributes.get_int("allowzero", 0):
        return False
    target = integers(node, "shape")
    if target is not None and len(target) >= 2 and target[-2:] == stack.shape:
        return True
    shape = node.outputs[0].shape
    return shape is not None and len(shape) >= 2 and tuple(shape[-2:]) == stack.shape
