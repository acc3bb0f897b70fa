"""The state of an analysis: labels of values, bound initializers, patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.tensors import is_float
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.transforms.prune.atoms import Atoms, Block
from onnxcomp.passes.transforms.prune.observed_shapes import ObservedShapes
from onnxcomp.passes.transforms.prune.patch import Patch
from onnxcomp.passes.transforms.prune.reshape import carry, resize
from onnxcomp.passes.weight import Array

__all__ = ["CARRIED", "CONSUMED", "PRODUCED", "Member", "QkProduct", "Side", "Walk"]

# Roles of a bound axis of a weight.
PRODUCED = "out"  # its positions make channels
CONSUMED = "in"  # a product sums over its positions
CARRIED = "along"  # a bias, a scale, a table that goes along


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Member:
    """Axes of an initializer, or of a graph input, that hold atoms.

    Attributes:
        value: The initializer or input.
        axes: Its axes, ascending.
        atoms: One atom for each position, of the shape of these axes.
        role: "out", "in" or "along".
        node: The node that reads it; None for a graph input.
        input_index: Where the node reads it.
    """

    value: ir.Value
    axes: tuple[int, ...]
    atoms: Array
    role: str
    node: ir.Node | None
    input_index: int


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """One of two activations that are multiplied and summed over an axis.

    Attributes:
        name: Name of the value.
        axes: The axes of heads, then the one that is summed over.
        heads: Where the last axis holds the positions of several heads: how many; else 0.
        times: How often each head is read.
    """

    name: str
    axes: tuple[int, ...]
    heads: int = 0
    times: int = 1

    def vectors(self, array: Array) -> Array:
        """The vectors that are multiplied, float64 ``(heads, vectors, size)``."""
        axes, array = self.axes, np.asarray(array, np.float64)
        if self.heads:
            array = array.reshape(*array.shape[:-1], self.heads, -1)
            axes = (array.ndim - 2, array.ndim - 1)
        moved = np.moveaxis(array, axes, (*range(len(axes) - 1), array.ndim - 1))
        outer = int(np.prod(moved.shape[: len(axes) - 1]))
        return np.repeat(moved.reshape(outer, -1, moved.shape[-1]), self.times, axis=0)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QkProduct:
    """A product of two activations that sums over channels, as that of queries and keys.

    Attributes:
        node: The node.
        left: Its first factor.
        right: Its second factor.
        atoms: What is summed over, ``(..., size)``.
    """

    node: ir.Node
    left: Side
    right: Side
    atoms: Array

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values to observe."""
        return tuple(dict.fromkeys((self.left.name, self.right.name)))


