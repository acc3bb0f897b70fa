"""Run a model piece by piece, where a session of all of it does not fit into memory.

Weights stay in their files until their piece runs, all inputs go through one piece after the
other, and only what later pieces read is held. A product with a large weight is cut into products
with some rows each. Another weight that is too large to be expanded when its piece is loaded is
decoded at each run, which takes more time and less memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxcomp.passes.calibration.segmented_run import Chain, read_values
from onnxcomp.passes.codecs.protocol import LoadMemory
from onnxcomp.passes.ir.traversal import subgraphs
from onnxcomp.passes.lowering.cut_products import cut_coded_products, cut_dense_products
from onnxcomp.passes.lowering.session_memory import expansions, tensor_bytes
from onnxcomp.passes.lowering.stages import end_waiting
from onnxcomp.passes.verification.clock import Clock
from onnxcomp.passes.verification.copies import Copy
from onnxcomp.passes.verification.forms import Signature

if TYPE_CHECKING:
    from onnxcomp.runtime.evaluate import Feed, Outputs

__all__ = ["Pieces"]

# Bytes that the weights of one piece take at most.
_MOST = 192 << 20

# Products with weights that take less memory are not cut.
_LEAST = 8 << 20

# How often a session holds a dense weight while it lays it out for its products.
_COPIES = 4

# Operators whose results may be no tensors, or differ from run to run.
_NO_TENSORS = ("Sequence", "SplitToSequence", "Optional", "ZipMap", "Loop", "If")
_RANDOM = ("Random", "Bernoulli", "Multinomial", "Dropout")


class Pieces:
    """A copy of a model that runs in pieces.

    Args:
        copy: The copy.
        library: Whether operators on codes run by the library's kernels.
        available: Bytes that the weights of one piece may take, if less than `_MOST`; more where
            a single weight does.

    Attributes:
        added: Keys of taps by the names of outputs that were added for them.
    """

    def __init__(self, copy: Copy, *, library: bool, available: int) -> None:
        self._model, self.added = copy.model()
        end_waiting(self._model)
        limit = min(_MOST, available)
        cut_dense_products(self._model, max(_LEAST, limit) // _COPIES)
        if not library:
            cut_coded_products(self._model, max(_LEAST, limit))
        self._library = library
        self._outputs = [value.name or "" for value in self._model.graph.outputs]
        work = _Weights(self._model, library=library)
        self._repeat = work.constant
        self._pieces = work.pieces(limit) or [_Piece("", folded=True)]

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def signature(self) -> Signature:
        """What the model declares of its inputs and outputs."""
        return Signature.of_graph(self._model.graph, self.added)

    def outputs(self, feeds: Sequence[Feed], clock: Clock) -> list[Outputs]:
        """What comes out of each input, taps by their keys; nothing is timed.

        Raises:
            ModelError: ONNX Runtime cannot load or run a piece.
        """
        from onnxcomp.runtime.evaluate import named_arrays

        del clock  # runs in pieces cannot be compared with whole ones
        graph = self._model.graph
        stored = {
            name: value.const_value.numpy()
            for name, value in graph.initializers.items()
            if name in self._outputs and value.const_value is not None
        }
        last = [name for name in self._outputs if name not in stored]
        groups = [(piece.end,) for piece in self._pieces[:-1]]
        chain = Chain(
            self._model, feeds, [*groups, last], library=self._library, repeat=self._repeat
        )
        for group, piece in zip(groups, self._pieces, strict=False):
            for _ in chain.advance(group, folded=piece.folded):
                pass
        found = []
        for values in chain.advance(last, folded=self._pieces[-1].folded):
            results = {**values, **stored}
            arrays = named_arrays((name, results[name]) for name in self._outputs)
            found.append({self.added.get(name, name): array for name, array in arrays.items()})
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring nodes.

    Attributes:
        end: A value that the last node of the piece gives.
        folded: Whether its weights may be expanded when it is loaded.
    """

    end: str
    folded: bool


