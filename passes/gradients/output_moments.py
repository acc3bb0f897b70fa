"""How much the loss of a model's outputs curves by the products of its weights.

For a weight ``W (rows, length)`` with products ``y = W x`` an error ``E`` of the weight costs
``tr(H E G E^T) / 2``, with the second moments ``G = E[x x^T]`` of the inputs and the curvature
``H = E[g g^T]`` by the products: one factor for each side (Martens and Grosse, arXiv 1503.05671).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.cache_outputs import without_caches
from onnxcomp.passes.gradients.backward import backward, with_shapes
from onnxcomp.passes.gradients.curvature import curvature_seeds
from onnxcomp.passes.gradients.lean_session import lean_session
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.weight import Array, Feed, WeightSite
from onnxcomp.runtime.activity import activity

__all__ = ["output_moments"]

log = logging.getLogger(__name__)

# Rows of a weight up to which its curvature is a matrix that can be worked with.
_WIDEST = 4096

# Bytes of initializers above which a model is not looked at: its activations stay for the way back.
_LARGEST = 1 << 30


def output_moments(
    model: ir.Model,
    sites: Sequence[WeightSite],
    feeds: Sequence[Feed],
    *,
    folder: Path | None = None,
) -> dict[str, Array]:
    """The curvature by the products of weights.

    Args:
        model: The canonical dense model; only read.
        sites: Weights to look at.
        feeds: Inputs by name.
        folder: Where a temporary file lies.

    Returns:
        By name float64 ``(rows, rows)``; without weights whose products have no gradient, and
        without all those of a model that cannot be differentiated.
    """
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    able = [site for site in sites if site.rows <= _WIDEST and not site.scope]
    if size > _LARGEST or not able or not feeds:
        return {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            return _measured(model, able, feeds, Path(place))
        except ModelError as error:
            log.info("the curvature of the loss is not known: %s", error.message)
            return {}


def _measured(
    model: ir.Model, sites: Sequence[WeightSite], feeds: Sequence[Feed], folder: Path
) -> dict[str, Array]:
    from onnxcomp.runtime.evaluate import run_session

    differentiated = without_caches(copy_model(model))
    names = _differentiate(differentiated, sites)
    session = lean_session(save(differentiated, folder / "curvature.onnx").files[0])
    totals: dict[str, Array] = {}
    for number, feed in enumerate(feeds):
        activity("looking at the loss", number, len(feeds), "inputs")
        for name, array in run_session(session, feed).items():
            site = names[name]
            totals[site] = totals.get(site, 0.0) + array.astype(np.float64) / len(feeds)
    return {name: total for name, total in totals.items() if _known(total)}


def _known(total: Array) -> bool:
    return bool(np.isfinite(total).all()) and float(np.trace(total)) > 0.0


def _differentiate(model: ir.Model, sites: Sequence[WeightSite]) -> dict[str, str]:
    """Make sums of ``g g^T`` the only outputs; the weight of each, by name."""
    graph = model.graph
    with_shapes(model)
    nodes = {node.name: node for node in graph}
    products: dict[ir.Value, WeightSite] = {}
    for site in sites:
        for use in site.uses:
            node = nodes.get(use.node)
            if node is not None and use.need == "matmul":
                products[node.outputs[0]] = site
    tape = Tape(model)
    seeds = curvature_seeds(tape, model)
    gradients = backward(tape, graph, seeds, list(products))
    graph.outputs.clear()
    names = {}
    for number, (value, gradient) in enumerate(gradients.items()):
        site = products[value]
        flat = tape.node("Reshape", [gradient, tape.integers(-1, site.rows)])
        moments = tape.product(flat, flat, left=True)
        moments.name = f"curvature/{number}"
        names[moments.name] = site.name
        graph.outputs.append(moments)
    return names
