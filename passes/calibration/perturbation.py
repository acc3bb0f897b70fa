"""Run a model with other values in the place of some weights, without building it again.

Weights become inputs with the dense values as defaults, so that one session answers what the
outputs would be for any choice of decoded weights. Products are those of the dense operators.
Visits the main graph and all subgraphs, whose weights are moved to the main graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.taps import find_taps, is_discrete
from onnxcomp.passes.calibration.output_difference import OutputDifference, kinds_by_name
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.ir.traversal import initializers
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["Probe", "made_up_inputs", "opened", "stored_form", "typed"]

# The IR version from which on a listed initializer is a default, and an unlisted one a constant.
_LISTING_IR = 4


def stored_form(site: WeightSite, weight: Array) -> Array:
    """A canonical matrix ``(rows, length)`` as the tensor it stands for."""
    return site.stored_form(weight)


def typed(site: WeightSite, weight: Array) -> Array:
    """A canonical matrix as the tensor it stands for, in the type that the model has it in."""
    kinds: dict[str, Any] = {"float32": np.float32, "float16": np.float16}
    if site.wide:
        return stored_form(site, weight).astype(np.float64)
    if site.dtype not in kinds:
        import ml_dtypes

        return stored_form(site, weight).astype(ml_dtypes.bfloat16)
    return stored_form(site, weight).astype(kinds[site.dtype], copy=False)


class Probe:
    """A model whose weights can be changed from run to run.

    Args:
        model: The canonical model; only read.
        sites: Weights that can be changed.
        feeds: Inputs by name.
        folder: Where the model is written for ONNX Runtime.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """

    def __init__(
        self, model: ir.Model, sites: Sequence[WeightSite], feeds: Sequence[Feed], folder: Path
    ) -> None:
        from onnxcomp.runtime.evaluate import run_session
        from onnxcomp.runtime.session import open_session

        copy = opened(model, sites)
        self._kinds = kinds_by_name(copy)
        path = save(copy, folder / "probe.onnx").files[0]
        self._session = open_session(path)
        self._run = run_session
        self._feeds = list(feeds)
        self._dtypes = {
            value.name: value.type for value in self._session.get_overridable_initializers()
        }
        self._exact = [self._outputs(feed, {}) for feed in self._feeds]

    def _outputs(self, feed: Feed, weights: Mapping[str, Array]) -> dict[str, Array]:
        found = self._run(self._session, {**feed, **weights})
        return {name: array for name, array in found.items() if array.dtype.kind == "f"}

    def difference(
        self, weights: Mapping[WeightSite, Array], *, inputs: slice = slice(None)
    ) -> OutputDifference:
        """How far outputs are from those of the dense weights, summed over all inputs.

        Args:
            weights: Other values ``(rows, length)`` of some weights.
            inputs: Which inputs to run.
        """
        stored = {site.name: typed(site, weight) for site, weight in weights.items()}
        found = OutputDifference(self._kinds)
        for feed, exact in zip(self._feeds[inputs], self._exact[inputs], strict=True):
            found.add(exact, self._outputs(feed, stored))
        return found

    def noise(self, weights: Mapping[WeightSite, Array], *, worst: bool = False) -> float:
        """Mean over outputs of ``|y' - y|^2 / |y|^2``, each summed over all inputs.

        Args:
            weights: Other values ``(rows, length)`` of some weights.
            worst: Return that of the worst output instead of the mean.
        """
        found = self.difference(weights)
        return found.worst_noise() if worst else found.mean().noise


def opened(model: ir.Model, sites: Sequence[WeightSite]) -> ir.Model:
    """A copy in which the weights are inputs of the main graph, with their values as defaults."""
    copy = copy_model(model)
    _open_decisions(copy)
    copy.ir_version = max(copy.ir_version, _LISTING_IR)
    values = initializers(copy)
    for site in sites:
        value = values[site.name]
        assert value.const_value is not None
        graph = value.graph
        if graph is not None and graph is not copy.graph:
            del graph.initializers[site.name]
            copy.graph.initializers[site.name] = value
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(site.shape)
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy


def _open_decisions(model: ir.Model) -> None:
    """Give out the last floats before decisions where no output shows an error of its own."""
    taps = find_taps(model)
    decided = [bool(taps.behind.get(out.name or "")) for out in model.graph.outputs]
    if not taps.values or not all(
        known or is_discrete(out) for out, known in zip(model.graph.outputs, decided, strict=True)
    ):
        return
    wanted = {tap.name for tap in taps.values if not tap.loop}
    made = {value.name: value for node in model.graph for value in node.outputs}
    for name in sorted(wanted & set(made)):
        if not made[name].is_graph_output():
            model.graph.outputs.append(made[name])


def made_up_inputs(model: ir.Model, *, seed: int = 0, samples: int = 4) -> list[Feed]:
    """Inputs that a model accepts, made up; see `runtime.inputs.synthesize_inputs`."""
    from onnxcomp.runtime.inputs import synthesize_inputs

    with tempfile.TemporaryDirectory() as folder:
        path = save(copy_model(model), Path(folder) / "model.onnx").files[0]
        return list(synthesize_inputs(path, seed=seed, samples=samples))
