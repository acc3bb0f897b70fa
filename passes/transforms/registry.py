"""The graph passes in the order in which they run, those of other packages included.

A package adds a pass by an entry point of the group `GROUP`. It runs right behind the last pass
that it requires, before everything else if it requires none. A package that does not load is
warned of and left out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from importlib.metadata import EntryPoint

from onnxcomp import plugins
from onnxcomp.errors import UsageError
from onnxcomp.passes.transforms.canonical_form import CANONICAL_FORM
from onnxcomp.passes.transforms.canonicalize import Canonicalize
from onnxcomp.passes.transforms.dedup_index_tables import IndexedWeights
from onnxcomp.passes.transforms.dedup_values import RepeatedValues
from onnxcomp.passes.transforms.fold_linear_chains import LinearChains
from onnxcomp.passes.transforms.lower_shared_weights import SharedWeights
from onnxcomp.passes.transforms.masked_weights import MaskedWeights
from onnxcomp.passes.transforms.pass_manager import GraphPass
from onnxcomp.passes.transforms.prune.graph_pass import Prune, PruneExperts, PruneLayers
from onnxcomp.passes.transforms.returned_weights import ReturnedWeights
from onnxcomp.passes.transforms.sparsify import Sparsify
from onnxcomp.passes.transforms.split_fused import SplitFused

__all__ = ["GRAPH_PASSES", "GROUP", "graph_passes"]

log = logging.getLogger(__name__)

GROUP = "onnxcomp.passes"

GRAPH_PASSES: tuple[GraphPass, ...] = (
    IndexedWeights(),
    Canonicalize(),
    ReturnedWeights(),
    MaskedWeights(),
    SplitFused(),
    SharedWeights(),
    RepeatedValues(),
    LinearChains(),
    PruneExperts(),
    PruneLayers(),
    Prune(),
    Sparsify(),
)


@functools.cache
def graph_passes() -> tuple[GraphPass, ...]:
    """All passes, looked for once in a process."""
    found: list[GraphPass] = []
    names = {graph_pass.name for graph_pass in GRAPH_PASSES}
    for point in plugins.find(GROUP):
        try:
            graph_pass = _load(point, names)
        except UsageError as error:
            log.warning("%s: it is left out (%s)", error.message, error.hint)
            continue
        names.add(graph_pass.name)
        found.append(graph_pass)
    return _ordered(found)


def _load(point: EntryPoint, taken: set[str]) -> GraphPass:
    """The pass of an entry point.

    Raises:
        UsageError: Its name is taken, it does not load, or it ensures what nobody can check.
    """
    if point.name in taken:
        raise UsageError(
            f"{plugins.origin(point)} has a pass named {point.name!r}, which is taken",
            hint="uninstall it, or ask its authors for another name",
        )
    graph_pass: GraphPass = plugins.load(point, "pass", plugins.members(GraphPass))
    unknown = sorted(set(graph_pass.ensures) - CANONICAL_FORM.keys())
    if unknown:
        raise UsageError(
            f"the pass {point.name!r} of {plugins.origin(point)} ensures {unknown[0]!r}, "
            "which is no predicate of the canonical form",
            hint=f"update or uninstall {plugins.origin(point)}",
        )
    return graph_pass


def _ordered(others: Sequence[GraphPass]) -> tuple[GraphPass, ...]:
    """Our passes with each of the others right behind the last one that it requires."""
    order = list(GRAPH_PASSES)
    waiting = list(others)
    while waiting:
        names = [graph_pass.name for graph_pass in order]
        ready = [other for other in waiting if set(other.requires) <= set(names)]
        if not ready:
            break
        places = [names.index(name) + 1 for name in ready[0].requires]
        order.insert(max(places, default=0), ready[0])
        waiting.remove(ready[0])
    for other in waiting:
        missing = sorted(set(other.requires) - {graph_pass.name for graph_pass in order})
        log.warning(
            "the pass %r requires %r, which there is not: it is left out", other.name, missing[0]
        )
    return tuple(order)
