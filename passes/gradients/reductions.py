"""Gradients of operators that reduce axes, and of normalisations."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.tape import Step

__all__ = ["RULES"]

Rule = Callable[[Step, int], ir.Value]


def _kept(step: Step, value: ir.Value) -> ir.Value:
    """A reduced value with size 1 along the reduced axes."""
    if step.integer("keepdims", 1):
        return value
    axes = step.x(1) if step.given(1) else None
    if axes is None and "axes" in step.node.attributes:
        axes = step.tape.integers(*step.integers("axes"))
    if axes is None:
        raise ModelError(f"{step.node.op_type}: without axes and keepdims it has no gradient here")
    return step.tape.node("Unsqueeze", [value, axes])


def _reduce_sum(step: Step, index: int) -> ir.Value:
    tape = step.tape
    return tape.node("Expand", [_kept(step, step.gradient), tape.shape(step.x())])


def _reduce_mean(step: Step, index: int) -> ir.Value:
    tape = step.tape
    count = tape.divide(_floats(step, step.x()), _floats(step, step.output))
    return tape.divide(_reduce_sum(step, index), count)


def _floats(step: Step, value: ir.Value) -> ir.Value:
    """Number of elements, float32."""
    size = step.tape.node("Size", [value])
    return step.tape.node("Cast", [size], {"to": int(ir.DataType.FLOAT)})


def _reduce_extreme(step: Step, index: int) -> ir.Value:
    """To those that are the result; ties count for each."""
    tape = step.tape
    chosen = tape.node("Equal", [step.x(), _kept(step, step.output)])
    return tape.gated(_reduce_sum(step, index), chosen)


def _reduce_norm(step: Step, index: int) -> ir.Value:
    """Of the square root of a sum of squares: ``g x / y``."""
    tape = step.tape
    share = tape.divide(step.x(), _kept(step, step.output))
    return tape.multiply(_kept(step, step.gradient), share)


def _softmax(step: Step, index: int) -> ir.Value:
    """``y (g - sum(g y))``."""
    tape, y = step.tape, step.output
    axis = tape.integers(step.integer("axis", -1))
    mixed = tape.sum(tape.multiply(step.gradient, y), axis)
    return tape.multiply(y, tape.subtract(step.gradient, mixed))


def _log_softmax(step: Step, index: int) -> ir.Value:
    """``g - exp(y) sum(g)``."""
    tape = step.tape
    total = tape.sum(step.gradient, tape.integers(step.integer("axis", -1)))
    return tape.subtract(step.gradient, tape.multiply(tape.node("Exp", [step.output]), total))


def _standardised(step: Step, centred: bool) -> tuple[ir.Value, ir.Value]:
    """The input as it is before scale and shift, and what it was divided by."""
    tape, x = step.tape, step.x()
    if step.integer("axis", -1) != -1:
        raise ModelError(f"{step.node.op_type}: only the last axis has a gradient here")
    if centred:
        x = tape.subtract(x, tape.mean(x, [-1]))
    power = tape.mean(tape.multiply(x, x), [-1])
    root = tape.node("Sqrt", [tape.add(power, tape.number(step.real("epsilon", 1e-5)))])
    return tape.divide(x, root), root


def _normalisation(centred: bool) -> Rule:
    """Rule of layer normalisation (centred) and of that by the root of the mean square."""

    def rule(step: Step, index: int) -> ir.Value:
        """What reaches the input, the scale or the offset."""
        tape = step.tape
        if index == 2:
            return tape.like(step.gradient, step.x(2))
        shape, root = _standardised(step, centred)
        if index == 1:
            return tape.like(tape.multiply(step.gradient, shape), step.x(1))
        inner = tape.multiply(step.gradient, step.x(1))
        along = tape.multiply(shape, tape.mean(tape.multiply(inner, shape), [-1]))
        left = tape.subtract(inner, along)
        if centred:
            left = tape.subtract(left, tape.mean(inner, [-1]))
        return tape.divide(left, root)

    return rule


def _batch_normalisation(step: Step, index: int) -> ir.Value:
    """With running statistics, which have no gradient here."""
    tape = step.tape
    if index > 2 or step.integer("training_mode", 0):
        raise ModelError("BatchNormalization: statistics have no gradient here")
    # Channels are the second axis, so vectors of channels get an axis of size 1 for each after it.
    rank = tape.shape(tape.shape(step.x()))
    behind = tape.node("Expand", [tape.integers(1), tape.subtract(rank, tape.integers(2))])
    form = tape.node("Concat", [tape.integers(-1), behind], {"axis": 0})
    scale, mean, variance = (tape.node("Reshape", [step.x(i), form]) for i in (1, 3, 4))
    root = tape.node("Sqrt", [tape.add(variance, tape.number(step.real("epsilon", 1e-5)))])
    if index == 0:
        return tape.multiply(step.gradient, tape.divide(scale, root))
    found = step.gradient
    if index == 1:
        found = tape.multiply(found, tape.divide(tape.subtract(step.x(), mean), root))
    return tape.reshape(tape.like(found, scale), tape.shape(step.x(index)))


def _global_average(step: Step, index: int) -> ir.Value:
    tape = step.tape
    count = tape.divide(_floats(step, step.x()), _floats(step, step.output))
    return tape.node("Expand", [tape.divide(step.gradient, count), tape.shape(step.x())])


RULES: dict[str, Rule] = {
    "BatchNormalization": _batch_normalisation,
    "GlobalAveragePool": _global_average,
    "LayerNormalization": _normalisation(centred=True),
    "LogSoftmax": _log_softmax,
    "RMSNormalization": _normalisation(centred=False),
    "ReduceL2": _reduce_norm,
    "ReduceMax": _reduce_extreme,
    "ReduceMean": _reduce_mean,
    "ReduceMin": _reduce_extreme,
    "ReduceSum": _reduce_sum,
    "SimplifiedLayerNormalization": _normalisation(centred=False),
    "Softmax": _softmax,
}
