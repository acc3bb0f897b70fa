"""Products that sum over channels which may go: what they read, how their weight is laid out."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibrate import Patches, patches
from onnxcomp.passes.codecs.codec import Array
from onnxcomp.passes.prune.axes import Analysis
from onnxcomp.passes.prune.walk import CONSUMED, Member

__all__ = ["Consumer", "find_consumers"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Consumer:
    """A product ``y = W x`` whose inputs lose channels.

    Attributes:
        node: The product.
        weight: Its weight, an initializer.
        classes: For each channel of the input its class.
        turned: Whether the weight is stored as ``(length, rows)``.
        windows: Of a convolution, how it cuts its input.
        bias: The initializer that is added to the output, if there is one.
        addend: The value that is added to the output next, as a residual is; None without one.
    """

    node: ir.Node
    weight: ir.Value
    classes: Array
    turned: bool
    windows: Patches | None
    bias: ir.Value | None
    addend: ir.Value | None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.weight.name or ""

    @property
    def reads(self) -> str:
        """Name of the input."""
        value = self.node.inputs[0]
        assert value is not None
        return value.name or ""

    def matrix(self, array: Array) -> Array:
        """The stored weight as float64 ``(rows, length)``."""
        flat = array.T if self.turned else array.reshape(len(array), -1)
        return np.asarray(flat, np.float64)

    def stored(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """A matrix in the layout of the weight."""
        return np.ascontiguousarray(matrix.T if self.turned else matrix).reshape(shape)

    def vectors(self, array: Array) -> Array:
        """Input vectors ``(vectors, length)`` in a value of the input."""
        if self.windows is not None:
            return patches(array, self.windows)
        return np.asarray(array.reshape(-1, array.shape[-1]))

    def outputs(self, array: Array, count: int) -> Array | None:
        """Output vectors ``(vectors, rows)`` that go with `vectors`; None where not all are."""
        if self.windows is not None:
            array = np.moveaxis(array, 1, -1)
        flat = np.asarray(array.reshape(-1, array.shape[-1]))
        return flat if len(flat) == count else None

    def columns(self, gone: Array) -> Array:
        """Numbers of the columns that belong to classes that go, ``gone[class]``."""
        return np.flatnonzero(np.repeat(gone[self.classes], self.block))

    @property
    def block(self) -> int:
        """Columns of one channel."""
        return 1 if self.windows is None else int(np.prod(self.windows.kernel))


def find_consumers(analysis: Analysis) -> list[Consumer]:
    """All products whose inputs can be observed, in graph order."""
    order = {node: number for number, node in enumerate(analysis.model.graph)}
    own = [m for m in analysis.members if m.role == CONSUMED and m.node is not None]
    counts = {m.value: sum(other.value is m.value for other in own) for m in own}
    found = [_consumer(analysis, m, order) for m in own if counts[m.value] == 1]
    real = [consumer for consumer in found if consumer is not None]
    return sorted(real, key=lambda consumer: order[consumer.node])


def _consumer(analysis: Analysis, member: Member, order: dict[ir.Node, int]) -> Consumer | None:
    node = member.node
    assert node is not None
    direct = member.input_index == 1 and node.inputs[1] is member.value
    if not direct or len(member.axes) != 1 or len(member.value.uses()) != 1:
        return None
    classes = analysis.classes(member.atoms)
    windows, turned = None, False
    if node.op_type == "MatMul":
        turned = True
    elif node.op_type == "Gemm":
        plain = not node.attributes.get_int("transA", 0)
        ones = (
            node.attributes.get_float("alpha", 1.0) == 1.0 == node.attributes.get_float("beta", 1.0)
        )
        turned = not node.attributes.get_int("transB", 0)
        if not plain or not ones:
            return None
    elif node.op_type == "Conv":
        windows = _windows(analysis, node)
        if windows is None:
            return None
    else:
        return None
    bias, out = _bias(node)
    return Consumer(node, member.value, classes, turned, windows, bias, _addend(out, order, node))


def _windows(analysis: Analysis, node: ir.Node) -> Patches | None:
    """The windows of a convolution; None with groups or automatic pads."""
    attributes = node.attributes
    kernel = analysis.seen.shapes[node.inputs[1].name or ""][2:]  # type: ignore[union-attr]
    axes = len(kernel)
    automatic = attributes.get_string("auto_pad", "NOTSET")
    if attributes.get_int("group", 1) != 1 or automatic not in ("NOTSET", "VALID"):
        return None
    flat = tuple(attributes.get_ints("pads", (0,) * (2 * axes)))
    if automatic == "VALID":
        flat = (0,) * (2 * axes)
    return Patches(
        kernel,
        tuple(attributes.get_ints("strides", (1,) * axes)),
        tuple(attributes.get_ints("dilations", (1,) * axes)),
        tuple(zip(flat[:axes], flat[axes:], strict=True)),
    )


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
    if node.op_type in ("Gemm", "Conv"):
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
