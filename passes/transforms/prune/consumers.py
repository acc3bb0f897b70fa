"""Products that sum over channels which may go: what they read, how their weight is laid out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.im2col import Patches, patches, windows
from onnxcomp.passes.transforms.prune.axes import Analysis
from onnxcomp.passes.transforms.prune.walk import CONSUMED, Member
from onnxcomp.passes.weight import Array

__all__ = ["Consumer", "find_consumers", "handed_on"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """A product ``y = W x`` whose inputs lose channels.

    A convolution in groups is one product for each group. A transposed convolution is a product at
    each position of its input, whose outputs, ``(channels * window,)``, are added up where they
    overlap.

    Attributes:
        node: The product.
        weight: Its weight, an initializer.
        classes: For each channel of the input its class.
        turned: Whether the weight is stored as ``(length, rows)``.
        cut: Of a convolution, how it cuts its input.
        bias: The initializer that is added to the output, if there is one.
        addend: The value that is added to the output next, as a residual is; None without one.
        group: Which of the groups of a convolution it is.
        groups: How many there are.
    """

    node: ir.Node
    weight: ir.Value
    classes: Array
    turned: bool
    cut: Patches | None
    bias: ir.Value | None
    addend: ir.Value | None
    group: int = 0
    groups: int = 1

    @property
    def name(self) -> str:
        """Name of the weight, with the number of the group where there are several."""
        name = self.weight.name or ""
        return name if self.groups == 1 else f"{name}[{self.group}]"

    @property
    def reads(self) -> str:
        """Name of the input."""
        value = self.node.inputs[0]
        assert value is not None
        return value.name or ""

    @property
    def makes(self) -> ir.Value:
        """Its output, with the bias and what is added to it next."""
        out = self.node.outputs[0]
        behind = [self.bias is not None and self.bias not in self.node.inputs]
        behind.append(self.addend is not None and self.node.op_type != "FusedConv")
        for _ in range(sum(behind)):
            out = next(use.node for use in out.uses()).outputs[0]
        return out

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the values to observe."""
        added = () if self.addend is None else (self.addend.name or "",)
        return tuple(dict.fromkeys((self.reads, *added)))

    @property
    def _part(self) -> slice:
        """Which outputs are its own: of a weight ``(out, ...)``, of a bias, of outputs."""
        assert self.weight.const_value is not None
        size = int(self.weight.const_value.shape[0]) // self.groups  # type: ignore[arg-type]
        whole = self.groups == 1
        return slice(None) if whole else slice(self.group * size, (self.group + 1) * size)

    def matrix(self, array: Array) -> Array:
        """The stored weight as float64 ``(rows, length)``."""
        return np.asarray(self.view(array), np.float64)

    def view(self, array: Array) -> Array:
        """The stored weight as ``(rows, length)``, in its own type and place."""
        flat = array.reshape(len(array), -1)
        return flat.T if self.turned else flat[self._part]

    def stored(self, array: Array, matrix: Array) -> Array:
        """The stored weight with another matrix in the place of its own."""
        result = np.array(array)
        own = matrix.T if self.turned else matrix
        part = result[self._part]
        part[...] = own.reshape(part.shape)
        return result

    def offsets(self, array: Array) -> Array:
        """The stored bias as float64 ``(rows,)``."""
        return np.asarray(array[self._part], np.float64)

    def stored_offsets(self, array: Array, offsets: Array) -> Array:
        """The stored bias with other numbers in the place of its own."""
        result = np.array(array)
        result[self._part] = offsets
        return result

    def vectors(self, array: Array) -> Array:
        """Input vectors ``(vectors, length)`` in a value of the input."""
        if self.cut is None:
            return np.asarray(array.reshape(-1, array.shape[-1]))
        size = array.shape[1] // self.groups
        return patches(array[:, self.group * size : (self.group + 1) * size], self.cut)

    def outputs(self, array: Array, count: int) -> Array | None:
        """Output vectors ``(vectors, rows)`` that go with `vectors`; None where not all are."""
        if self.cut is not None:
            array = np.moveaxis(array, 1, -1)
        flat = np.asarray(array.reshape(-1, array.shape[-1]))
        return flat[:, self._part] if len(flat) == count else None

    def columns(self, gone: Array) -> Array:
        """Numbers of the columns that belong to classes that go, ``gone[class]``."""
        return np.flatnonzero(np.repeat(gone[self.classes], self.block))

    @property
    def block(self) -> int:
        """Columns of one channel."""
        return 1 if self.cut is None else int(np.prod(self.cut.kernel))


