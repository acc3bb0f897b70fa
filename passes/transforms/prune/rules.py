"""What each operator means for atoms: products, convolutions and element-wise operators.

A rule reads the labels of a node's inputs, relates their atoms, binds weights and labels the
outputs. A node without a rule freezes the atoms that reach it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.transforms.prune.walk import CARRIED, CONSUMED, PRODUCED, QkProduct, Side, Walk
from onnxcomp.passes.weight import Array

__all__ = [
    "Operand",
    "batch_norm",
    "conv",
    "conv_transpose",
    "elementwise",
    "gemm",
    "matmul",
    "merge",
    "unknown",
]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One input of a broadcasting operator, seen from its output.

    Attributes:
        index: Which input of the node.
        dims: Its size along each axis of the output, 1 where it is repeated.
        blocks: Its blocks, on axes of the output.
        offset: Axes of the output before its first one.
    """

    index: int
    dims: tuple[int, ...]
    blocks: tuple[Block, ...]
    offset: int


def _operand(walk: Walk, node: ir.Node, index: int, rank: int) -> Operand:
    value = node.inputs[index]
    shape = walk.shape(value)
    offset = rank - len(shape)
    blocks = [b.moved(axis + offset for axis in b.axes) for b in walk.label(value)]
    return Operand(index, (1,) * offset + shape, tuple(blocks), offset)


def elementwise(walk: Walk, node: ir.Node) -> None:
    """``y = f(a, b, ...)`` with broadcasting: channels that meet are one."""
    out = node.outputs[0]
    rank = len(walk.shape(out))
    present = [index for index, value in enumerate(node.inputs) if value is not None]
    operands = [_operand(walk, node, index, rank) for index in present]
    blocks = merge(walk, node, operands)
    for value in node.outputs:
        walk.put(value, blocks)


def merge(walk: Walk, node: ir.Node, operands: Sequence[Operand]) -> list[Block]:
    """Relate the atoms of operands that meet on the axes of the output; blocks of the output."""
    blocks = [block for operand in operands for block in operand.blocks]
    result: list[Block] = []
    for axes in _joined(blocks):
        full = [block for block in blocks if block.axes == axes]
        if not full:
            walk.freeze(
                [b for b in blocks if set(b.axes) & set(axes)], f"{node.op_type} mixes axes"
            )
            continue
        for operand in operands:
            reason = _meet(walk, node, operand, full[0])
            if reason is not None:
                walk.freeze(full[:1], f"{node.op_type}: {reason}")
        result.append(full[0])
    return result


