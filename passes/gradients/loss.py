"""How far a model's outputs are from those of a reference, as nodes, and its gradient.

Outputs that are distributions, or logits of some, are compared by the divergence of Kullback and
Leibler, in nats and averaged. Where there are none, all outputs are compared by their squared
error, relative to the power of the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.output_kinds import OutputKind, output_kinds
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.traversal import Names

__all__ = ["Loss", "add_loss", "compared_outputs", "distribution_count"]

REFERENCE = "reference/"

# Added to probabilities before a division, so that none divides by zero.
_LEAST = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class Loss:
    """The nodes of a loss.

    Attributes:
        value: The loss, a scalar.
        outputs: The part of it that comes from the outputs.
        seeds: By output, the gradient of the loss with respect to it.
        references: By name of the output, the new input that takes the reference's.
    """

    value: ir.Value
    outputs: ir.Value
    seeds: Mapping[ir.Value, ir.Value]
    references: Mapping[str, str]


def compared_outputs(graph: ir.Graph) -> Mapping[ir.Value, OutputKind]:
    """The outputs that are compared, and how."""
    outputs = (v for v in graph.outputs if v.dtype == ir.DataType.FLOAT and v.producer())
    return output_kinds(graph, outputs)


def add_loss(
    tape: Tape, model: ir.Model, values: Sequence[ir.Value] = (), weight: float = 1.0
) -> Loss:
    """Add a loss to a model: inputs for the reference's outputs, and nodes behind the own ones.

    Args:
        tape: Takes the nodes.
        model: Gets the inputs.
        values: Other values that are compared, by their relative squared error.
        weight: What the mean of these errors counts beside the outputs.

    Raises:
        ModelError: No output is float32 and computed.
    """
    names, compared = Names(model), compared_outputs(model.graph)
    if not compared:
        raise ModelError("no output is float32 and computed: there is nothing to compare")
    terms: list[ir.Value] = []
    seeds: dict[ir.Value, ir.Value] = {}
    references: dict[str, str] = {}

    def compare(value: ir.Value, kind: OutputKind, share: float) -> None:
        """Add a term for an output, and its gradient."""
        name = names.value(f"{REFERENCE}{value.name}")
        wanted = ir.Value(name=name, type=value.type, shape=value.shape)
        model.graph.inputs.append(wanted)
        references[value.name or ""] = name
        found = _TERMS[kind](tape, value, wanted)
        term, seed = (tape.multiply(v, tape.number(share)) if share != 1.0 else v for v in found)
        seeds[value] = tape.add(seeds[value], seed) if value in seeds else seed
        terms.append(term)

    for value, kind in compared.items():
        compare(value, kind, 1.0)
    outputs = _sum(tape, terms)
    for value in values:
        compare(value, "values", weight / len(values))
    return Loss(_sum(tape, terms), outputs, seeds, references)


def _sum(tape: Tape, terms: Sequence[ir.Value]) -> ir.Value:
    total = terms[0]
    for term in terms[1:]:
        total = tape.add(total, term)
    return total


def _everything(tape: Tape, x: ir.Value) -> ir.Value:
    return tape.node("ReduceSum", [x], {"keepdims": 0})


def distribution_count(tape: Tape, x: ir.Value) -> ir.Value:
    """How many distributions lie along the last axis, float32."""
    shape = tape.shape(x)
    last = tape.node("Gather", [shape, tape.constant(np.array(-1, np.int64))], {"axis": 0})
    count = tape.node("Div", [tape.node("Size", [x]), last])
    return tape.node("Cast", [count], {"to": int(ir.DataType.FLOAT)})


def _of_logits(tape: Tape, found: ir.Value, wanted: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``sum p (log p - log q)``, whose gradient by logits is ``q - p``."""
    count = distribution_count(tape, wanted)
    p, log_p = tape.node("Softmax", [wanted]), tape.node("LogSoftmax", [wanted])
    q, log_q = tape.node("Softmax", [found]), tape.node("LogSoftmax", [found])
    loss = _everything(tape, tape.multiply(p, tape.subtract(log_p, log_q)))
    return tape.divide(loss, count), tape.divide(tape.subtract(q, p), count)


def _of_probabilities(tape: Tape, found: ir.Value, wanted: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``sum p log(p / q)``, whose gradient is ``-p / q``."""
    count, least = distribution_count(tape, wanted), tape.number(_LEAST)
    ratio = tape.divide(tape.add(wanted, least), tape.add(found, least))
    loss = _everything(tape, tape.multiply(wanted, tape.node("Log", [ratio])))
    share = tape.divide(wanted, tape.add(found, least))
    return tape.divide(loss, count), tape.divide(tape.node("Neg", [share]), count)


def _of_logarithms(tape: Tape, found: ir.Value, wanted: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``sum p (log p - log q)``, whose gradient by ``log q`` is ``-p``."""
    count, p = distribution_count(tape, wanted), tape.node("Exp", [wanted])
    loss = _everything(tape, tape.multiply(p, tape.subtract(wanted, found)))
    return tape.divide(loss, count), tape.divide(tape.node("Neg", [p]), count)


def _of_values(tape: Tape, found: ir.Value, wanted: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``|y' - y|^2 / |y|^2``."""
    error = tape.subtract(found, wanted)
    power = tape.add(_everything(tape, tape.multiply(wanted, wanted)), tape.number(1e-30))
    loss = tape.divide(_everything(tape, tape.multiply(error, error)), power)
    return loss, tape.divide(tape.multiply(error, tape.number(2.0)), power)


_TERMS = {
    "LogSoftmax": _of_logarithms,
    "Softmax": _of_probabilities,
    "logits": _of_logits,
    "values": _of_values,
}
