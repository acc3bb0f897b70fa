"""Gradients of operators that work element by element.

The rules of inputs that are repeated (broadcast) sum over the repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.tape import Step

__all__ = ["RULES"]

Rule = Callable[[Step, int], ir.Value]

# Slopes of functions of one variable: what the gradient is multiplied with.
Slope = Callable[[Step], ir.Value]


def _unary(slope: Slope) -> Rule:
    def rule(step: Step, index: int) -> ir.Value:
        return step.tape.multiply(step.gradient, slope(step))

    return rule


def _add(step: Step, index: int) -> ir.Value:
    return step.tape.like(step.gradient, step.x(index))


def _subtract(step: Step, index: int) -> ir.Value:
    gradient = step.tape.node("Neg", [step.gradient]) if index else step.gradient
    return step.tape.like(gradient, step.x(index))


def _multiply(step: Step, index: int) -> ir.Value:
    return step.tape.like(step.tape.multiply(step.gradient, step.x(1 - index)), step.x(index))


def _divide(step: Step, index: int) -> ir.Value:
    tape = step.tape
    result = tape.divide(step.gradient, step.x(1))
    if index == 1:
        result = tape.node("Neg", [tape.multiply(result, step.output)])
    return tape.like(result, step.x(index))


def _power(step: Step, index: int) -> ir.Value:
    tape = step.tape
    if index == 1:
        slope = tape.multiply(step.output, tape.node("Log", [step.x(0)]))
        return tape.like(tape.multiply(step.gradient, slope), step.x(1))
    exponent = tape.node("Cast", [step.x(1)], {"to": int(ir.DataType.FLOAT)})
    if _is_two(step.x(1)):  # the usual case, and powers are slow
        twice = tape.multiply(step.x(0), exponent)
        return tape.like(tape.multiply(step.gradient, twice), step.x(0))
    lower = tape.node("Pow", [step.x(0), tape.subtract(exponent, tape.number(1.0))])
    slope = tape.multiply(lower, exponent)
    return tape.like(tape.multiply(step.gradient, slope), step.x(0))


def _is_two(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().item()) == 2.0


def _where(step: Step, index: int) -> ir.Value:
    tape, zero = step.tape, step.tape.number(0.0)
    parts = [step.gradient, zero] if index == 1 else [zero, step.gradient]
    return tape.like(tape.node("Where", [step.x(0), *parts]), step.x(index))


def _extreme(step: Step, index: int) -> ir.Value:
    """Max and Min: to those that are the result; ties count for each."""
    chosen = step.tape.node("Equal", [step.x(index), step.output])
    return step.tape.like(step.tape.gated(step.gradient, chosen), step.x(index))


def _clip(step: Step, index: int) -> ir.Value:
    if index:
        raise ModelError("Clip: the limits have no gradient here")
    inside = step.tape.node("Equal", [step.x(), step.output])
    return step.tape.gated(step.gradient, inside)


def _relu(step: Step, index: int) -> ir.Value:
    positive = step.tape.node("Greater", [step.x(), step.tape.number(0.0)])
    return step.tape.gated(step.gradient, positive)


def _leaky(step: Step, index: int) -> ir.Value:
    tape = step.tape
    positive = tape.node("Greater", [step.x(), tape.number(0.0)])
    smaller = tape.multiply(step.gradient, tape.number(step.real("alpha", 0.01)))
    return tape.node("Where", [positive, step.gradient, smaller])


def _parametric(step: Step, index: int) -> ir.Value:
    tape = step.tape
    positive = tape.node("Greater", [step.x(0), tape.number(0.0)])
    if index == 0:
        smaller = tape.multiply(step.gradient, step.x(1))
        return tape.node("Where", [positive, step.gradient, smaller])
    product = tape.multiply(step.gradient, step.x(0))
    return tape.like(tape.node("Where", [positive, tape.number(0.0), product]), step.x(1))


def _through(step: Step, index: int) -> ir.Value:
    return step.gradient


def _cast(step: Step, index: int) -> ir.Value:
    if step.x().dtype not in (None, ir.DataType.FLOAT):
        raise ModelError(f"Cast: no gradient of {step.x().dtype} values")
    return step.tape.node("Cast", [step.gradient], {"to": int(ir.DataType.FLOAT)})


def _sigmoid_slope(step: Step) -> ir.Value:
    rest = step.tape.subtract(step.tape.number(1.0), step.output)
    return step.tape.multiply(step.output, rest)


def _tanh_slope(step: Step) -> ir.Value:
    tape = step.tape
    return tape.subtract(tape.number(1.0), tape.multiply(step.output, step.output))


def _erf_slope(step: Step) -> ir.Value:
    return _bell(step, step.x(), 1.0, 2.0 / math.sqrt(math.pi))


def _bell(step: Step, x: ir.Value, rate: float, height: float) -> ir.Value:
    """``height exp(-rate x^2)``."""
    tape = step.tape
    square = tape.multiply(tape.multiply(x, x), tape.number(-rate))
    return tape.multiply(tape.node("Exp", [square]), tape.number(height))


def _gelu_slope(step: Step) -> ir.Value:
    """Of ``x F(x)`` with the normal distribution F, or with its approximation by tanh."""
    tape, x = step.tape, step.x()
    half, one = tape.number(0.5), tape.number(1.0)
    attribute = step.node.attributes.get("approximate")
    if attribute is None or attribute.as_string() == "none":
        share = tape.node("Erf", [tape.multiply(x, tape.number(math.sqrt(0.5)))])
        below = tape.multiply(tape.add(share, one), half)
        bell = _bell(step, x, 0.5, 1.0 / math.sqrt(2.0 * math.pi))
        return tape.add(below, tape.multiply(x, bell))
    root, cubic = math.sqrt(2.0 / math.pi), 0.044715
    square = tape.multiply(x, x)
    inner = tape.add(tape.multiply(square, tape.number(root * cubic)), tape.number(root))
    bent = tape.node("Tanh", [tape.multiply(inner, x)])
    steep = tape.add(tape.multiply(square, tape.number(3 * root * cubic)), tape.number(root))
    rise = tape.multiply(tape.subtract(one, tape.multiply(bent, bent)), tape.multiply(steep, x))
    return tape.multiply(tape.add(tape.add(one, bent), rise), half)


def _swish_slope(step: Step) -> ir.Value:
    """Of ``x s(x)`` with the sigmoid s: ``s + y (1 - s)``."""
    tape = step.tape
    share = tape.node("Sigmoid", [tape.multiply(step.x(), tape.number(step.real("alpha", 1.0)))])
    rest = tape.subtract(tape.number(1.0), share)
    steep = tape.multiply(step.output, tape.number(step.real("alpha", 1.0)))
    return tape.add(share, tape.multiply(steep, rest))


def _hard_sigmoid_slope(step: Step) -> ir.Value:
    tape, y = step.tape, step.output
    above = tape.node("Greater", [y, tape.number(0.0)])
    inside = tape.node("And", [above, tape.node("Less", [y, tape.number(1.0)])])
    rise = tape.number(step.real("alpha", 0.2))
    return tape.node("Where", [inside, rise, tape.number(0.0)])


def _hard_swish_slope(step: Step) -> ir.Value:
    """Of ``x clip(x / 6 + 1/2, 0, 1)``."""
    tape, x = step.tape, step.x()
    ramp = tape.add(tape.multiply(x, tape.number(1 / 3)), tape.number(0.5))
    below = tape.node("Less", [x, tape.number(-3.0)])
    above = tape.node("Greater", [x, tape.number(3.0)])
    upper = tape.node("Where", [above, tape.number(1.0), ramp])
    return tape.node("Where", [below, tape.number(0.0), upper])


def _elu_slope(step: Step) -> ir.Value:
    """1 above zero, below it ``y + alpha``."""
    tape = step.tape
    below = tape.add(step.output, tape.number(step.real("alpha", 1.0)))
    positive = tape.node("Greater", [step.x(), tape.number(0.0)])
    return tape.node("Where", [positive, tape.number(1.0), below])


def _square_root_slope(step: Step) -> ir.Value:
    return step.tape.divide(step.tape.number(0.5), step.output)


def _reciprocal_slope(step: Step) -> ir.Value:
    return step.tape.node("Neg", [step.tape.multiply(step.output, step.output)])


def _cosine_slope(step: Step) -> ir.Value:
    return step.tape.node("Neg", [step.tape.node("Sin", [step.x()])])


def _function_of_x(op_type: str) -> Slope:
    return lambda step: step.tape.node(op_type, [step.x()])


RULES: dict[str, Rule] = {
    "Abs": _unary(_function_of_x("Sign")),
    "Add": _add,
    "Cast": _cast,
    "Clip": _clip,
    "Cos": _unary(_cosine_slope),
    "Div": _divide,
    "Dropout": _through,
    "Elu": _unary(_elu_slope),
    "Erf": _unary(_erf_slope),
    "Exp": _unary(lambda step: step.output),
    "Gelu": _unary(_gelu_slope),
    "HardSigmoid": _unary(_hard_sigmoid_slope),
    "HardSwish": _unary(_hard_swish_slope),
    "Identity": _through,
    "LeakyRelu": _leaky,
    "Log": _unary(_function_of_x("Reciprocal")),
    "Max": _extreme,
    "Min": _extreme,
    "Mul": _multiply,
    "Neg": lambda step, index: step.tape.node("Neg", [step.gradient]),
    "PRelu": _parametric,
    "Pow": _power,
    "Reciprocal": _unary(_reciprocal_slope),
    "Relu": _relu,
    "Sigmoid": _unary(_sigmoid_slope),
    "Sin": _unary(_function_of_x("Cos")),
    "Softplus": _unary(_function_of_x("Sigmoid")),
    "Sqrt": _unary(_square_root_slope),
    "Sub": _subtract,
    "Sum": _add,
    "Swish": _unary(_swish_slope),
    "Tanh": _unary(_tanh_slope),
    "Where": _where,
}
