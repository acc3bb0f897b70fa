"""What each operator means for atoms: those that move, cut and reduce axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.transforms.prune.reshape import carry, resize, touched
from onnxcomp.passes.transforms.prune.rules import Operand, merge, unknown
from onnxcomp.passes.transforms.prune.walk import Walk

__all__ = [
    "concat", "expand", "flatten", "gather", "pad", "pool", "reduce", "resample", "reshape",
    "shape", "slice_", "softmax", "split", "squeeze", "tile", "transpose", "unsqueeze",
]  # fmt: skip


def transpose(walk: Walk, node: ir.Node) -> None:
    """Transpose: blocks on other axes."""
    x = node.inputs[0]
    rank = len(walk.shape(x))
    perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
    place = {axis: perm.index(axis) for axis in range(rank)}
    walk.put(node.outputs[0], [_permuted(walk, block, place) for block in walk.label(x)])


def _permuted(walk: Walk, block: Block, place: dict[int, int]) -> Block:
    axes = [place[axis] for axis in block.axes]
    order = np.argsort(axes)
    if list(order) == list(range(len(axes))):
        return block.moved(axes)
    # What is inside becomes outside: removed positions must be whole rows and whole columns, so
    # that what is kept has one order only.
    if len(axes) > 2:
        walk.freeze([block], "three axes that belong together change their order")
    else:
        walk.atoms.columns(block.atoms)
        walk.atoms.columns(np.ascontiguousarray(block.atoms.T))
    return Block(tuple(sorted(axes)), np.ascontiguousarray(block.atoms.transpose(order)))


def reshape(walk: Walk, node: ir.Node) -> None:
    """Reshape: positions are split into, or joined from, several axes."""
    x, out = node.inputs[0], node.outputs[0]
    assert x is not None
    before, after = walk.shape(x), walk.shape(out)
    blocks: list[Block] = []
    for block in walk.label(x):
        found = carry(block, before, after)
        if isinstance(found, str) or not _steady(walk, x, block, before, after):
            walk.freeze([block], f"{node.op_type} joins it with an axis of free size")
        elif any(set(found.axes) & set(other.axes) for other in blocks):
            walk.freeze([block], f"{node.op_type} joins two sets of channels")
        else:
            blocks.append(found)
    walk.put(out, blocks)
    if blocks and node.op_type == "Reshape":
        walk.patches.append(resize(node, 1, out, blocks))


def _steady(
    walk: Walk, x: ir.Value, block: Block, before: tuple[int, ...], after: tuple[int, ...]
) -> bool:
    return all(walk.is_fixed(x, axis) for axis in touched(block, before, after)[0])


def flatten(walk: Walk, node: ir.Node) -> None:
    """Flatten is a reshape without sizes to patch."""
    reshape(walk, node)


def _axes(walk: Walk, node: ir.Node, rank: int) -> list[int] | None:
    found = walk.integers(node, 1, "axes")
    return None if found is None else [axis % rank for axis in found]


def squeeze(walk: Walk, node: ir.Node) -> None:
    """Squeeze: axes of size 1 are removed."""
    x = node.inputs[0]
    shape = walk.shape(x)
    given = len(node.inputs) > 1 or "axes" in node.attributes
    axes = _axes(walk, node, len(shape)) if given else [a for a, s in enumerate(shape) if s == 1]
    if axes is None:
        return unknown(walk, node)
    labels = walk.label(x)
    if any(axis in axes for block in labels for axis in block.axes):
        return unknown(walk, node)  # the only channel of a layer, which stays
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    blocks = [block.moved(kept.index(axis) for axis in block.axes) for block in labels]
    return walk.put(node.outputs[0], blocks)


def unsqueeze(walk: Walk, node: ir.Node) -> None:
    """Unsqueeze: axes of size 1 are added."""
    out = node.outputs[0]
    rank = len(walk.shape(out))
    axes = _axes(walk, node, rank)
    if axes is None:
        return unknown(walk, node)
    kept = [axis for axis in range(rank) if axis not in axes]
    blocks = [block.moved(kept[a] for a in block.axes) for block in walk.label(node.inputs[0])]
    return walk.put(out, blocks)


def expand(walk: Walk, node: ir.Node) -> None:
    """Expand: axes of size 1 are repeated; labelled ones are not among them."""
    x, out = node.inputs[0], node.outputs[0]
    shift = len(walk.shape(out)) - len(walk.shape(x))
    blocks = [block.moved(axis + shift for axis in block.axes) for block in walk.label(x)]
    walk.put(out, blocks)
    if blocks:
        walk.patches.append(resize(node, 1, out, blocks))


def tile(walk: Walk, node: ir.Node) -> None:
    """Repeats of axes without atoms."""
    repeats = walk.integers(node, 1)
    blocks = walk.label(node.inputs[0])
    bad = [b for b in blocks if repeats is None or any(repeats[axis] != 1 for axis in b.axes)]
    walk.freeze(bad, "Tile repeats it")
    walk.put(node.outputs[0], [block for block in blocks if block not in bad])


def concat(walk: Walk, node: ir.Node) -> None:
    """Along the channels: one after the other. Along another axis: channels are shared."""
    out = node.outputs[0]
    rank = len(walk.shape(out))
    axis = node.attributes.get_int("axis", 1) % rank
    labels = [walk.label(value) for value in node.inputs]
    if any(axis in block.axes for blocks in labels for block in blocks):
        return walk.put(out, _chained(walk, node, axis))
    operands = []
    for index, value in enumerate(node.inputs):
        dims = list(walk.shape(value))
        dims[axis] = 1
        operands.append(Operand(index, tuple(dims), labels[index], 0))
    blocks = merge(walk, node, operands)
    return walk.put(out, blocks)


def _chained(walk: Walk, node: ir.Node, axis: int) -> list[Block]:
    """Blocks one after the other; inputs without atoms get some that must stay."""
    joint = {
        block.axes for value in node.inputs for block in walk.label(value) if axis in block.axes
    }
    others = [b for v in node.inputs for b in walk.label(v) if axis not in b.axes]
    walk.freeze(others, "Concat joins values along another axis of theirs")
    axes = max(joint, key=len)
    if len(joint) > 1 or axes[-1] != axis:
        walk.freeze([b for v in node.inputs for b in walk.label(v)], "Concat mixes axes")
        return []
    parts = []
    for value in node.inputs:
        assert value is not None
        own = [block for block in walk.label(value) if axis in block.axes]
        if not own:
            own = [Block(axes, walk.atoms.new(*(walk.shape(value)[a] for a in axes)))]
            walk.freeze(own, f"{value.name} is joined with it")
        parts.append(own[0].atoms)
    if len(axes) > 1:
        for part in parts[1:]:
            walk.atoms.same(walk.atoms.rows(parts[0]), walk.atoms.rows(part))
    return [Block(axes, np.concatenate(parts, axis=-1))]


def split(walk: Walk, node: ir.Node) -> None:
    """Pieces of an axis; the sizes are written anew when the axis has channels."""
    x = node.inputs[0]
    axis = node.attributes.get_int("axis", 0) % max(1, len(walk.shape(x)))
    sizes = [walk.shape(value)[axis] for value in node.outputs]
    blocks = walk.label(x)
    cut = [block for block in blocks if axis in block.axes]
    if any(block.axes[-1] != axis for block in cut):
        walk.freeze(cut, "Split cuts the outer of two axes")
        cut = []
    start = 0
    for value, size in zip(node.outputs, sizes, strict=True):
        made = [b for b in blocks if axis not in b.axes]
        part = slice(start, start + size)
        made += [Block(b.axes, np.ascontiguousarray(b.atoms[..., part])) for b in cut]
        walk.put(value, made)
        start += size
    if cut:
        pieces = [walk.label(value) for value in node.outputs]
        walk.patches.append(lambda editor: editor.split(node, axis, pieces))


def slice_(walk: Walk, node: ir.Node) -> None:
    """A part of an axis; the bounds are written anew when the axis has channels."""
    x, out = node.inputs[0], node.outputs[0]
    bounds = _bounds(walk, node, x)
    blocks = walk.label(x)
    if bounds is None:
        walk.freeze(blocks, "Slice has bounds that depend on the input")
        return
    made = []
    for block in blocks:
        cut = [axis for axis in block.axes if axis in bounds]
        if not cut:
            made.append(block)
        elif cut != [block.axes[-1]] or bounds[cut[0]][2] != 1:
            walk.freeze([block], "Slice takes steps, or cuts the outer of two axes")
        else:
            made.append(_sliced(walk, node, block, bounds[cut[0]]))
    walk.put(out, made)


def _bounds(
    walk: Walk, node: ir.Node, x: ir.Value | None
) -> dict[int, tuple[int, int, int, int]] | None:
    """By axis: start, end, step and the place of the axis in the list of bounds."""
    shape = walk.shape(x)
    starts, ends = walk.integers(node, 1, "starts"), walk.integers(node, 2, "ends")
    count = len(starts or ends or ())
    given = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = walk.integers(node, 3, "axes") if given or "axes" in node.attributes else None
    listed = axes if axes is not None else list(range(count))
    stepped = len(node.inputs) > 4 and node.inputs[4] is not None
    steps = walk.integers(node, 4) if stepped else [1] * count
    if steps is None or (given and axes is None) or not listed:
        return None
    labelled = {axis for block in walk.label(x) for axis in block.axes}
    if starts is None or ends is None:
        # Bounds of other axes may depend on the input.
        return None if {axis % len(shape) for axis in listed} & labelled else {}
    found = {}
    for place, (axis, first, last, step) in enumerate(
        zip(listed, starts, ends, steps, strict=True)
    ):
        low, high, stride = slice(first, last, step).indices(shape[axis])
        if (low, high, stride) != (0, shape[axis], 1):
            found[axis % len(shape)] = (low, max(low, high), stride, place)
    return found


def _sliced(walk: Walk, node: ir.Node, block: Block, bounds: tuple[int, int, int, int]) -> Block:
    start, end, _, place = bounds
    parts = block.atoms[..., :start], block.atoms[..., start:end], block.atoms[..., end:]
    if block.atoms.ndim > 1:
        for part in parts:
            if part.size:
                walk.atoms.rows(np.ascontiguousarray(part))
    before, inside = Block(block.axes, parts[0]), Block(block.axes, np.ascontiguousarray(parts[1]))
    walk.patches.append(lambda editor: editor.slice(node, place, before, inside))
    return inside


def gather(walk: Walk, node: ir.Node) -> None:
    """Channels in another order, one row of two axes, or any entries of another axis."""
    x, indices, out = node.inputs[0], node.inputs[1], node.outputs[0]
    shape = walk.shape(x)
    axis = node.attributes.get_int("axis", 0) % max(1, len(shape))
    shift = len(walk.shape(indices)) - 1
    wanted = walk.integers(node, 1)
    made = []
    if walk.label(indices):
        return unknown(walk, node)
    for block in walk.label(x):
        axes = tuple(a + shift if a > axis else a for a in block.axes)
        if axis not in block.axes:
            made.append(block.moved(axes))
        elif wanted is None:
            walk.freeze([block], "Gather picks channels that depend on the input")
        else:
            made += _picked(walk, node, block, axis, np.array(wanted), shift)
    return walk.put(out, made)


def _picked(
    walk: Walk, node: ir.Node, block: Block, axis: int, wanted: np.ndarray, shift: int
) -> list[Block]:
    place = block.axes.index(axis)
    if len(block.axes) == 1 and shift == 0:
        walk.patches.append(lambda editor: editor.reorder(node, 1, block, wanted))
        return [Block(block.axes, block.atoms[wanted])]
    if len(block.axes) == 2 and place == 0 and shift == -1:
        walk.atoms.freeze(walk.atoms.rows(block.atoms), "Gather picks a row by its number")
        return [Block((block.axes[1] - 1,), block.atoms[int(wanted[0])])]
    walk.freeze([block], "Gather picks channels by their numbers")
    return []


def pad(walk: Walk, node: ir.Node) -> None:
    """Zeros around an axis; channels of zeros count as channels."""
    x, out = node.inputs[0], node.outputs[0]
    rank = len(walk.shape(x))
    listed = len(node.inputs) > 3 and node.inputs[3] is not None
    pads = walk.integers(node, 1, "pads" if "pads" in node.attributes else "paddings")
    blocks = walk.label(x)
    constant = node.attributes.get_string("mode", "constant") == "constant"
    made = []
    for block in blocks:
        axis = block.axes[-1]
        if (
            pads is not None
            and not listed
            and not any(pads[a] or pads[a + rank] for a in block.axes)
        ):
            made.append(block)
        elif pads is None or listed or len(block.axes) > 1 or not constant:
            walk.freeze([block], "Pad adds channels")
        else:
            sides = walk.atoms.new(pads[axis]), walk.atoms.new(pads[axis + rank])
            made.append(Block(block.axes, np.concatenate([sides[0], block.atoms, sides[1]])))
            _patch_pad(walk, node, axis, rank, sides)
    walk.put(out, made)


def _patch_pad(
    walk: Walk, node: ir.Node, axis: int, rank: int, sides: tuple[np.ndarray, np.ndarray]
) -> None:
    walk.patches.append(lambda editor: editor.pad(node, axis, rank, sides))


def reduce(walk: Walk, node: ir.Node) -> None:
    """Sums and means over axes without channels."""
    x = node.inputs[0]
    rank = len(walk.shape(x))
    named = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    axes = _axes(walk, node, rank) if named else list(range(rank))
    if "axis" in node.attributes:  # ArgMax and ArgMin
        axes = [node.attributes.get_int("axis", 0) % rank]
    if axes is None:
        return unknown(walk, node)
    dropped = axes if not node.attributes.get_int("keepdims", 1) else []
    left = [axis for axis in range(rank) if axis not in dropped]
    blocks = []
    for block in walk.label(x):
        if set(block.axes) & set(axes):
            walk.freeze([block], f"{node.op_type} mixes its channels")
        else:
            blocks.append(block.moved(left.index(axis) for axis in block.axes))
    return walk.put(node.outputs[0], blocks)


def pool(walk: Walk, node: ir.Node) -> None:
    """Pooling and other operators that work on positions, not channels."""
    blocks = walk.label(node.inputs[0])
    bad = [block for block in blocks if block.axes not in ((0,), (1,), (0, 1))]
    walk.freeze(bad, f"{node.op_type} works along one of its axes")
    for value in node.outputs:
        walk.put(value, [block for block in blocks if block not in bad])


def resample(walk: Walk, node: ir.Node) -> None:
    """Resize and Upsample, where channels keep their number."""
    x, out = node.inputs[0], node.outputs[0]
    before, after = walk.shape(x), walk.shape(out)
    blocks = walk.label(x)
    bad = [b for b in blocks if any(before[a] != after[a] for a in b.axes)]
    if "roi" in node.attributes or "axes" in node.attributes:
        bad = list(blocks)
    walk.freeze(bad, f"{node.op_type} works along one of its axes")
    made = [block for block in blocks if block not in bad]
    walk.put(out, made)
    if made and len(node.inputs) > 3 and node.inputs[3] is not None:
        walk.patches.append(resize(node, 3, out, made))


def softmax(walk: Walk, node: ir.Node) -> None:
    """Softmax and norms along axes without channels."""
    x = node.inputs[0]
    rank = len(walk.shape(x))
    old = (walk.model.opset_imports.get("", 0) or 0) < 13
    first = node.attributes.get_int("axis", 1 if old and "oftmax" in node.op_type else -1) % rank
    flat = node.op_type in ("LayerNormalization", "RMSNormalization") or old
    axes = range(first, rank) if flat else [first]
    blocks = walk.label(x)
    bad = [block for block in blocks if set(block.axes) & set(axes)]
    walk.freeze(bad, f"{node.op_type} mixes its channels")
    for value in node.outputs[:1]:
        walk.put(value, [block for block in blocks if block not in bad])


def shape(walk: Walk, node: ir.Node) -> None:
    """What reads a shape sees the sizes of the original model; see `Rewriter.shape`."""
    blocks = walk.label(node.inputs[0])
    if blocks:
        walk.patches.append(lambda editor: editor.shape(node, blocks))
