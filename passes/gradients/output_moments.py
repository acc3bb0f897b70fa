"""How much the loss of a model's outputs curves by the products of its weights, and by look-ups.

For a weight ``W (rows, length)`` with products ``y = W x`` an error ``E`` of the weight costs
``tr(H E G E^T) / 2``, with the second moments ``G = E[x x^T]`` of the inputs and the curvature
``H = E[g g^T]`` by the products: one factor for each side (Martens and Grosse, arXiv 1503.05671).
Of a table whose rows are looked up, ``H`` is that by the rows, and an error costs ``tr(E H E^T)``.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.cache_outputs import without_caches
from onnxcomp.passes.calibration.filed_values import filed, let_go
from onnxcomp.passes.calibration.second_moments import add_products, mirror
from onnxcomp.passes.calibration.sensitivity import small_pieces
from onnxcomp.passes.gradients.backward import backward, with_shapes
from onnxcomp.passes.gradients.curvature import curvature_seeds
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

# Bytes of vectors that come back from samples which run together, that are held before they are
# summed up, and of sums that are not in files. What a run takes besides is in proportion to them.
_HELD = 1 << 28


@dataclasses.dataclass(slots=True)
class Curvature:
    """The curvature of the loss by vectors of one kind.

    Attributes:
        moments: Mean over inputs of the sums of ``g g^T``, float64 ``(width, width)``.
        vectors: How many vectors were looked at.
    """

    moments: Array
    vectors: int


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
    return small_pieces(model, feeds, max(1, _HELD // (4 * width))) if feeds else feeds


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
        sums = _Sums({site.name: width for site, width in widths.items()}, folder)
        for feed in feeds:
            activity("looking at the loss", done, count, "inputs")
            done += 1
            results = run_session(session, feed)
            sums.add((site, results.pop(name)) for name, site in names.items())
        found.append(sums.means(len(feeds)))
    del session
    return_freed_memory()
    return found


class _Sums:
    """Sums of ``g g^T``, of all weights at once.

    Vectors are held until they are many, so that few of them do not touch all of the sums. Where
    the sums of all weights are large, they lie in files.

    Args:
        widths: Of vectors, by name of the weight.
        folder: Where the files lie.
    """

    def __init__(self, widths: Mapping[str, int], folder: Path) -> None:
        self._widths, self._folder = widths, folder
        self._large = sum(8 * width * width for width in widths.values()) > _HELD
        self._held: dict[str, list[Array]] = {}
        self._bytes = 0
        self._totals: dict[str, Curvature] = {}

    def add(self, found: Iterable[tuple[str, Array]]) -> None:
        """Take in vectors ``(n, width)`` by name; a name may come several times."""
        for name, vectors in found:
            self._held.setdefault(name, []).append(vectors)
            self._bytes += vectors.nbytes
        if self._bytes > _HELD:
            self._sum_up()

    def _sum_up(self) -> None:
        for name in list(self._held):
            vectors = np.concatenate(self._held.pop(name))
            total = self._totals.get(name) or self._totals.setdefault(name, self._zeros(name))
            with np.errstate(over="ignore", invalid="ignore"):
                add_products(total.moments, vectors, vectors, lower=True)
            total.vectors += len(vectors)
            let_go(total.moments)
        self._bytes = 0

    def _zeros(self, name: str) -> Curvature:
        moments = np.zeros((self._widths[name],) * 2)
        return Curvature(filed(moments, self._folder) if self._large else moments, 0)

    def means(self, count: int) -> dict[str, Curvature]:
        """Means over so many inputs, of those weights that the loss feels at all."""
        self._sum_up()
        for name, total in list(self._totals.items()):
            total.moments /= count
            mirror(total.moments)
            if not _known(total.moments):
                del self._totals[name]
            let_go(total.moments)
        return self._totals


def _known(total: Array) -> bool:
    return bool(np.isfinite(total).all()) and float(np.trace(total)) > 0.0


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