def _joined(blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """Sets of axes, joined where they overlap."""
    sets: list[set[int]] = []
    for block in blocks:
        own = set(block.axes)
        for other in [other for other in sets if other & own]:
            own |= other
            sets.remove(other)
        sets.append(own)
    return [tuple(sorted(own)) for own in sets]


def _meet(walk: Walk, node: ir.Node, operand: Operand, block: Block) -> str | None:
    """Relate an operand to the atoms of a block; the reason where that cannot be done."""
    covered = tuple(axis for axis in block.axes if operand.dims[axis] != 1)
    found = [other for other in operand.blocks if set(other.axes) & set(block.axes)]
    if not covered or any(other is block for other in found):
        return None
    atoms = _part(walk, block, covered)
    if atoms is None:
        return "an operand covers some of the axes only"
    if not found:
        inputs = [axis - operand.offset for axis in covered]
        return walk.bind_or_gather(node, operand.index, inputs, atoms)
    if len(found) == 1 and found[0].axes == covered:
        walk.atoms.same(atoms, found[0].atoms)
        return None
    walk.freeze(found, f"{node.op_type} mixes axes")
    return "operands have their channels on different axes"


def _part(walk: Walk, block: Block, axes: tuple[int, ...]) -> Array | None:
    """Atoms of some axes of a block."""
    if axes == block.axes:
        return block.atoms
    return walk.axis_atoms(block, axes[0]) if len(axes) == 1 else None


def _contraction(walk: Walk, value: ir.Value, axis: int) -> tuple[Block | None, list[Block]]:
    """The block on an axis that is summed over, and the others."""
    blocks = walk.label(value)
    own = [block for block in blocks if axis in block.axes]
    return (own[0] if own else None), [block for block in blocks if axis not in block.axes]


def _rest(walk: Walk, block: Block, axis: int) -> list[Block]:
    """What is left of a block when one of its axes is summed over: its rows."""
    if len(block.axes) == 1:
        return []
    if axis == block.axes[-1]:
        return [Block(block.axes[:-1], walk.atoms.rows(block.atoms))]
    walk.freeze([block], "a product sums over the outer of two axes")
    return []


def _consume(walk: Walk, node: ir.Node, block: Block, axis: int, index: int, own: int) -> None:
    """Sum over an axis of an activation with the weight at an input."""
    atoms = walk.axis_atoms(block, axis)
    if atoms is None:
        walk.freeze([block], f"{node.op_type} sums over one of several axes")
        return
    reason = walk.bind(node, index, (own,), atoms, CONSUMED)
    if reason is not None:
        walk.freeze([block], f"{node.op_type}: {reason}")


def matmul(walk: Walk, node: ir.Node) -> None:
    """``y = a @ b``, with a weight on one side or with two activations."""
    left, right = node.inputs[0], node.inputs[1]
    out = node.outputs[0]
    assert left is not None and right is not None
    ranks = len(walk.shape(left)), len(walk.shape(right))
    if min(ranks) < 2:
        return unknown(walk, node)
    if ranks[1] == 2 and not walk.label(right):
        return _weighted(walk, node, 0, ranks[0] - 1, 1, (0, 1), len(walk.shape(out)) - 1)
    if ranks[0] == 2 and not walk.label(left):
        return _weighted(walk, node, 1, ranks[1] - 2, 0, (1, 0), len(walk.shape(out)) - 2)
    _activations(walk, node)


def _weighted(
    walk: Walk, node: ir.Node, data: int, axis: int, weight: int, sides: tuple[int, int], made: int
) -> None:
    """A product with a weight.

    Args:
        walk: The analysis.
        node: The product.
        data: Which input is the activation.
        axis: Its axis that is summed over.
        weight: Which input is the weight.
        sides: The axes of the weight that are summed over and that are made.
        made: The axis of the output that the weight makes.
    """
    value, out = node.inputs[data], node.outputs[0]
    assert value is not None
    block, others = _contraction(walk, value, axis)
    if block is not None:
        _consume(walk, node, block, axis, weight, sides[0])
        others += _rest(walk, block, axis)
    shift = len(walk.shape(out)) - len(walk.shape(value))
    blocks = [other.moved(a + shift for a in other.axes) for other in others]
    atoms = walk.atoms.new(walk.shape(node.inputs[weight])[sides[1]])
    if walk.bind(node, weight, (sides[1],), atoms, PRODUCED) is None:
        blocks.append(Block((made,), atoms))
    walk.put(out, blocks)


def _activations(walk: Walk, node: ir.Node) -> None:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None and right is not None
    shapes = walk.shape(left), walk.shape(right)
    rank = len(walk.shape(node.outputs[0]))
    axes = len(shapes[0]) - 1, len(shapes[1]) - 2
    first, others = _contraction(walk, left, axes[0])
    second, more = _contraction(walk, right, axes[1])
    offsets = rank - len(shapes[0]), rank - len(shapes[1])
    _contract(walk, node, first, second, axes, offsets)
    others += _rest(walk, first, axes[0]) if first else []
    more += _rest(walk, second, axes[1]) if second else []
    dims = (
        (1,) * offsets[0] + shapes[0][:-1] + (1,),
        (1,) * offsets[1] + shapes[1][:-2] + (1, shapes[1][-1]),
    )
    operands = [
        Operand(i, dims[i], tuple(b.moved(a + offsets[i] for a in b.axes) for b in blocks), offset)
        for i, (blocks, offset) in enumerate(zip((others, more), offsets, strict=True))
    ]
    walk.put(node.outputs[0], merge(walk, node, operands))


def _contract(
    walk: Walk,
    node: ir.Node,
    first: Block | None,
    second: Block | None,
    axes: tuple[int, int],
    offsets: tuple[int, int],
) -> None:
    """Relate atoms that two activations are summed over."""
    if first is None or second is None:
        blocks = [block for block in (first, second) if block is not None]
        walk.freeze(blocks, f"{node.op_type} sums over an axis of which one side cannot shrink")
        return
    a = tuple(axis + offsets[0] for axis in first.axes[:-1])
    b = tuple(axis + offsets[1] for axis in second.axes[:-1])
    alike = a == b and first.atoms.shape == second.atoms.shape
    if alike and first.axes[-1] == axes[0] and second.axes[-1] == axes[1]:
        walk.atoms.same(first.atoms, second.atoms)
        _note_product(walk, node, first.axes, second.axes, first.atoms)
        return
    parts = walk.axis_atoms(first, axes[0]), walk.axis_atoms(second, axes[1])
    if parts[0] is None or parts[1] is None:
        walk.freeze([first, second], f"{node.op_type} sums over one of several axes")
        return
    walk.atoms.same(parts[0], parts[1])
    _note_product(walk, node, axes[:1], axes[1:], parts[0])


def _note_product(
    walk: Walk, node: ir.Node, left: tuple[int, ...], right: tuple[int, ...], atoms: Array
) -> None:
    sides = [
        Side(value.name or "", axes)
        for value, axes in zip(node.inputs, (left, right), strict=False)
        if value is not None
    ]
    walk.qk_products.append(QkProduct(node, sides[0], sides[1], atoms))


def gemm(walk: Walk, node: ir.Node) -> None:
    """``y = a @ b + c`` with either factor transposed."""
    x, out = node.inputs[0], node.outputs[0]
    flipped = bool(node.attributes.get_int("transA", 0))
    turned = bool(node.attributes.get_int("transB", 0))
    axis = 0 if flipped else 1
    if x is None or walk.label(node.inputs[1]):
        return unknown(walk, node)
    _weighted(walk, node, 0, axis, 1, (1, 0) if turned else (0, 1), 1)
    if flipped:
        walk.labels.pop(out, None)
        walk.freeze(walk.label(x), "Gemm transposes its input")
    _bias(walk, node, 2)


def _bias(walk: Walk, node: ir.Node, index: int) -> None:
    """A bias that is added along the axis a weight makes."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return
    out = node.outputs[0]
    rank = len(walk.shape(out))
    operand = _operand(walk, node, index, rank)
    for block in walk.label(out):
        reason = _meet(walk, node, operand, block)
        if reason is not None:
            walk.freeze([block], f"{node.op_type}: {reason}")


def conv(walk: Walk, node: ir.Node) -> None:
    """Conv: full, depthwise or in groups; FusedConv adds a value before its activation."""
    x, out = node.inputs[0], node.outputs[0]
    group = node.attributes.get_int("group", 1)
    blocks = [block for block in walk.label(x) if block.axes == (1,)]
    walk.freeze([b for b in walk.label(x) if b.axes != (1,)], "Conv slides over one of its axes")
    shape = walk.shape(node.inputs[1])
    if walk.label(node.inputs[1]):
        return unknown(walk, node)
    if group == 1:
        atoms = _full_conv(walk, node, blocks, shape[0])
    else:
        atoms = _grouped_conv(walk, node, blocks, shape, group)
    if atoms is None:
        return
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        reason = walk.bind(node, 2, (0,), atoms)
        if reason is not None:
            walk.atoms.freeze(atoms, f"Conv: {reason}")
    made = [Block((1,), atoms)]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        rank = len(walk.shape(out))
        own = Operand(-1, walk.shape(out), tuple(made), 0)
        merge(walk, node, [own, _operand(walk, node, 3, rank)])
    walk.put(out, made)


def _full_conv(walk: Walk, node: ir.Node, blocks: Sequence[Block], channels: int) -> Array | None:
    for block in blocks:
        _consume(walk, node, block, 1, 1, 1)
    atoms = walk.atoms.new(channels)
    return atoms if walk.bind(node, 1, (0,), atoms, PRODUCED) is None else None


def _grouped_conv(
    walk: Walk, node: ir.Node, blocks: Sequence[Block], shape: tuple[int, ...], group: int
) -> Array | None:
    """Depthwise: outputs go with inputs. In groups: whole groups, or evenly in all of them."""
    if not blocks:
        return None
    atoms = blocks[0].atoms
    grouped = atoms.reshape(group, -1)
    if shape[1] == 1:
        made = np.repeat(atoms, shape[0] // group)
    else:
        inner = walk.atoms.columns(grouped)
        reason = walk.bind(node, 1, (1,), inner, CONSUMED)
        if reason is not None:
            walk.freeze(blocks, f"Conv: {reason}")
        made = walk.atoms.new(shape[0])
        out = made.reshape(group, -1)
        if out.shape[1] > 1:
            walk.atoms.same(walk.atoms.rows(grouped), walk.atoms.rows(out))
        else:
            walk.atoms.same(walk.atoms.rows(grouped), made)
    if walk.bind(node, 1, (0,), made, CARRIED if shape[1] == 1 else PRODUCED) is not None:
        walk.freeze(blocks, "Conv has a weight that cannot shrink")
        return None
    walk.patches.append(lambda editor: editor.group(node, grouped))
    return made


def conv_transpose(walk: Walk, node: ir.Node) -> None:
    """ConvTranspose without groups: the weight is ``(in, out, ...)``."""
    x, out = node.inputs[0], node.outputs[0]
    if node.attributes.get_int("group", 1) != 1 or walk.label(node.inputs[1]):
        return unknown(walk, node)
    for block in walk.label(x):
        if block.axes == (1,):
            _consume(walk, node, block, 1, 1, 0)
        else:
            walk.freeze([block], "ConvTranspose slides over one of its axes")
    atoms = walk.atoms.new(walk.shape(node.inputs[1])[1])
    if walk.bind(node, 1, (1,), atoms, PRODUCED) is not None:
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        reason = walk.bind(node, 2, (0,), atoms)
        if reason is not None:
            walk.atoms.freeze(atoms, f"ConvTranspose: {reason}")
    return walk.put(out, [Block((1,), atoms)])


def batch_norm(walk: Walk, node: ir.Node) -> None:
    """BatchNormalization and InstanceNormalization: one set of numbers for each channel."""
    blocks = walk.label(node.inputs[0])
    for block in blocks:
        if block.axes != (1,):
            walk.freeze([block], f"{node.op_type} works along one of its axes")
            continue
        for index in range(1, len(node.inputs)):
            reason = walk.bind(node, index, (0,), block.atoms)
            if reason is not None:
                walk.freeze([block], f"{node.op_type}: {reason}")
    walk.put(node.outputs[0], [block for block in blocks if block.axes == (1,)])


def unknown(walk: Walk, node: ir.Node) -> None:
    """Keep everything that reaches a node, since it is not understood."""
    for value in node.inputs:
        walk.freeze(walk.label(value), f"{node.op_type} {node.name} is not understood")
