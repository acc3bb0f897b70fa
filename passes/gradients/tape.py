"""Nodes that are added behind a model to compute gradients.

Gradients are values of the same graph, so ONNX Runtime folds, fuses and frees them like all others.
Sizes are read while the model runs: nothing here needs to know a static shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.traversal import Names, default_opset, new_initializer
from onnxcomp.passes.lowering.builder import attribute
from onnxcomp.passes.weight import Array, Attribute

__all__ = ["Step", "Tape"]

# From this version on reductions, Squeeze and Unsqueeze take their axes as an input.
LEAST_OPSET = 13

_REDUCTIONS_BY_INPUT = 18
_MICROSOFT = "com.microsoft"


class Tape:
    """Adds nodes at the end of a model's main graph.

    Args:
        model: The model, which is changed.

    Raises:
        ModelError: The model's opset is older than 13.

    Attributes:
        opset: Version of the standard operators.
    """

    def __init__(self, model: ir.Model) -> None:
        self.opset = default_opset(model) or 0
        if self.opset < LEAST_OPSET:
            raise ModelError(
                f"gradients need opset {LEAST_OPSET} or newer, the model has {self.opset}",
                hint="convert the model to a newer opset",
            )
        self._model = model
        self._names = Names(model)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> ir.Value:
        """Add a node with one output and return the output."""
        return self.nodes(op_type, inputs, attributes, domain=domain)[0]

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Add a node and return its outputs."""
        name = self._names.node(f"gradient/{op_type}")
        made = [attribute(key, value) for key, value in (attributes or {}).items()]
        node = ir.Node(domain, op_type, inputs, made, name=name, num_outputs=outputs)
        for output in node.outputs:
            output.name = self._names.value(name)
        if domain:
            self._model.graph.opset_imports.setdefault(domain, 1)
        self._model.graph.append(node)
        return node.outputs

    def constant(self, content: Array) -> ir.Value:
        """An initializer, made once for equal contents."""
        array = np.asarray(content)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._names.value("gradient/constant")
            self._constants[key] = new_initializer(self._model, name, array)
        return self._constants[key]

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> ir.Value:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a + b``."""
        return self.node("Add", [a, b])

    def subtract(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a - b``."""
        return self.node("Sub", [a, b])

    def multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a * b``."""
        return self.node("Mul", [a, b])

    def divide(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """``a / b``."""
        return self.node("Div", [a, b])

    def product(
        self, a: ir.Value, b: ir.Value, *, left: bool = False, right: bool = False
    ) -> ir.Value:
        """``a @ b``, with the last two axes of `a` (left) or `b` (right) exchanged."""
        turned: dict[str, Attribute] = {"transA": int(left), "transB": int(right)}
        return self.node("FusedMatMul", [a, b], turned, domain=_MICROSOFT)

    def shape(self, x: ir.Value) -> ir.Value:
        """Sizes, int64."""
        return self.node("Shape", [x])

    def zeros(self, shape: ir.Value) -> ir.Value:
        """Float32 zeros of a shape."""
        return self.node("Expand", [self.number(0.0), shape])

    def reshape(self, x: ir.Value, shape: ir.Value) -> ir.Value:
        """The same elements in another shape, in which 0 is a size."""
        return self.node("Reshape", [x, shape], {"allowzero": 1} if self.opset >= 14 else None)

    def sum(self, x: ir.Value, axes: ir.Value) -> ir.Value:
        """Sum over axes, which stay with size 1; over no axes it is `x`."""
        return self.node("ReduceSum", [x, axes], {"keepdims": 1, "noop_with_empty_axes": 1})

    def mean(self, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Mean over some axes, which stay with size 1."""
        if self.opset >= _REDUCTIONS_BY_INPUT:
            return self.node("ReduceMean", [x, self.integers(*axes)], {"keepdims": 1})
        return self.node("ReduceMean", [x], {"axes": tuple(axes), "keepdims": 1})

    def gated(self, gradient: ir.Value, passes: ir.Value) -> ir.Value:
        """The gradient where a condition holds, else 0."""
        return self.node("Where", [passes, gradient, self.number(0.0)])

    def like(self, gradient: ir.Value, x: ir.Value) -> ir.Value:
        """Sum the gradient of a value over the axes along which `x` was repeated to make it."""
        if gradient is x or _same_static_shape(gradient, x):
            return gradient
        wanted, given = self.shape(x), self.shape(gradient)
        missing = self.node("Sub", [self.shape(given), self.shape(wanted)])
        one = self.integers(1)
        ones = self.node("Expand", [one, missing])
        aligned = self.node("Concat", [ones, wanted], {"axis": 0})
        repeated = self.node("Not", [self.node("Equal", [aligned, given])])
        axes = self.node("Reshape", [self.node("NonZero", [repeated]), self.integers(-1)])
        return self.reshape(self.sum(gradient, axes), wanted)


def _same_static_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(isinstance(x, int) and x == y for x, y in pairs)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """What a rule needs to know: one node on the way back.

    Attributes:
        tape: Takes the new nodes.
        node: The node of the model.
        gradients: Gradients of its outputs; None for outputs that nothing depends on.
    """

    tape: Tape
    node: ir.Node
    gradients: Sequence[ir.Value | None]

    @property
    def gradient(self) -> ir.Value:
        """Gradient of the first output."""
        found = self.gradients[0]
        if found is None:
            raise ModelError(f"{self.node.op_type}: only the first output has a gradient")
        return found

    @property
    def output(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]

    def x(self, index: int = 0) -> ir.Value:
        """An input that is there."""
        found = self.node.inputs[index]
        if found is None:
            raise ModelError(f"node {self.node.name!r} has no input {index}")
        return found

    def given(self, index: int) -> bool:
        """Whether there is an input of this number."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def integer(self, name: str, default: int) -> int:
        """An attribute."""
        return self.node.attributes.get_int(name, default)

    def real(self, name: str, default: float) -> float:
        """An attribute."""
        return self.node.attributes.get_float(name, default)

    def integers(self, name: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """An attribute."""
        return tuple(self.node.attributes.get_ints(name, default))
