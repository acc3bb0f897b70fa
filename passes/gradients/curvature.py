"""Random directions of a model's outputs in which the loss curves, to be taken back as gradients.

Near the reference the loss is ``d^T H d / 2`` for a change d of the outputs. A seed ``s = S r``
with ``S S^T = H`` and random signs r has ``E[s s^T] = H``. Taken back to a value inside the model
it is a gradient g, and the mean of ``g g^T`` is the curvature of the loss there (Gauss and Newton;
of logits it is Fisher's information). Nothing is sampled from the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.output_kinds import OutputKind
from onnxcomp.passes.gradients.loss import compared_outputs, distribution_count
from onnxcomp.passes.gradients.tape import Tape

__all__ = ["curvature_seeds"]

# Added to probabilities and powers before a division.
_LEAST = 1e-9


def curvature_seeds(tape: Tape, model: ir.Model) -> Mapping[ir.Value, ir.Value]:
    """Add a random seed for each output that counts, other ones at each run.

    Raises:
        ModelError: No output is float32 and computed.
    """
    seeds = {
        value: _seed(tape, value, kind, number)
        for number, (value, kind) in enumerate(compared_outputs(model.graph).items())
    }
    if not seeds:
        raise ModelError("no output is float32 and computed: there is no loss to look at")
    return seeds


def _seed(tape: Tape, value: ir.Value, kind: OutputKind, number: int) -> ir.Value:
    signs = _signs(tape, value, number)
    if kind == "values":
        # Of |d|^2 / |y|^2 it is 2 / |y|^2.
        power = tape.node("ReduceSumSquare", [value], {"keepdims": 0})
        share = tape.divide(tape.number(2.0), tape.add(power, tape.number(_LEAST)))
        return tape.multiply(signs, tape.node("Sqrt", [share]))
    scale = tape.node("Sqrt", [distribution_count(tape, value)])
    return tape.divide(_of_distribution(tape, value, kind, signs), scale)


def _of_distribution(tape: Tape, value: ir.Value, kind: OutputKind, signs: ir.Value) -> ir.Value:
    if kind == "Softmax":  # diag(1 / p)
        return tape.divide(signs, tape.node("Sqrt", [tape.add(value, tape.number(_LEAST))]))
    if kind == "LogSoftmax":  # diag(p)
        return tape.multiply(signs, tape.node("Sqrt", [tape.node("Exp", [value])]))
    # diag(p) - p p^T = S S^T with S r = sqrt(p) r - p (sqrt(p)^T r)
    p = tape.node("Softmax", [value])
    spread = tape.multiply(signs, tape.node("Sqrt", [p]))
    total = tape.sum(spread, tape.integers(-1))
    return tape.subtract(spread, tape.multiply(p, total))


def _signs(tape: Tape, value: ir.Value, number: int) -> ir.Value:
    """-1 and 1 of a value's shape."""
    settings = {"low": -1.0, "high": 1.0, "seed": float(number), "dtype": int(ir.DataType.FLOAT)}
    return tape.node("Sign", [tape.node("RandomUniformLike", [value], settings)])