class _Weights:
    """Which weights each node of the main graph needs, and where the graph can be cut.

    Attributes:
        constant: Numbers of the nodes that depend on weights alone.
    """

    def __init__(self, model: ir.Model, *, library: bool) -> None:
        self._nodes = list(model.graph)
        self._number = {
            value: number for number, node in enumerate(self._nodes) for value in node.outputs
        }
        inner = dict(_owners(self._nodes))
        self._needs: dict[int, list[LoadMemory]] = {}
        for node, need in expansions(model, library=library):
            if node in inner:
                self._needs.setdefault(inner[node], []).append(need)
        self._inputs = {value for value in model.graph.inputs if not value.is_initializer()}
        self._results = set(model.graph.outputs)
        self.constant = self._constant()

    def _constant(self) -> frozenset[int]:
        """Nodes that read nothing but initializers and one another."""
        found: set[int] = set()
        for number, node in enumerate(self._nodes):
            if node.op_type.startswith((*_RANDOM, *_NO_TENSORS)):
                continue
            read = [value for value in read_values(node) if value not in self._inputs]
            known = [self._number[value] in found for value in read if value in self._number]
            if len(read) == len(list(read_values(node))) and all(known):
                found.add(number)
        return frozenset(found)

    def _stored(self, number: int) -> tuple[dict[ir.Value, int], list[LoadMemory]]:
        """Initializers that a node or what is computed again for it reads, and its expansions."""
        tensors: dict[ir.Value, int] = {}
        pending, seen = [number], {number}
        while pending:
            for value in read_values(self._nodes[pending.pop()]):
                if value.is_initializer() and value.const_value is not None:
                    tensors[value] = tensor_bytes(value.const_value)
                maker = self._number.get(value)
                if maker is not None and maker in self.constant and maker not in seen:
                    seen.add(maker)
                    pending.append(maker)
        return tensors, [need for one in sorted(seen) for need in self._needs.get(one, ())]

    def _crossings(self) -> list[int | None]:
        """Values that are held behind each node; None where one of them may be no tensor."""
        reach: dict[ir.Value, int] = dict.fromkeys(self._results, len(self._nodes))
        for number, node in enumerate(self._nodes):
            reach |= {value: max(reach.get(value, -1), number) for value in read_values(node)}
        changes, odd = [0] * (len(self._nodes) + 1), [0] * (len(self._nodes) + 1)
        for value, last in reach.items():
            first = self._number.get(value)
            if first is None or first in self.constant or last <= first:
                continue
            for counts in (changes, odd) if _maybe_no_tensor(value) else (changes,):
                counts[first] += 1
                counts[last] -= 1
        held, strange = itertools.accumulate(changes), itertools.accumulate(odd)
        named = [any(value.name for value in node.outputs) for node in self._nodes]
        return [h if n and not s else None for n, h, s in zip(named, held, strange, strict=False)]

    def pieces(self, limit: int) -> list[_Piece]:
        """Cut the graph so that each piece's weights keep the limit, where values held are few."""
        cost = [number for number in range(len(self._nodes)) if number not in self.constant]
        held = self._crossings()
        found, start = [], 0
        while start < len(cost):
            stop, needed = self._fitting(cost, start, limit)
            stop = len(cost) if stop >= len(cost) else self._best_cut(cost, start, stop, held)
            end = next((v.name for v in self._nodes[cost[stop - 1]].outputs if v.name), "")
            found.append(_Piece(end, needed <= limit))
            start = stop
        return found

    def _fitting(self, cost: Sequence[int], start: int, limit: int) -> tuple[int, int]:
        """Where the nodes from `start` end that keep the limit, one at least; what they need."""
        tensors: dict[ir.Value, int] = {}
        needs: list[LoadMemory] = []
        taken = 0
        for stop in range(start, len(cost)):
            more, expanded = self._stored(cost[stop])
            if not more and stop > start:
                continue
            tensors, needs = {**tensors, **more}, [*needs, *expanded]
            total = sum(tensors.values()) + sum(need.kept for need in needs)
            total += max((need.working for need in needs), default=0)
            if total > limit and stop > start and taken:
                return stop, taken
            taken = total
        return len(cost), taken

    def _best_cut(
        self, cost: Sequence[int], start: int, stop: int, held: Sequence[int | None]
    ) -> int:
        """The place behind which the fewest values are held, the last of them; or a later one."""
        begin = (start + 1 + stop) // 2
        places = [place for place in range(begin, stop + 1) if held[cost[place - 1]] is not None]
        if places:
            return min(reversed(places), key=lambda place: held[cost[place - 1]] or 0)
        later = (p for p in range(stop + 1, len(cost)) if held[cost[p - 1]] is not None)
        return next(later, len(cost))


def _owners(nodes: Sequence[ir.Node]) -> Mapping[ir.Node, int]:
    """The number of the main graph's node that each node lies in."""
    found: dict[ir.Node, int] = {}
    for number, node in enumerate(nodes):
        pending = [node]
        while pending:
            inner = pending.pop()
            found[inner] = number
            pending += [one for _, graph in subgraphs(inner) for one in graph]
    return found


def _maybe_no_tensor(value: ir.Value) -> bool:
    """Whether a value may be a sequence, an optional or a map."""
    if value.type is not None:
        return not isinstance(value.type, ir.TensorType)
    node = value.producer()
    if node is None or not node.op_type.startswith(_NO_TENSORS):
        return False
    place = node.outputs.index(value) + (node.op_type == "Loop")  # behind the condition
    ends = [graph.outputs[place] for _, graph in subgraphs(node) if place < len(graph.outputs)]
    return not ends or any(not isinstance(end.type, ir.TensorType) for end in ends)
