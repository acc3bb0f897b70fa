"""How atoms move through a change of shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.transforms.prune.patch import Patch

__all__ = ["carry", "resize", "segments", "touched"]

Shape = tuple[int, ...]


def segments(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes that hold the same elements, axes of size 1 left out.

    ``(2, 6, 4), (12, 2, 2)`` gives ``[([0, 1], [0]), ([2], [1, 2])]``.
    """
    ours = [axis for axis, size in enumerate(before) if size != 1]
    theirs = [axis for axis, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    while ours and theirs:
        left, right = [ours.pop(0)], [theirs.pop(0)]
        a, b = before[left[0]], after[right[0]]
        while a != b:
            if a < b:
                left.append(ours.pop(0))
                a *= before[left[-1]]
            else:
                right.append(theirs.pop(0))
                b *= after[right[-1]]
        found.append((left, right))
    return found


def touched(block: Block, before: Shape, after: Shape) -> tuple[list[int], list[int]]:
    """Axes before and after a reshape that hold the elements of a block's axes."""
    found = [pair for pair in segments(before, after) if set(pair[0]) & set(block.axes)]
    return [axis for left, _ in found for axis in left], [a for _, right in found for a in right]


def carry(block: Block, before: Shape, after: Shape) -> Block | str:
    """The block after a reshape, or why it cannot be followed."""
    if int(np.prod(before)) != int(np.prod(after)) or 0 in before:
        return "the sizes before and after a reshape do not agree"
    ours, theirs = touched(block, before, after)
    sizes = [before[axis] for axis in block.axes]
    own = block.atoms.reshape([size for size in sizes if size != 1])
    spread = [before[axis] if axis in block.axes else 1 for axis in ours]
    full = np.broadcast_to(own.reshape(spread), [before[axis] for axis in ours])
    atoms = np.ascontiguousarray(full).reshape([after[axis] for axis in theirs])
    return Block(tuple(theirs), atoms).simplified()


def resize(node: ir.Node, index: int, out: ir.Value, blocks: Sequence[Block]) -> Patch:
    """Write the sizes that labelled axes of the output have, once atoms are gone."""
    return lambda editor: editor.resize(node, index, out, blocks)
