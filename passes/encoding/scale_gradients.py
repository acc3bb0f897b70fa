"""The compressed model beside the dense one: loss, and its gradients by scales and by factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import apply_shift
from onnxcomp.passes.gradients.backward import backward, with_shapes
from onnxcomp.passes.gradients.lean_session import lean_session, run_into
from onnxcomp.passes.gradients.loss import Loss, add_loss
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.manifest import own_name, shared_name
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.ir.traversal import find_initializer
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.weight import Array, Feed, Shift, WeightSite

__all__ = ["Groups", "ScaleGradients", "stored_tensors"]

_GRADIENT, _LOSS = "tuning/", "tuning"


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """How the columns of a weight share scales.

    Attributes:
        site: The weight.
        width: Columns of a group; the last one may have fewer.
        count: Groups of a row.
    """

    site: WeightSite
    width: int
    count: int

    def spread(self) -> Array:
        """1 where a column belongs to a group: float32 ``(count, length)``."""
        owner = np.arange(self.site.length) // self.width
        return np.equal(owner, np.arange(self.count)[:, None]).astype(np.float32)


def stored_tensors(placement: Placement) -> dict[str, Array]:
    """The initializers that a weight is stored in, by name; some belong to other weights, too."""
    payload, name = placement.payload, placement.site.name
    own = {own_name(name, key): array for key, array in payload.tensors.items()}
    return own | {shared_name(key): array for key, array in payload.shared.items()}


class ScaleGradients:
    """Runs both models on one input after the other.

    Args:
        model: The canonical dense model; only read.
        fixed: Decoded weights ``(rows, length)`` that stay, in the place of dense ones.
        groups: How the weights whose scales change share them; their values are given at each run.
        folder: Where the two models are written.
        shifts: What is added to other initializers.
        factored: Weights whose stored tensors change; their values are given at each run.

    Attributes:
        dims: Declared sizes of the model's inputs.

    Raises:
        ModelError: There is no gradient of some operator, or ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        fixed: Sequence[tuple[WeightSite, Array]],
        groups: Sequence[Groups],
        folder: Path,
        shifts: Sequence[Shift] = (),
        factored: Sequence[Placement] = (),
    ) -> None:
        compressed = copy_model(model)
        for site, decoded in fixed:
            _store(compressed, site, decoded)
        for shift in shifts:
            apply_shift(compressed, shift)
        names: dict[str, None] = {}
        if factored:
            lower(compressed, factored, portable=False)
            names = dict.fromkeys(name for own in factored for name in stored_tensors(own))
        loss = _differentiate(compressed, groups, list(names))
        self._references = loss.references
        self._dense = lean_session(save(copy_model(model), folder / "dense.onnx").files[0])
        self._session = lean_session(save(compressed, folder / "tuned.onnx").files[0])
        self.dims: Mapping[str, Sequence[Any]] = {
            value.name: value.shape for value in self._dense.get_inputs()
        }

    def __call__(
        self,
        feed: Feed,
        weights: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Loss and gradients for one input.

        Args:
            feed: The input.
            weights: By name, decoded weights as they are stored, and tensors of factors, float32.
            into: Arrays to put gradients by tensors of factors into, by name; None for new ones.

        Returns:
            The loss, and by name gradients by the logarithms of scales, ``(rows, groups)``, and
            those by tensors of factors.
        """
        from onnxcomp.runtime.evaluate import run_session

        dense = run_session(self._dense, feed)
        exact = {new: dense[name] for name, new in self._references.items()}
        del dense
        room = {f"{_GRADIENT}{name}": array for name, array in (into or {}).items()}
        found = run_into(self._session, {**feed, **exact, **weights}, room)
        loss = float(found.pop(_LOSS))
        return loss, {name.removeprefix(_GRADIENT): array for name, array in found.items()}


def _store(model: ir.Model, site: WeightSite, decoded: Array) -> None:
    """Put other values in the place of a weight."""
    value = find_initializer(model, site.name)
    if value is None or value.const_value is None:
        raise ModelError(f"weight {site.name!r} is not in the model")
    kind = value.const_value.dtype
    stored = site.stored_form(decoded).astype(kind.numpy())
    value.const_value = ir.Tensor(stored, dtype=kind, name=value.name)


def _differentiate(model: ir.Model, groups: Sequence[Groups], tensors: Sequence[str]) -> Loss:
    """Make weights and tensors inputs, and loss and gradients the only outputs."""
    graph = model.graph
    with_shapes(model)
    values = {graph.initializers[group.site.name]: group for group in groups}
    wanted = [*values, *(graph.initializers[name] for name in tensors)]
    for value in wanted:
        if not value.is_graph_input():
            graph.inputs.append(value)
        del graph.initializers[value.name or ""]
        value.const_value = None
    tape = Tape(model)
    loss = add_loss(tape, model)
    gradients = backward(tape, graph, loss.seeds, wanted)
    graph.outputs.clear()
    for value, gradient in gradients.items():
        own = values.get(value)
        moved = gradient if own is None else _by_scales(tape, own, value, gradient)
        moved.name = f"{_GRADIENT}{value.name}"
        graph.outputs.append(moved)
    loss.value.name = _LOSS
    graph.outputs.append(loss.value)
    return loss


def _by_scales(tape: Tape, groups: Groups, value: ir.Value, gradient: ir.Value) -> ir.Value:
    """From the gradient by a weight to that by logarithms of its scales: sums of ``g W``."""
    site, spread = groups.site, tape.constant(groups.spread())
    product = tape.multiply(gradient, value)
    if site.transposed and site.experts > 1:
        each = tape.integers(site.experts, site.length, site.rows // site.experts)
        product = tape.node("Transpose", [tape.reshape(product, each)], {"perm": [0, 2, 1]})
    elif site.transposed:
        return tape.product(product, spread, left=True, right=True)
    return tape.product(
        tape.reshape(product, tape.integers(site.rows, site.length)), spread, right=True
    )
