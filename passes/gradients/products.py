"""Gradients of products: MatMul, Gemm, Conv."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.tape import Step
from onnxcomp.passes.weight import Attribute

__all__ = ["RULES"]

Rule = Callable[[Step, int], ir.Value]


def _matmul(step: Step, index: int) -> ir.Value:
    """``g B^T`` and ``A^T g``; a matrix that serves a whole batch gets one sum over it."""
    tape, (a, b) = step.tape, (step.x(0), step.x(1))
    for value in (a, b):
        if value.shape is not None and len(value.shape) < 2:
            raise ModelError(f"MatMul {step.node.name!r}: vectors have no gradient here")
    if index == 0:
        return tape.like(tape.product(step.gradient, b, right=True), a)
    if b.shape is not None and len(b.shape) == 2:
        return tape.product(_flat(step, a), _flat(step, step.gradient), left=True)
    return tape.like(tape.product(a, step.gradient, left=True), b)


def _flat(step: Step, x: ir.Value) -> ir.Value:
    """All vectors along the last axis: ``(n, size)``."""
    tape = step.tape
    last = tape.node("Gather", [tape.shape(x), tape.integers(-1)], {"axis": 0})
    form = tape.node("Concat", [tape.integers(-1), last], {"axis": 0})
    return tape.node("Reshape", [x, form])


def _gemm(step: Step, index: int) -> ir.Value:
    """Of ``alpha op(A) op(B) + beta C``, `op` being a transposition or nothing."""
    tape, gradient = step.tape, step.gradient
    factor = step.real("beta" if index == 2 else "alpha", 1.0)
    if factor != 1.0:
        gradient = tape.multiply(gradient, tape.number(factor))
    if index == 2:
        return tape.like(gradient, step.x(2))
    a_turned, b_turned = bool(step.integer("transA", 0)), bool(step.integer("transB", 0))
    if index == 0 and a_turned:
        return tape.product(step.x(1), gradient, left=b_turned, right=True)
    if index == 0:
        return tape.product(gradient, step.x(1), right=not b_turned)
    if b_turned:
        return tape.product(gradient, step.x(0), left=True, right=a_turned)
    return tape.product(step.x(0), gradient, left=not a_turned)


def _convolution(step: Step, index: int) -> ir.Value:
    automatic = step.node.attributes.get("auto_pad")
    if automatic is not None and automatic.as_string() != "NOTSET":
        raise ModelError("Conv: automatic padding has no gradient here")
    if index == 2:
        return _bias(step)
    weight = step.x(1)
    if weight.shape is None or not all(isinstance(size, int) for size in weight.shape):
        raise ModelError("Conv: filters of unknown size have no gradient here")
    axes = len(weight.shape) - 2
    strides = step.integers("strides") or (1,) * axes
    dilations = step.integers("dilations") or (1,) * axes
    pads = step.integers("pads") or (0,) * (2 * axes)
    if index == 0:
        return _convolution_input(step, strides, dilations, pads)
    return _convolution_filters(step, strides, dilations, pads)


def _convolution_filters(
    step: Step, strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...]
) -> ir.Value:
    """The gradient slides over the input as a filter: strides and dilations change places.

    Inputs of a group are the batch, and samples the channels that are summed over: inputs
    ``(n, g * c, ...)`` become ``(c, g * n, ...)``, gradients ``(n, g * o, ...)`` filters
    ``(g * o, n, ...)``, and their convolution in g groups is ``(c, g * o, window)``.
    """
    tape, groups = step.tape, step.integer("group", 1)
    weight = step.x(1)
    assert weight.shape is not None
    axes = len(weight.shape) - 2
    across = {"perm": (1, 0, *range(2, axes + 2))}
    x = tape.node("Transpose", [step.x(0)], across)
    if groups != 1:
        x = _samples_as_channels(step, x, groups)
    gradient = tape.node("Transpose", [step.gradient], across)
    settings: dict[str, Attribute] = {
        "strides": dilations,
        "dilations": strides,
        "pads": pads,
        "group": groups,
    }
    wide = tape.node("Transpose", [tape.node("Conv", [x, gradient], settings)], across)
    # Inputs that no window reached make it longer than the filter.
    kernel = [size for size in weight.shape[2:] if isinstance(size, int)]
    places = tuple(range(2, axes + 2))
    first, last = tape.integers(*[0] * axes), tape.integers(*kernel)
    return tape.node("Slice", [wide, first, last, tape.integers(*places)])


def _samples_as_channels(step: Step, x: ir.Value, groups: int) -> ir.Value:
    """``(g * c, n, ...)`` as ``(c, g * n, ...)``."""
    tape, weight = step.tape, step.x(1)
    assert weight.shape is not None
    axes, own = len(weight.shape) - 2, weight.shape[1]
    assert isinstance(own, int)
    behind = tape.node(
        "Slice", [tape.shape(x), tape.integers(1), tape.integers(axes + 2)]
    )  # samples and sizes
    apart = tape.node("Concat", [tape.integers(groups, own), behind], {"axis": 0})
    turned = {"perm": (1, 0, *range(2, axes + 3))}
    x = tape.node("Transpose", [tape.reshape(x, apart)], turned)
    sizes = tape.node("Slice", [behind, tape.integers(1), tape.integers(axes + 1)])
    together = tape.node("Concat", [tape.integers(own, -1), sizes], {"axis": 0})
    return tape.node("Reshape", [x, together])


def _bias(step: Step) -> ir.Value:
    tape = step.tape
    form = tape.node("Concat", [tape.shape(step.x(2)), tape.integers(-1)], {"axis": 0})
    batch = tape.node("Gather", [tape.shape(step.gradient), tape.integers(0)], {"axis": 0})
    flat = tape.reshape(step.gradient, tape.node("Concat", [batch, form], {"axis": 0}))
    return tape.reshape(tape.sum(flat, tape.integers(0, 2)), tape.shape(step.x(2)))


def _convolution_input(
    step: Step, strides: tuple[int, ...], dilations: tuple[int, ...], pads: tuple[int, ...]
) -> ir.Value:
    """A transposed convolution, filled up with zeros where strides skip the last inputs."""
    tape, x = step.tape, step.x(0)
    settings: dict[str, Attribute] = {
        "strides": strides,
        "dilations": dilations,
        "group": step.integer("group", 1),
    }
    wide = tape.node("ConvTranspose", [step.gradient, step.x(1)], settings)
    # Without pads it covers what the windows cover, from the first padded input on.
    half = len(pads) // 2
    zeros = tape.integers(0, 0)
    begins = tape.node("Concat", [zeros, tape.integers(*pads[:half])], {"axis": 0})
    ends = tape.node("Concat", [zeros, tape.integers(*pads[half:])], {"axis": 0})
    padded = tape.add(tape.add(tape.shape(x), begins), ends)
    missing = tape.node("Max", [tape.subtract(padded, tape.shape(wide)), tape.integers(0)])
    nothing = tape.integers(*[0] * (half + 2))
    around = tape.node("Concat", [nothing, missing], {"axis": 0})
    whole = tape.node("Pad", [wide, around])
    return tape.node("Slice", [whole, begins, tape.add(begins, tape.shape(x))])


RULES: dict[str, Rule] = {"Conv": _convolution, "Gemm": _gemm, "MatMul": _matmul}