class Walk:
    """Labels while the nodes are visited in order.

    Args:
        model: The canonical model.
        seen: Sizes of its values.
        freeze_inputs: Whether initializers that are listed as inputs may change.
        caches: Whether inputs that hold a cache may shrink.
    """

    def __init__(
        self,
        model: ir.Model,
        seen: ObservedShapes,
        *,
        freeze_inputs: bool = False,
        caches: bool = True,
    ) -> None:
        self.model = model
        self.seen = seen
        self.atoms = Atoms()
        self.members: list[Member] = []
        self.patches: list[Patch] = []
        self.qk_products: list[QkProduct] = []
        self.stuck: dict[str, str] = {}
        self.labels: dict[ir.Value, tuple[Block, ...]] = {}
        self.moved: list[tuple[ir.Value, Block]] = []
        self.claimed: set[tuple[ir.Node, int]] = set()
        self.caches: set[ir.Value] = set()
        self._freeze_inputs = freeze_inputs
        self._caches = caches

    # --- what is known about values ---

    def label(self, value: ir.Value | None) -> tuple[Block, ...]:
        """Blocks of atoms on the axes of a value."""
        return self.labels.get(value, ()) if value is not None else ()

    def put(self, value: ir.Value, blocks: Sequence[Block]) -> None:
        """Label a value; of axes on several together, rows and columns are remembered."""
        for block in blocks:
            if not block.axes:
                self.atoms.freeze(block.atoms, "it is the only one of its axis")
            if len(block.axes) > 1:
                self.atoms.rows(block.atoms)
        kept = tuple(block for block in blocks if block.axes)
        if kept:
            self.labels[value] = kept

    def shape(self, value: ir.Value | None) -> tuple[int, ...]:
        """Shape of a value in the first run."""
        name = value.name if value is not None else None
        return tuple(self.seen.shapes.get(name or "", ()))

    def is_fixed(self, value: ir.Value, axis: int) -> bool:
        """Whether the size of an axis is the same for all inputs."""
        fixed = self.seen.fixed.get(value.name or "", ())
        return axis < len(fixed) and fixed[axis]

    def integers(self, node: ir.Node, index: int, attribute: str = "") -> list[int] | None:
        """Integers given as an input, or as an attribute in older opsets; None if not steady."""
        if attribute and attribute in node.attributes:
            found = node.attributes[attribute]
            if found.type == ir.AttributeType.INT:
                return [int(found.as_int())]
            return [int(item) for item in found.as_ints()]
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None or value.name not in self.seen.steady:
            return None
        return [int(item) for item in np.ravel(self.seen.integers[value.name])]

    # --- relations ---

    def freeze(self, blocks: Sequence[Block], reason: str) -> None:
        """Keep all atoms of some blocks."""
        for block in blocks:
            self.atoms.freeze(block.atoms, reason)

    def axis_atoms(self, block: Block, axis: int) -> Array | None:
        """Atoms of one axis of a block: its own, its columns or its rows."""
        if block.axes == (axis,):
            return block.atoms
        if axis == block.axes[-1]:
            return self.atoms.columns(block.atoms)
        if len(block.axes) == 2 and axis == block.axes[0]:
            return self.atoms.rows(block.atoms)
        return None

    def bind(
        self, node: ir.Node, index: int, axes: Sequence[int], atoms: Array, role: str = CARRIED
    ) -> str | None:
        """Let axes of an input of a node hold atoms.

        Args:
            node: The reading node.
            index: Which input.
            axes: Axes of that input, ascending.
            atoms: Of the shape of these axes.
            role: What the axis is for.

        Returns:
            None, or the reason why the input cannot hold them.
        """
        value = node.inputs[index]
        assert value is not None
        self.claimed.add((node, index))
        reason = self._bind(value, tuple(axes), atoms, role, node, index)
        if reason is not None and role == PRODUCED and self._is_constant(value):
            self.stuck.setdefault(value.name or "", reason)
        return reason

    def _bind(
        self,
        value: ir.Value,
        axes: tuple[int, ...],
        atoms: Array,
        role: str,
        node: ir.Node,
        index: int,
    ) -> str | None:
        if value.is_initializer():
            return self._bind_initializer(value, axes, atoms, role, node, index)
        producer = value.producer()
        if producer is None or not is_default_domain(producer.domain) or self.label(value):
            return f"{value.name} is not a constant"
        mapped = self._through(producer, axes, atoms)
        if mapped is None:
            return f"{value.name} is computed by {producer.op_type}"
        self.claimed.add((producer, 0))
        self.moved.append((value, Block(axes, atoms)))
        source = producer.inputs[0]
        assert source is not None
        return self._bind(source, *mapped, role, node, index)

    def _bind_initializer(
        self,
        value: ir.Value,
        axes: tuple[int, ...],
        atoms: Array,
        role: str,
        node: ir.Node,
        index: int,
    ) -> str | None:
        tensor = value.const_value
        if value.is_graph_input() and not self._freeze_inputs:
            return f"{value.name} can be fed as an input (see --freeze-inputs)"
        if tensor is None or not is_float(tensor.dtype):
            return f"{value.name} is not a floating-point constant"
        if value.graph is not self.model.graph:
            return f"{value.name} belongs to a subgraph"
        self.members.append(Member(value, axes, atoms, role, node, index))
        return None

    def _through(
        self, node: ir.Node, axes: tuple[int, ...], atoms: Array
    ) -> tuple[tuple[int, ...], Array] | None:
        """Axes and atoms before a node that moves constants around."""
        source = node.inputs[0] if node.inputs else None
        if source is None or not self._is_constant(source):
            return None
        if node.op_type in ("Identity", "Cast"):
            return axes, atoms
        if node.op_type == "Transpose":
            rank = len(self.shape(source))
            perm = node.attributes.get_ints("perm", tuple(reversed(range(rank))))
            moved = [perm[axis] for axis in axes]
            order = np.argsort(moved)
            return tuple(sorted(moved)), atoms.transpose(order)
        if node.op_type == "Reshape":
            return self._before_reshape(source, node, axes, atoms)
        return None

    def _before_reshape(
        self, source: ir.Value, node: ir.Node, axes: tuple[int, ...], atoms: Array
    ) -> tuple[tuple[int, ...], Array] | None:
        out = node.outputs[0]
        block = carry(Block(axes, atoms), self.shape(out), self.shape(source))
        if isinstance(block, str):
            return None
        self.patches.append(resize(node, 1, out, (Block(axes, atoms),)))
        return block.axes, block.atoms

    def _is_constant(self, value: ir.Value) -> bool:
        while not value.is_initializer():
            producer = value.producer()
            ops = ("Identity", "Cast", "Transpose", "Reshape")
            if producer is None or producer.op_type not in ops or producer.inputs[0] is None:
                return False
            value = producer.inputs[0]
        return True

    def bind_or_gather(
        self, node: ir.Node, index: int, axes: Sequence[int], atoms: Array
    ) -> str | None:
        """`bind`, or pick the kept positions of a computed value where it is read.

        ``Mul(q, cos)`` becomes ``Mul(q, Gather(cos, kept))`` where `q` loses channels.
        """
        value = node.inputs[index]
        assert value is not None
        if self._is_constant(value):
            return self.bind(node, index, axes, atoms)
        if node.op_type == "Concat" and self.bind_cache(node, index, axes, atoms):
            return None
        if value.is_graph_input() and node.op_type == "Concat":
            return f"the input {value.name} keeps its shape"
        if len(axes) > 1:
            return f"{value.name} is computed"
        self.patches.append(lambda editor: editor.pick(node, index, axes[0], atoms))
        return None

    def bind_cache(self, node: ir.Node, index: int, axes: Sequence[int], atoms: Array) -> bool:
        """Let a graph input that only this node reads, such as a KV cache, hold atoms.

        The input's declared shape changes when atoms go.
        """
        value = node.inputs[index]
        if value is None or not value.is_graph_input() or value.is_initializer():
            return False
        if not self._caches:
            return False
        readers = {use.node for use in value.uses() if use.node.op_type != "Shape"}
        sizes = value.shape
        if readers != {node} or sizes is None or value.graph is not self.model.graph:
            return False
        if not all(isinstance(sizes[axis], int) for axis in axes):
            return False
        self.members.append(Member(value, tuple(axes), atoms, CARRIED, None, index))
        self.caches.update(out for out in node.outputs if out.is_graph_output())
        return True
