"""How much the loss of a model's outputs curves by the products of its weights, and by look-ups.

For a weight ``W (rows, length)`` with products ``y = W x`` an error ``E`` of the weight costs
``tr(H E G E^T) / 2``, with the second moments ``G = E[x x^T]`` of the inputs and the curvature
``H = E[g g^T]`` by the products: one factor for each side (Martens and Grosse, arXiv 1503.05671).
Of a table whose rows are looked up, ``H`` is that by the rows, and an error costs ``tr(E H E^T)``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.cache_outputs import without_caches
from onnxcomp.passes.calibration.sensitivity import small_pieces
from onnxcomp.passes.gradients import gradient_sums
from onnxcomp.passes.gradients.backward import backward, with_shapes
from onnxcomp.passes.gradients.curvature import curvature_seeds
from onnxcomp.passes.gradients.gradient_sums import Curvature, GradientSums
from onnxcomp.passes.gradients.lean_session import lean_session
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.weight import Array, Feed, WeightSite
from onnxcomp.runtime.activity import activity
from onnxcomp.runtime.clients.patching import return_freed_memory

__all__ = ["Curvature", "look_up_moments", "output_moments"]

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
    widths = {site: site.rows for site in sites}
    (found,) = _moments(model, widths, "matmul", [feeds], folder)
    return {name: curvature.moments for name, curvature in found.items()}


def look_up_moments(
    model: ir.Model,
    sites: Sequence[WeightSite],
    parts: Sequence[Sequence[Feed]],
    *,
    folder: Path | None = None,
) -> list[dict[str, Curvature]]:
    """The curvature by the rows that are looked up in tables.

    Args:
        model: The canonical dense model; only read.
        sites: Tables to look at.
        parts: Inputs by name, in parts that are looked at apart.
        folder: Where a temporary file lies.

    Returns:
        For each part by name the curvature, ``(length, length)``; without tables that have none,
        and without all those of a model that cannot be differentiated.
    """
    return _moments(model, {site: site.length for site in sites}, "gather", parts, folder)


def _moments(
    model: ir.Model,
    widths: Mapping[WeightSite, int],
    need: str,
    parts: Sequence[Sequence[Feed]],
    folder: Path | None,
) -> list[dict[str, Curvature]]:
    """For each part of the inputs the curvature by vectors of some widths."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    able = {s: width for s, width in widths.items() if width <= _WIDEST and not s.scope}
    if size > _LARGEST or not able or not any(parts):
        return [{} for _ in parts]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            pieces = [_cut(model, feeds, sum(widths.values())) for feeds in parts]
            return _measured(model, able, need, pieces, Path(place))
        except ModelError as error:
            log.info("the curvature of the loss is not known: %s", error.message)
            return [{} for _ in parts]


def _cut(model: ir.Model, feeds: Sequence[Feed], width: int) -> Sequence[Feed]:
    """Inputs for which vectors of so many elements in all, for each of theirs, are not too much."""
    return small_pieces(model, feeds, max(1, gradient_sums.HELD // (4 * width))) if feeds else feeds


def _measured(
    model: ir.Model,
    widths: Mapping[WeightSite, int],
    need: str,
    parts: Sequence[Sequence[Feed]],
    folder: Path,
) -> list[dict[str, Curvature]]:
    from onnxcomp.runtime.evaluate import run_session

    differentiated = without_caches(copy_model(model))
    names = _differentiate(differentiated, widths, need)
    session = lean_session(save(differentiated, folder / "curvature.onnx").files[0])
    count, done, found = sum(map(len, parts)), 0, []
    for feeds in parts:
        sums = GradientSums({site.name: width for site, width in widths.items()}, folder)
        for feed in feeds:
            activity("looking at the loss", done, count, "inputs")
            done += 1
            results = run_session(session, feed)
            sums.add((site, results.pop(name)) for name, site in names.items())
        found.append(sums.means(len(feeds)))
    del session
    return_freed_memory()
    return found


def _differentiate(model: ir.Model, widths: Mapping[WeightSite, int], need: str) -> dict[str, str]:
    """Make the gradients by products of weights, vectors ``(n, width)``, the only outputs.

    Returns:
        By name of an output the weight.
    """
    graph = model.graph
    with_shapes(model)
    nodes = {node.name: node for node in graph}
    results: dict[ir.Value, WeightSite] = {}
    for site in widths:
        for use in site.uses:
            node = nodes.get(use.node)
            if node is not None and use.need == need:
                results[node.outputs[0]] = site
    tape = Tape(model)
    seeds = curvature_seeds(tape, model)
    gradients = backward(tape, graph, seeds, list(results))
    graph.outputs.clear()
    names = {}
    for number, (value, gradient) in enumerate(gradients.items()):
        site = results[value]
        flat = tape.node("Reshape", [gradient, tape.integers(-1, widths[site])])
        flat.name = f"gradients/{number}"
        names[flat.name] = site.name
        graph.outputs.append(flat)
    return names