def find_consumers(analysis: Analysis) -> list[Consumer]:
    """All products whose inputs can be observed, in graph order."""
    order = {node: number for number, node in enumerate(analysis.model.graph)}
    own = [m for m in analysis.members if m.role == CONSUMED and m.node is not None]
    counts = {m.value: sum(other.value is m.value for other in own) for m in own}
    found = [c for m in own if counts[m.value] == 1 for c in _consumers(analysis, m, order)]
    return sorted(found, key=lambda consumer: order[consumer.node])


def handed_on(
    analysis: Analysis, consumers: Sequence[Consumer], gone: Array
) -> dict[str, list[tuple[int, Array]]]:
    """What products that lose columns make, by name: which positions of it stay, by axis."""
    found: dict[str, list[tuple[int, Array]]] = {}
    for consumer in consumers:
        value = consumer.makes
        kept = [
            (block.axes, ~gone[analysis.classes(block.atoms)])
            for block in analysis.labels.get(value, ())
        ]
        lost = [(axes, stays) for axes, stays in kept if not stays.all()]
        simple = all(len(axes) == 1 for axes, _ in lost)
        if len(consumer.columns(gone)) and simple and not value.is_graph_output():
            found[value.name or ""] = [(axes[0], np.flatnonzero(stays)) for axes, stays in lost]
    return found


def _consumers(analysis: Analysis, member: Member, order: dict[ir.Node, int]) -> list[Consumer]:
    node = member.node
    assert node is not None
    direct = member.input_index == 1 and node.inputs[1] is member.value
    if not direct or len(member.axes) != 1 or len(member.value.uses()) != 1:
        return []
    classes = analysis.classes(member.atoms)
    if node.op_type in ("Conv", "FusedConv"):
        return _convolution(analysis, node, member.value, classes, order)
    if node.op_type == "ConvTranspose":
        cut = Patches.points(len(analysis.seen.shapes[member.value.name or ""]) - 2)
        return [Consumer(node, member.value, classes, True, cut, None, None)]
    turned = node.op_type == "MatMul"
    if node.op_type == "Gemm":
        plain = not node.attributes.get_int("transA", 0)
        ones = (
            node.attributes.get_float("alpha", 1.0) == 1.0 == node.attributes.get_float("beta", 1.0)
        )
        turned = not node.attributes.get_int("transB", 0)
        if not plain or not ones:
            return []
    elif node.op_type != "MatMul":
        return []
    bias, out = _bias(node)
    return [Consumer(node, member.value, classes, turned, None, bias, _addend(out, order, node))]


def _convolution(
    analysis: Analysis,
    node: ir.Node,
    weight: ir.Value,
    classes: Array,
    order: dict[ir.Node, int],
) -> list[Consumer]:
    """One product for each group of a convolution."""
    cut = windows(node, analysis.seen.shapes[weight.name or ""][2:])
    if cut is None:
        return []
    groups = node.attributes.get_int("group", 1)
    bias, out = _bias(node)
    addend = _addend(out, order, node)
    if node.op_type == "FusedConv":  # what it adds comes before its activation
        addend = node.inputs[3] if len(node.inputs) > 3 else None
        addend = None if addend is None or addend.producer() is None else addend
    return [
        Consumer(node, weight, classes, False, cut, bias, addend, group, groups)
        for group in range(groups)
    ]


def _is_private(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and len(value.uses()) == 1
    )


def _bias(node: ir.Node) -> tuple[ir.Value | None, ir.Value]:
    """The bias of a product and the value with the bias in it."""
    out = node.outputs[0]
    if node.op_type in ("Gemm", "Conv", "FusedConv"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        return (bias if _is_private(bias) else None), out
    uses = tuple(out.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and _is_private(other) and len(other.shape or ()) == 1:
            return other, uses[0].node.outputs[0]
    return None, out


def _addend(out: ir.Value, order: dict[ir.Node, int], node: ir.Node) -> ir.Value | None:
    """What is added to an output that nothing else reads, if it is known before the product."""
    uses = tuple(out.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or out.is_graph_output():
        return None
    other = uses[0].node.inputs[1 - uses[0].idx]
    producer = other.producer() if other is not None else None
    known = producer is not None and order.get(producer, len(order)) < order[node]
    return other if known else None
