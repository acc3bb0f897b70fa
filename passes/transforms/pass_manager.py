"""The graph passes that run before weights are looked for, in their order.

A pass says what must have run before it, what it visits, and what holds after it. `run_passes`
checks all three.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.transforms.canonical_form import (
    CANONICAL_FORM,
    Bodies,
    function_bodies,
    subgraph_bodies,
)
from onnxcomp.passes.weight import Feed
from onnxcomp.runtime.activity import activity

__all__ = ["Context", "GraphPass", "no_feeds", "run_passes"]

log = logging.getLogger(__name__)


def no_feeds() -> None:
    """Where no calibration inputs are given."""


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What a graph pass may look at besides the model.

    Attributes:
        settings: What is asked for.
        feeds: Gives the calibration inputs, read on the first call; None where there are none.
    """

    settings: Settings
    feeds: Callable[[], Sequence[Feed] | None] = no_feeds


class GraphPass(Protocol):
    """A change of the graph that knows no codec. A new pass derives from this class.

    Attributes:
        name: What it is called in logs.
        requires: Names of passes that must have run before it.
        ensures: Predicates of `CANONICAL_FORM` that hold once it has run, and from then on.
        subgraphs: Whether it changes the bodies of If, Loop and Scan.
        functions: Whether it changes model-local functions.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    ensures: ClassVar[tuple[str, ...]] = ()
    subgraphs: ClassVar[bool] = False
    functions: ClassVar[bool] = False

    def wanted(self, settings: Settings) -> bool:
        """Whether the settings ask for it."""
        ...

    def run(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place."""
        ...


def run_passes(
    model: ir.Model, context: Context, passes: Sequence[GraphPass]
) -> Mapping[str, Change]:
    """Run the passes that the settings ask for, in order; what each changed, by name.

    Raises:
        CompressionError: A pass comes before one that it requires, changes what it says it does
            not visit, or leaves the model in another form than was ensured.
    """
    done: dict[str, Change] = {}
    ensured: dict[str, str] = {}
    for graph_pass in passes:
        if not graph_pass.wanted(context.settings):
            continue
        missing = [name for name in graph_pass.requires if name not in done]
        if missing:
            raise CompressionError(
                f"pass {graph_pass.name!r} must come after {missing[0]!r}, which has not run",
                hint="`wanted` of a pass is false where one that it requires is not wanted",
            )
        activity("preparing the graph", item=graph_pass.name)
        before = _left_alone(graph_pass, model)
        done[graph_pass.name] = change = graph_pass.run(model, context)
        _compare(graph_pass, before, _left_alone(graph_pass, model))
        ensured |= {name: graph_pass.name for name in graph_pass.ensures if name not in ensured}
        _verify(graph_pass, model, ensured)
        log.info("%s: %d changes", graph_pass.name, change.count)
        for note in change.notes:
            log.debug("%s: %s", graph_pass.name, note)
    return done


def _left_alone(graph_pass: GraphPass, model: ir.Model) -> dict[str, Bodies]:
    """What a pass does not visit."""
    found: dict[str, Bodies] = {}
    if not graph_pass.subgraphs:
        found["subgraphs"] = subgraph_bodies(model)
    if not graph_pass.functions:
        found["functions"] = function_bodies(model)
    return found


def _compare(
    graph_pass: GraphPass, before: Mapping[str, Bodies], after: Mapping[str, Bodies]
) -> None:
    """Bodies that were there and still are must be what they were."""
    for what, bodies in before.items():
        left = after[what]
        if any(key in left and not body.same(left[key]) for key, body in bodies.items()):
            raise CompressionError(
                f"pass {graph_pass.name!r} has changed the body of one of the model's {what}, "
                "which it says it does not visit",
                hint=f"the class of the pass needs `{what} = True`",
            )


def _verify(graph_pass: GraphPass, model: ir.Model, ensured: Mapping[str, str]) -> None:
    """Hold the predicates against the model."""
    for name, source in ensured.items():
        found = CANONICAL_FORM[name](model)
        if found is not None:
            raise CompressionError(
                f"after pass {graph_pass.name!r} {found}; {source} ensures that {name}",
                hint="this is a fault of the pass: please report it to its authors",
            )
