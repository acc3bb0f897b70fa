"""Take out whole residual branches: those that the outputs miss least.

``y = x + f(x)`` becomes ``y = x``, and all nodes that make ``f(x)`` alone go. A branch can go where
``f`` depends on ``x``, has the shape of it, and nothing else reads what is inside: a branch that
fills a cache stays. Each branch is left out on calibration inputs, and the loss of the outputs
counts. After one is gone, the best few of the others are measured again. Visits the main graph.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.calibration.segmented_run import read_values
from onnxcomp.passes.ir.model import Change, copy_model
from onnxcomp.passes.ir.traversal import (
    Names,
    is_default_domain,
    new_initializer,
    remove_dead,
    remove_initializer,
)
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.transforms.prune.observed_shapes import observe_shapes
from onnxcomp.passes.transforms.prune.output_loss import OutputLoss
from onnxcomp.passes.weight import Feed

__all__ = ["Branch", "branches", "prune_layers"]

log = logging.getLogger(__name__)

# Inputs that outputs are compared on.
_PROBES = 8

# Branches that are measured again when one is gone.
_AGAIN = 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A residual branch that may go.

    Attributes:
        node: The Add at its end.
        place: Which input of the Add it makes.
        nodes: The nodes that go with it.
    """

    node: ir.Node
    place: int
    nodes: frozenset[ir.Node]

    @property
    def name(self) -> str:
        """Name of the sum."""
        return self.node.outputs[0].name or ""

    @property
    def stays(self) -> ir.Value:
        """What takes the place of the sum."""
        value = self.node.inputs[1 - self.place]
        assert value is not None
        return value


def prune_layers(model: ir.Model, context: Context) -> Change:
    """Take the branches out of a model, in place, that the outputs miss least.

    Raises:
        UsageError: There are no calibration inputs.
        ModelError: The model does not run on them.
    """
    feeds = context.feeds()
    if not feeds:
        raise UsageError(
            "whole layers go by what the outputs lose, and there are no inputs to see it on",
            hint="give --data",
        )
    found = list(branches(model, feeds[0]))
    if not found:
        log.warning("--prune-layers found no residual branch that could go")
        return Change(0, ())
    asked = context.settings.prune_layers or 0
    notes = []
    for branch, loss in _chosen(model, found, feeds, asked):
        notes.append(f"the branch that ends in {branch.name} goes: loss of outputs {loss:.3g}")
        log.warning("%s", notes[-1])
        _cut(model, branch)
    if len(notes) < asked:
        log.warning("%d branches can go, %d were asked for", len(notes), asked)
    return Change(len(notes), tuple(notes))


def branches(model: ir.Model, feed: Feed) -> Iterator[Branch]:
    """The residual branches of the main graph that may go, in graph order.

    Args:
        model: A model with named values; only read.
        feed: Inputs it accepts, to learn shapes from.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    shapes = observe_shapes(model, [feed]).shapes
    positions = {node: number for number, node in enumerate(model.graph)}
    for node in model.graph:
        if node.op_type != "Add" or not is_default_domain(node.domain):
            continue
        if node.outputs[0].is_graph_output():
            continue
        for place in (1, 0):
            made, other = node.inputs[place], node.inputs[1 - place]
            if made is None or other is None or made.producer() is None or made is other:
                continue
            sizes = {shapes.get(v.name or "") for v in (made, other, node.outputs[0])}
            if len(sizes) != 1 or None in sizes:
                continue
            between = _between(other, made, positions)
            gone = _only_for(node, place)
            if between and between <= gone and any(_has_weight(inner) for inner in gone):
                yield Branch(node, place, frozenset(gone))
                break


def _between(start: ir.Value, end: ir.Value, places: Mapping[ir.Node, int]) -> set[ir.Node]:
    """The nodes on the ways from one value to another one; none where there is no way."""
    before: set[ir.Node] = set()
    pending = [end]
    while pending:
        producer = pending.pop().producer()
        if producer is not None and producer not in before:
            before.add(producer)
            pending += [value for value in read_values(producer) if value is not start]
    found: set[ir.Node] = set()
    for node in sorted(before & places.keys(), key=lambda node: places[node]):
        if any(value is start or value.producer() in found for value in read_values(node)):
            found.add(node)
    return found


def _only_for(node: ir.Node, place: int) -> set[ir.Node]:
    """The nodes that nobody needs without an input of a node."""
    gone: set[ir.Node] = set()
    pending = [node.inputs[place]]
    while pending:
        value = pending.pop()
        producer = None if value is None else value.producer()
        if producer is None or producer in gone:
            continue
        free = all(
            not out.is_graph_output()
            and all(use.node in gone or tuple(use) == (node, place) for use in out.uses())
            for out in producer.outputs
        )
        if free:
            gone.add(producer)
            pending += list(read_values(producer))
    return gone


def _has_weight(node: ir.Node) -> bool:
    return any(
        value is not None and value.is_initializer() and len(value.shape or ()) > 1
        for value in node.inputs
    )


def _chosen(
    model: ir.Model, found: Sequence[Branch], feeds: Sequence[Feed], asked: int
) -> Iterator[tuple[Branch, float]]:
    """Branches in the order in which they go, each with the loss behind it."""
    copy = copy_model(model)
    gates = _with_gates(copy, [branch.name for branch in found], [b.place for b in found])
    closed = np.zeros((), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        loss = OutputLoss(copy, gates, feeds, _PROBES, Path(folder))
        gone: list[int] = []
        known = _losses(loss, gates, gone, range(len(found)), closed)
        while known and len(gone) < asked:
            best = min(known, key=lambda number: (known[number], number))
            gone.append(best)
            yield found[best], known.pop(best)
            known = {n: own for n, own in known.items() if found[n].node not in found[best].nodes}
            if len(gone) < asked:
                some = sorted(known, key=lambda number: known[number])[:_AGAIN]
                known |= _losses(loss, gates, gone, some, closed)


def _losses(
    loss: OutputLoss,
    gates: Sequence[str],
    gone: Sequence[int],
    numbers: Iterable[int],
    closed: np.ndarray,
) -> dict[int, float]:
    """For each branch the loss without it and those that are gone."""
    return {number: loss({gates[n]: closed for n in (*gone, number)}) for number in numbers}


def _with_gates(model: ir.Model, names: Sequence[str], places: Sequence[int]) -> list[str]:
    """Multiply branches by scalars of their own, which are 1; the names of these."""
    taken = Names(model)
    ends = {node.outputs[0].name: node for node in model.graph}
    gates = []
    for name, place in zip(names, places, strict=True):
        end = ends[name]
        made = end.inputs[place]
        assert made is not None
        kind = made.dtype or ir.DataType.FLOAT
        gate = new_initializer(model, taken.value("gate"), np.ones((), kind.numpy()))
        product = ir.node("Mul", [made, gate])
        product.outputs[0].name = taken.value("gated")
        model.graph.insert_before(end, product)
        end.replace_input_with(place, product.outputs[0])
        gates.append(gate.name or "")
    return gates


def _cut(model: ir.Model, branch: Branch) -> None:
    """Put what stays in the place of the sum, and remove what nobody needs then."""
    read = [value for node in branch.nodes for value in read_values(node)]
    branch.node.outputs[0].replace_all_uses_with(branch.stays)
    remove_dead(reversed(list(model.graph)))
    for value in read:
        if value.is_initializer() and value.graph is model.graph and not value.uses():
            remove_initializer(value)
