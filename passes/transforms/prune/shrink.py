"""Take channels out of a model: smaller initializers, and sizes written anew.

Where a shape is computed, the nodes that compute it keep their meaning: `Shape` of a value that
lost channels returns the sizes of the original model, and the sizes that operators such as Reshape
and Slice need are written at their place. So scales computed from a head's size stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.tensors import MappedTensor, shape_of
from onnxcomp.passes.ir.traversal import Names, new_initializer, remove_dead
from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.patch import Heads
from onnxcomp.passes.weight import Array

__all__ = ["Shrinker", "kept_shape", "remove", "take"]


def remove(analysis: Analysis, classes: Collection[int]) -> int:
    """Remove classes of atoms from the analysed model, in place.

    Visits the main graph: subgraphs read nothing that can shrink.

    Returns:
        Number of initializers that became smaller.

    Raises:
        ModelError: What is left would not be rectangular.
    """
    shrinker = Shrinker(analysis, classes)
    for patch in analysis.patches:
        patch(shrinker)
    count = shrinker.members()
    shrinker.forget_shapes()
    return count


def kept_shape(kept: Array) -> tuple[int, ...]:
    """Shape of what is kept of a block ``kept (...)`` of booleans.

    Raises:
        ModelError: It is not rectangular.
    """
    if kept.ndim == 1:
        return (int(kept.sum()),)
    counts = kept.sum(axis=-1)
    inner = np.unique(counts[counts > 0])
    if len(inner) > 1:
        raise ModelError(f"heads would keep {inner.tolist()} positions: they must be equal")
    return (*kept_shape(counts > 0), int(inner[0]) if len(inner) else 0)


def take(array: Array, axes: Sequence[int], kept: Array) -> Array:
    """An array without the positions of some axes that go."""
    axes = tuple(axes)
    moved = np.moveaxis(array, axes, range(len(axes)))
    picked = moved.reshape(kept.size, *moved.shape[len(axes) :])[kept.ravel()]
    shaped = picked.reshape(*kept_shape(kept), *moved.shape[len(axes) :])
    return np.ascontiguousarray(np.moveaxis(shaped, range(len(axes)), axes))


class Shrinker:
    """Edits of a model while it loses classes of atoms.

    Args:
        analysis: Of the model to be changed.
        classes: What goes.
    """

    def __init__(self, analysis: Analysis, classes: Collection[int]) -> None:
        self._analysis = analysis
        self._model = analysis.model
        self._names = Names(analysis.model)
        gone = np.zeros(int(analysis.relations.classes.max(initial=-1)) + 1, bool)
        gone[list(classes)] = True
        self._gone = gone[analysis.relations.classes]
        self._made: dict[tuple[str, bytes], ir.Value] = {}

    def kept(self, atoms: Array) -> Array:
        """Which atoms stay, as booleans."""
        return np.asarray(~self._gone[atoms])

    def _changed(self, atoms: Array) -> bool:
        return bool(self._gone[atoms].any())

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        """A small int64 initializer; equal ones are stored once."""
        array = np.array(values, np.int64)
        key = (str(array.shape), array.tobytes())
        if key not in self._made:
            self._made[key] = new_initializer(self._model, self._names.value(name), array)
        return self._made[key]

    def _insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        *,
        after: bool = False,
        **attributes: int,
    ) -> ir.Value:
        """A node before or after another one."""
        made = ir.node(op_type, list(inputs), attributes=dict(attributes))
        made.name = self._names.node(f"{node.name}/{op_type}")
        made.outputs[0].name = self._names.value(f"{node.name}/{op_type}_output")
        graph = self._model.graph
        (graph.insert_after if after else graph.insert_before)(node, made)
        return made.outputs[0]

    def _override(
        self, node: ir.Node, value: ir.Value, changes: dict[int, int], *, after: bool = False
    ) -> ir.Value:
        """A vector with some entries replaced."""
        old = self._analysis.seen.integers.get(value.name or "")
        length = self._analysis.seen.shapes[value.name or ""][0]
        wanted = [changes.get(place, 0) for place in range(length)]
        if value.is_initializer() or _is_constant(value):
            assert old is not None
            return self.constant(
                f"{node.name}/sizes", [changes.get(i, int(x)) for i, x in enumerate(old)]
            )
        array = np.array([place in changes for place in range(length)])
        mask = new_initializer(self._model, self._names.value(f"{node.name}/changed"), array)
        new = self.constant(f"{node.name}/sizes", wanted)
        return self._insert(node, "Where", [mask, new, value], after=after)

    # --- patches, called by the rules ---

    def resize(self, node: ir.Node, index: int, out: ir.Value, blocks: Sequence[Block]) -> None:
        """Write the sizes of labelled axes of the output into a shape input."""
        changes: dict[int, int] = {}
        value = node.inputs[index] if index < len(node.inputs) else None
        rank = len(self._analysis.seen.shapes[out.name or ""])
        for block in blocks:
            if self._changed(block.atoms):
                sizes = kept_shape(self.kept(block.atoms))
                changes.update(zip(block.axes, sizes, strict=True))
        if not changes:
            return
        if value is None:
            self._resize_attribute(node, changes)
            return
        length = self._analysis.seen.shapes[value.name or ""][0]
        old = self._analysis.seen.integers.get(value.name or "")
        moved = {axis - (rank - length): size for axis, size in changes.items()}
        # An entry of 1 in Expand repeats nothing, and -1 is worked out by the operator.
        keep = (-1,) if node.op_type == "Reshape" else (1,) if node.op_type == "Expand" else ()
        moved = {
            place: size
            for place, size in moved.items()
            if place >= 0 and (old is None or int(old[place]) not in keep)
        }
        if moved:
            node.replace_input_with(index, self._override(node, value, moved))

    def _resize_attribute(self, node: ir.Node, changes: dict[int, int]) -> None:
        shape = list(node.attributes.get_ints("shape", ()))
        for axis, size in changes.items():
            if shape[axis] != -1:
                shape[axis] = size
        node.attributes["shape"] = ir.AttrInt64s("shape", shape)

    def pick(self, node: ir.Node, index: int, axis: int, atoms: Array) -> None:
        """Read only the kept positions of a computed value."""
        value = node.inputs[index]
        if value is None or not self._changed(atoms):
            return
        wanted = self.constant("kept", np.flatnonzero(self.kept(atoms)).tolist())
        node.replace_input_with(index, self._insert(node, "Gather", [value, wanted], axis=axis))

    def group(self, node: ir.Node, grouped: Array) -> None:
        """Groups of a convolution: those of which anything is kept."""
        if self._changed(grouped):
            groups = kept_shape(self.kept(grouped))[0]
            node.attributes["group"] = ir.AttrInt64("group", groups)

    def split(self, node: ir.Node, axis: int, pieces: Sequence[Sequence[Block]]) -> None:
        """Sizes of the pieces of a Split."""
        own = [next(b for b in blocks if axis in b.axes) for blocks in pieces]
        if not any(self._changed(block.atoms) for block in own):
            return
        sizes = [kept_shape(self.kept(block.atoms))[-1] for block in own]
        node.attributes.pop("num_outputs", None)
        if "split" in node.attributes or (self._model.opset_imports.get("", 13) or 13) < 13:
            node.attributes["split"] = ir.AttrInt64s("split", sizes)
            return
        node.resize_inputs(2)
        node.replace_input_with(1, self.constant(f"{node.name}/split", sizes))

    def slice(self, node: ir.Node, place: int, before: Block, inside: Block) -> None:
        """Bounds of a Slice of channels."""
        if not self._changed(before.atoms) and not self._changed(inside.atoms):
            return
        start = kept_shape(self.kept(before.atoms))[-1] if before.atoms.size else 0
        end = start + kept_shape(self.kept(inside.atoms))[-1]
        for name, index, bound in (("starts", 1, start), ("ends", 2, end)):
            if name in node.attributes:
                found = list(node.attributes.get_ints(name, ()))
                found[place] = bound
                node.attributes[name] = ir.AttrInt64s(name, found)
            else:
                value = node.inputs[index]
                assert value is not None
                node.replace_input_with(index, self._override(node, value, {place: bound}))

    def reorder(self, node: ir.Node, index: int, block: Block, wanted: Array) -> None:
        """Numbers of channels that a Gather picks."""
        if not self._changed(block.atoms):
            return
        kept = self.kept(block.atoms)
        place = np.cumsum(kept) - 1
        wanted = np.where(wanted < 0, wanted + len(kept), wanted)
        new = place[wanted[kept[wanted]]]
        node.replace_input_with(index, self.constant(f"{node.name}/indices", new.tolist()))

    def pad(self, node: ir.Node, axis: int, rank: int, sides: tuple[Array, Array]) -> None:
        """Channels of zeros that a Pad adds."""
        if not self._changed(np.concatenate(sides)):
            return
        changes = {
            axis: int(self.kept(sides[0]).sum()),
            axis + rank: int(self.kept(sides[1]).sum()),
        }
        for name in ("pads", "paddings"):
            if name in node.attributes:
                old = node.attributes.get_ints(name, ())
                new = [changes.get(place, size) for place, size in enumerate(old)]
                node.attributes[name] = ir.AttrInt64s(name, new)
                return
        value = node.inputs[1]
        assert value is not None
        node.replace_input_with(1, self._override(node, value, changes))

    def shape(self, node: ir.Node, blocks: Sequence[Block]) -> None:
        """Let `Shape` return the sizes of the original model."""
        changed = [block for block in blocks if self._changed(block.atoms)]
        out = node.outputs[0]
        if not changed or out.name is None:
            return
        sizes = self._analysis.seen.shapes[node.inputs[0].name or ""]  # type: ignore[union-attr]
        start = node.attributes.get_int("start", 0) % (len(sizes) + 1)
        old = {
            axis - start: sizes[axis]
            for block in changed
            for axis in block.axes
            if 0 <= axis - start < self._analysis.seen.shapes[out.name][0]
        }
        readers = [(use.node, use.idx) for use in out.uses()]
        if not old or not any(_reads(reader, set(old)) for reader, _ in readers):
            return
        new = self._override(node, out, old, after=True)
        for reader, index in readers:
            reader.replace_input_with(index, new)

    def attention(self, node: ir.Node, heads: Heads) -> None:
        """Numbers and sizes of heads, and the scale that goes with the original size."""
        if not any(self._changed(part) for part in (heads.query, heads.key, heads.value)):
            return
        parts = (heads.query, heads.key, heads.value)
        query, key, value = (kept_shape(self.kept(part)) for part in parts)
        counts = {"num_heads": query[0], "q_num_heads": query[0], "kv_num_heads": key[0]}
        for name, count in counts.items():
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, count)
        if query[1] != heads.query.shape[1] and not node.attributes.get_float("scale", 0.0):
            node.attributes["scale"] = ir.AttrFloat32("scale", 1 / math.sqrt(heads.query.shape[1]))
        packed = node.domain == "com.microsoft" and node.op_type == "Attention"
        sizes = [math.prod(query), math.prod(key), math.prod(value)]
        if packed and ("qkv_hidden_sizes" in node.attributes or len(set(sizes)) > 1):
            node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", sizes)

    # --- initializers and shapes ---

    def members(self) -> int:
        """Take atoms out of initializers and out of declared inputs; number of both."""
        by_value: dict[ir.Value, dict[tuple[int, ...], Array]] = {}
        for member in self._analysis.members:
            by_value.setdefault(member.value, {})[member.axes] = member.atoms
        count = 0
        for value, axes in by_value.items():
            changed = {a: atoms for a, atoms in axes.items() if self._changed(atoms)}
            if changed:
                count += 1
                self._shrink(value, changed)
        return count

    def _shrink(self, value: ir.Value, axes: dict[tuple[int, ...], Array]) -> None:
        tensor = value.const_value
        if tensor is not None:
            taken = [(own, self.kept(atoms)) for own, atoms in axes.items()]
            value.const_value = _taken(tensor, taken)
            value.shape = ir.Shape(shape_of(value.const_value))
            return
        assert value.shape is not None
        dims = list(value.shape)
        for own, atoms in axes.items():
            for axis, size in zip(own, kept_shape(self.kept(atoms)), strict=True):
                dims[axis] = size
        value.shape = ir.Shape(dims)

    def forget_shapes(self) -> None:
        """Correct the declared shapes of values that lost channels; drop what nobody reads."""
        labelled = [(v, block) for v, blocks in self._analysis.labels.items() for block in blocks]
        for value, block in [*labelled, *self._analysis.moved]:
            if value.shape is None or not self._changed(block.atoms):
                continue
            sizes = kept_shape(self.kept(block.atoms))
            dims = list(value.shape)
            for axis, size in zip(block.axes, sizes, strict=True):
                dims[axis] = size
            value.shape = ir.Shape(dims)
        remove_dead(reversed(list(self._model.graph)))


def _taken(
    tensor: ir.TensorProtocol, taken: Sequence[tuple[tuple[int, ...], Array]]
) -> ir.TensorProtocol:
    """A tensor without some positions: read from its file each time where it lies in one."""

    def made() -> ir.TensorProtocol:
        array = tensor.numpy()
        for axes, kept in taken:
            array = take(array, axes, kept)
        return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)

    if not isinstance(tensor, MappedTensor):
        return made()
    shape = list(shape_of(tensor))
    for axes, kept in taken:
        for axis, size in zip(axes, kept_shape(kept), strict=True):
            shape[axis] = size
    return ir.LazyTensor(made, tensor.dtype, ir.Shape(shape), cache=False, name=tensor.name)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _reads(node: ir.Node, places: set[int]) -> bool:
    """Whether a reader of a shape reads any of some entries."""
    if node.op_type == "Gather":
        indices = node.inputs[1]
        array = ir.convenience.get_const_tensor(indices) if indices is not None else None
        if array is not None:
            return bool(
                places & {int(i) for i in np.ravel(array.numpy())} or (array.numpy() < 0).any()
            )
    return True
