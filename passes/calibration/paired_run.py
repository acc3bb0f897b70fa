"""Run a model beside itself with other weights, and compare their outputs.

Both go through the model in pieces of bounded bytes, in step, so that the weights of one piece and
the outputs of one input are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.cache_outputs import without_caches
from onnxcomp.passes.calibration.output_difference import OutputDifference, kinds_by_name
from onnxcomp.passes.calibration.perturbation import opened
from onnxcomp.passes.calibration.segmented_run import Chain, read_values
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = ["paired_difference"]

# Bytes of weights of a piece, where the weights are not larger.
_PIECE = 1 << 28

# Weights, as they are stored, and other initializers that differ, by name.
Changes = Callable[[Sequence[WeightSite]], Iterable[Mapping[str, Array]]]


def paired_difference(
    model: ir.Model,
    sites: Sequence[WeightSite],
    feeds: Sequence[Feed],
    changes: Changes,
    *,
    folder: Path | None = None,
) -> OutputDifference:
    """How far outputs are from those of the dense weights.

    Caches of a decoder are not looked at where there are other outputs.

    Args:
        model: The canonical model; only read.
        sites: Its weights.
        feeds: Inputs by name.
        changes: Gives initializers of some weights that differ, weight by weight; called once for
            each weight that outputs depend on, with all those of one piece, in order.
        folder: Where pieces are written for ONNX Runtime.

    Raises:
        ModelError: The model does not run.
    """
    model = opened(without_caches(model), sites)
    names = {site.name for site in sites}
    fed = [value for value in model.graph.inputs if value.name not in names]
    model.graph.inputs.clear()
    model.graph.inputs.extend(fed)
    made = {value.name or "" for node in model.graph for value in node.outputs}
    outputs = [value.name or "" for value in model.graph.outputs if value.name in made]
    pieces = _pieces(model, sites, _PIECE)
    groups = [[cut] for cut, _ in pieces[:-1]] + [outputs]
    dense = Chain(model, feeds, groups, folder, library=False)
    other = Chain(model, feeds, groups, folder, library=False)
    found = OutputDifference(kinds_by_name(model))
    for group, (_, own) in zip(groups, pieces, strict=True):
        for changed in changes(own):
            for name, array in changed.items():
                other.replace(name, array)
        runs = zip(dense.advance(group), other.advance(group), strict=True)
        for exact, now in runs:
            if group is outputs:
                found.add({n: a for n, a in exact.items() if a.dtype.kind == "f"}, now)
    return found


def _pieces(
    model: ir.Model, sites: Sequence[WeightSite], most: int
) -> list[tuple[str, list[WeightSite]]]:
    """Weights in the order of their first use, in pieces, each with a value made at its end."""
    left = {site.name: site for site in sites}
    pieces: list[tuple[str, list[WeightSite]]] = [("", [])]
    size = 0
    for node in model.graph:
        names = sorted({value.name or "" for value in read_values(node)})
        own = [left.pop(name) for name in names if name in left]
        more = sum(site.nbytes for site in own)
        if size and size + more > most and pieces[-1][0]:
            pieces.append(("", []))
            size = 0
        size += more
        pieces[-1] = (node.outputs[0].name or pieces[-1][0], [*pieces[-1][1], *own])
    return pieces
