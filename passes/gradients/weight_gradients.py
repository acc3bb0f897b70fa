"""A model beside the one it was made from: how far it is from it, and gradients by its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.passes.gradients.backward import backward, with_shapes
from onnxcomp.passes.gradients.lean_session import lean_session
from onnxcomp.passes.gradients.loss import add_loss
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Part", "WeightGradients"]

# The part of a value that another one is like: positions that are kept, by axis.
Part = Sequence[tuple[int, Array]]

_GRADIENT, _LOSS, _OUTPUTS = "tuning/", "tuning", "tuning.outputs"


class WeightGradients:
    """Runs both models on one input after the other.

    Args:
        model: The model; only read.
        reference: What it should compute; only read.
        weights: Names of initializers of the model, whose values are given at each run.
        values: Values that are compared besides the outputs: by name in the model, what is like
            it in the reference.
        share: What the mean of their relative squared errors counts beside the outputs' loss.
        folder: Where the two models are written.

    Attributes:
        dims: Declared sizes of the model's inputs.

    Raises:
        ModelError: There is no gradient of some operator, or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model,
        weights: Sequence[str],
        values: Mapping[str, Part],
        share: float,
        folder: Path,
    ) -> None:
        own = copy_model(model)
        references = _differentiate(own, weights, list(values), share)
        exact = copy_model(reference)
        self._references = _returned(exact, references, values)
        self._exact = lean_session(save(exact, folder / "reference.onnx").files[0])
        self._session = lean_session(save(own, folder / "gradients.onnx").files[0])
        self._loss = lean_session(save(_without_gradients(own), folder / "loss.onnx").files[0])
        self.dims: Mapping[str, Sequence[Any]] = {
            value.name: value.shape for value in self._exact.get_inputs()
        }

    def __call__(self, feed: Feed, weights: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        """Loss and gradients for one input.

        Args:
            feed: The input.
            weights: By name, what the initializers are, float32.

        Returns:
            The loss, and the gradients by name.
        """
        found = self._run(self._session, feed, weights)
        loss = float(found.pop(_LOSS))
        del found[_OUTPUTS]
        return loss, {name.removeprefix(_GRADIENT): array for name, array in found.items()}

    def loss_of_outputs(self, feed: Feed, weights: Mapping[str, Array]) -> float:
        """The loss of the outputs alone."""
        return float(self._run(self._loss, feed, weights)[_OUTPUTS])

    def _run(self, session: Any, feed: Feed, weights: Mapping[str, Array]) -> dict[str, Array]:
        from onnxcomp.runtime.evaluate import run_session

        exact = run_session(self._exact, feed)
        targets = {new: exact[name] for name, new in self._references.items()}
        return dict(run_session(session, {**feed, **targets, **weights}))


def _differentiate(
    model: ir.Model, weights: Sequence[str], values: Sequence[str], share: float
) -> Mapping[str, str]:
    """Make weights inputs, and loss and gradients by them the only outputs.

    Returns:
        By name of a compared value the input that takes the reference's.
    """
    graph = model.graph
    with_shapes(model)
    wanted = [graph.initializers[name] for name in weights]
    for value in wanted:
        if not value.is_graph_input():
            graph.inputs.append(value)
        del graph.initializers[value.name or ""]
        value.const_value = None
    made = {value.name: value for node in graph for value in node.outputs}
    tape = Tape(model)
    loss = add_loss(tape, model, [made[name] for name in values], share)
    gradients = backward(tape, graph, loss.seeds, wanted)
    graph.outputs.clear()
    for value, gradient in gradients.items():
        named = tape.node("Identity", [gradient])
        named.name = f"{_GRADIENT}{value.name}"
        graph.outputs.append(named)
    for value, name in ((loss.value, _LOSS), (loss.outputs, _OUTPUTS)):
        named = tape.node("Identity", [value])
        named.name = name
        graph.outputs.append(named)
    return loss.references


def _returned(
    model: ir.Model, references: Mapping[str, str], values: Mapping[str, Part]
) -> dict[str, str]:
    """Make what is compared the outputs; by name of an output the input that takes it."""
    made = {value.name: value for node in model.graph for value in node.outputs}
    tape, found = Tape(model), {}
    model.graph.outputs.clear()
    for name, taken in references.items():
        value = made[name]
        for axis, positions in values.get(name, ()):
            value = tape.node("Gather", [value, tape.constant(positions)], {"axis": axis})
        model.graph.outputs.append(value)
        found[value.name or ""] = taken
    return found


def _without_gradients(model: ir.Model) -> ir.Model:
    """The loss of the outputs alone; what only gradients need is left to ONNX Runtime to remove."""
    copy = copy_model(model)
    loss = next(value for value in copy.graph.outputs if value.name == _OUTPUTS)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(loss)
    return copy
