"""One linear map, and the product of two: what it holds, and whether it is smaller.

``y = (x A + a) B + b`` is ``x (A B) + (a B + b)``; a convolution with a window before or behind one
that looks at single points is one convolution.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.tensors import shape_of

__all__ = [
    "Link",
    "extent_of",
    "folded_attributes",
    "folded_product",
    "goes",
    "holds",
    "is_pointwise_tail",
    "is_smaller",
    "product_rank",
]

Array = npt.NDArray[Any]

# Rows and columns of a product that are computed at a time.
_PIECE = 256

_LARGEST = {ir.DataType.FLOAT16: 65504.0}


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
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


def extent_of(first: Link, second: Link) -> tuple[int, int] | None:
    """Rows and columns of a product as it is stored, the window with the columns; None if none."""
    inner, outer, tail = first.matrix, second.matrix, second.product
    if (first.product.op_type == "Conv") != (tail.op_type == "Conv"):
        return None
    if tail.op_type != "Conv":
        fits = inner.shape[1] == outer.shape[0]
        return (inner.shape[0], outer.shape[1]) if fits else None
    if inner.ndim != outer.ndim or len(inner) != outer.shape[1]:
        return None
    window = inner.shape[2:] if is_pointwise_tail(tail) else outer.shape[2:]
    return len(outer), inner.shape[1] * math.prod(window)


def holds(link: Link, matrix: Array) -> bool:
    """Whether the type of a weight holds all values of a product."""
    tensor = link.constants[0].const_value
    assert tensor is not None
    largest = max(float(matrix.max(initial=0.0)), -float(matrix.min(initial=0.0)))
    return largest <= _LARGEST.get(tensor.dtype, float(np.finfo(np.float32).max))


def is_smaller(first: Link, second: Link, extent: tuple[int, int]) -> bool:
    """Whether a product has no more weights than what goes for it."""
    return math.prod(extent) <= sum(_size(link) for link in (first, second) if goes(link))


def _size(link: Link) -> int:
    """Weights that a map needs: of a product that is about to be split, those of its factors."""
    rank, outputs = link.constants[0].meta.get(metadata.RANK), len(link.matrix)
    return link.matrix.size if rank is None else rank * (outputs + link.matrix.size // outputs)


def product_rank(first: Link, second: Link) -> int:
    """The most that the rank of a product can be, by the width in between."""
    widths = [first.matrix.shape[0 if first.product.op_type == "Conv" else 1]]
    known = [link.constants[0].meta.get(metadata.RANK) for link in (first, second)]
    return int(min(widths + [rank for rank in known if rank is not None]))


def goes(link: Link) -> bool:
    """Whether a map's weight is needed by nobody else."""
    return len(link.weight.uses()) == 1 and len(link.constants[0].uses()) == 1


def folded_product(first: Link, second: Link) -> tuple[Array, Array | None] | None:
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


def _folded_windows(first: Link, second: Link) -> tuple[Array, Array | None] | None:
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
    if is_pointwise_tail(tail):
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


def is_pointwise_tail(tail: ir.Node) -> bool:
    """Whether the second of two convolutions looks at single points of what the first gives."""
    return _is_points(tail) and _unpadded(tail)


def _unpadded(node: ir.Node) -> bool:
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "VALID":
        return True
    return automatic == "NOTSET" and not any(node.attributes.get_ints("pads", ()))


def folded_attributes(kind: str, head: ir.Node, tail: ir.Node) -> list[ir.Attr]:
    """Attributes of the node that does the work of both."""
    if kind == "Gemm":
        flipped = head.op_type == "Gemm" and head.attributes.get_int("transA", False)
        return [ir.AttrInt64("transA", 1)] if flipped else []
    if kind != "Conv":
        return []
    window, point = (head, tail) if is_pointwise_tail(tail) else (tail, head)
    found = [a for a in window.attributes.values() if a.name not in ("strides", "kernel_shape")]
    one = (1,) * len(_window(window))
    steps = zip(
        window.attributes.get_ints("strides", one),
        point.attributes.get_ints("strides", one),
        strict=True,
    )
    return [*found, ir.AttrInt64s("strides", [a * b for a, b in steps])]
