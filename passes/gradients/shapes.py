"""Gradients of operators that move elements: the same elements, moved back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.tape import Step

__all__ = ["RULES"]

Rule = Callable[[Step, int], ir.Value]

# From this version on ScatterND can add.
_ADDING_OPSET = 16


def _reshaped(step: Step, index: int) -> ir.Value:
    return step.tape.reshape(step.gradient, step.tape.shape(step.x()))


def _transpose(step: Step, index: int) -> ir.Value:
    order = step.integers("perm")
    if not order:  # all axes backwards, which is its own inverse
        return step.tape.node("Transpose", [step.gradient])
    back = tuple(int(place) for place in np.argsort(order))
    return step.tape.node("Transpose", [step.gradient], {"perm": back})


def _expand(step: Step, index: int) -> ir.Value:
    return step.tape.like(step.gradient, step.x())


def _concat(step: Step, index: int) -> ir.Value:
    """The part of the gradient at the place of one input."""
    tape, axis = step.tape, step.integer("axis", 0)
    sizes = [_size(step, number, axis) for number in range(len(step.node.inputs))]
    lengths = tape.node("Concat", sizes, {"axis": 0})
    parts = tape.nodes("Split", [step.gradient, lengths], {"axis": axis}, outputs=len(sizes))
    return parts[index]


def _size(step: Step, number: int, axis: int) -> ir.Value:
    """The size of an input along an axis, int64 ``(1,)``."""
    return step.tape.node(
        "Gather", [step.tape.shape(step.x(number)), step.tape.integers(axis)], {"axis": 0}
    )


def _split(step: Step, index: int) -> ir.Value:
    tape = step.tape
    parts = [
        tape.zeros(tape.shape(output)) if gradient is None else gradient
        for gradient, output in zip(step.gradients, step.node.outputs, strict=True)
    ]
    return tape.node("Concat", parts, {"axis": step.integer("axis", 0)})


def _slice(step: Step, index: int) -> ir.Value:
    """Zeros, and the gradient at the places that the same slice of all places has."""
    tape, x = step.tape, step.x()
    size = tape.node("Size", [x])
    places = tape.node("Range", [tape.constant(_scalar(0)), size, tape.constant(_scalar(1))])
    places = tape.reshape(places, tape.shape(x))
    taken = tape.node("Slice", [places, *step.node.inputs[1:]])
    flat = tape.integers(-1)
    nothing = tape.zeros(tape.node("Reshape", [size, flat]))
    updates = [tape.node("Reshape", [part, flat]) for part in (taken, step.gradient)]
    found = tape.node("ScatterElements", [nothing, *updates], {"axis": 0})
    return tape.reshape(found, tape.shape(x))


def _scalar(value: int) -> np.ndarray[tuple[()], np.dtype[np.int64]]:
    return np.array(value, np.int64)


def _gather(step: Step, index: int) -> ir.Value:
    """Each row of the gradient added to the row that it was read from."""
    tape, data, axis = step.tape, step.x(), step.integer("axis", 0)
    if axis != 0:
        raise ModelError(f"Gather: axis {axis} has no gradient here")
    if tape.opset < _ADDING_OPSET:
        raise ModelError(f"Gather: gradients need opset {_ADDING_OPSET}")
    places = tape.node("Unsqueeze", [step.x(1), tape.integers(-1)])
    nothing = tape.zeros(tape.shape(data))
    return tape.node("ScatterND", [nothing, places, step.gradient], {"reduction": "add"})


def _pad(step: Step, index: int) -> ir.Value:
    """The middle of the gradient: from the pads before it, as far as the input goes."""
    tape = step.tape
    mode = step.node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        raise ModelError(f"Pad: mode {mode.as_string()} has no gradient here")
    if step.given(3):
        raise ModelError("Pad: pads of some axes only have no gradient here")
    wanted = tape.shape(step.x())
    begins = tape.node("Slice", [step.x(1), tape.integers(0), tape.shape(wanted)])
    return tape.node("Slice", [step.gradient, begins, tape.add(begins, wanted)])


RULES: dict[str, Rule] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _reshaped,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshaped,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshaped,
    "Transpose": _transpose,
    "Unsqueeze": _reshaped,
}
