"""Run a model piece by piece, keeping for each input only what the rest of the model still reads.

Statistics of a weight are taken behind its compressed predecessors. In segments, one after the
other, that costs one pass over the data, not one for each weight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.elsewhere import Runs
from onnxcomp.passes.calibration.filed_values import filed, let_go
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.ir.traversal import subgraphs
from onnxcomp.passes.weight import Array
from onnxcomp.runtime.activity import activity
from onnxcomp.runtime.clients.patching import return_freed_memory

__all__ = ["Chain", "read_values", "segment", "segment_runner"]

Feed = Mapping[str, Array]

# Bytes of one value, over all inputs, from which on it is held in a file: its pages are in memory
# while it is read and no longer.
_MOST_HELD = 1 << 26

# What ONNX Runtime leaves out of its work on a graph.
_LEFT_OUT = "optimization.disable_specified_optimizers"


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Values a node reads, those its subgraphs capture included."""
    yield from (value for value in node.inputs if value is not None)
    for _, graph in subgraphs(node):
        for inner in graph:
            yield from read_values(inner)
        yield from graph.outputs


class Chain:
    """A model on its way through its nodes, for many inputs at once.

    Args:
        model: The model; only read. Its nodes are in topological order.
        feeds: Inputs by name.
        groups: Names of the main graph's values that will be asked for, in sets of values that
            are asked for together.
        folder: Where segments are written for ONNX Runtime; None for the system's place.
        library: Whether the operator library is registered where a segment has a use for it.
        repeat: Numbers of nodes that depend on weights alone: every segment that reads what they
            give computes it again, so that it is not held as a dense copy for each input.
        runs: Runs segments that need no library in other processes; None to do so here.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Feed],
        groups: Iterable[Sequence[str]],
        folder: Path | None = None,
        *,
        library: bool = True,
        repeat: frozenset[int] = frozenset(),
        runs: Runs | None = None,
    ) -> None:
        self._model = model
        self._runs = runs
        self._folder = folder if runs is None else runs.folder
        self._library = library
        self._repeat = repeat
        self._nodes = list(model.graph)
        self._producer = {
            value.name or "": index
            for index, node in enumerate(self._nodes)
            for value in node.outputs
        }
        self._read: dict[str, int] = {}
        self._needed, self._last = self._plan(list(groups))
        self._held: list[dict[str, Array]] = [dict(feed) for feed in feeds]
        self._weights: dict[str, Array] = {}
        self._done = 0

    def _plan(self, groups: Sequence[Sequence[str]]) -> tuple[list[int], dict[str, int]]:
        """Nodes that produce the values, and the last node that needs each value.

        What nodes read is told apart from what is only asked for.
        """
        needed: set[int] = set()
        last: dict[str, int] = {}
        for group in groups:
            stop = self.position(group)
            last.update({name: max(last.get(name, -1), stop) for name in group})
        pending = [self._producer[name] for name in last if name in self._producer]
        while pending:
            index = pending.pop()
            if index in needed:
                continue
            needed.add(index)
            for value in read_values(self._nodes[index]):
                name = value.name or ""
                self._read[name] = max(self._read.get(name, -1), index)
                last[name] = max(last.get(name, -1), index)
                if name in self._producer:
                    pending.append(self._producer[name])
        return sorted(needed), last

    def position(self, group: Sequence[str]) -> int:
        """Number of nodes that must have run before all values exist."""
        return max(self._producer.get(name, -1) + 1 for name in group)

    def replace(self, name: str, weight: Array) -> None:
        """Put other values in the place of an initializer, for the nodes that have not run."""
        known = self._model.graph.initializers.get(name)
        if known is not None and known.dtype is not None:  # in its type it may take half
            weight = weight.astype(known.dtype.numpy(), copy=False)
        self._weights[name] = weight

    def needs(self, name: str) -> bool:
        """Whether nodes that have not run read a value."""
        return self._last.get(name, -1) >= self._done

    @property
    def held(self) -> list[dict[str, Array]]:
        """For each input what the nodes that have not run still read."""
        return list(self._held)

    def resume(self, group: Sequence[str], held: Sequence[Mapping[str, Array]]) -> None:
        """Be where another chain of the same model and inputs was behind a group.

        Args:
            group: Values that the other chain was asked for last.
            held: What it held then.
        """
        self._held = [dict(values) for values in held]
        self._done = self.position(group)
        self._weights = {n: w for n, w in self._weights.items() if self.needs(n)}

    def advance(
        self,
        wanted: Sequence[str],
        *,
        folded: bool = True,
        final: Collection[str] = (),
        apart: bool = False,
    ) -> Iterator[dict[str, Array]]:
        """Run the nodes up to some values, one input after the other.

        Args:
            wanted: Values to return: one of the groups the chain was made for, whose position is
                not before that of the last call.
            folded: Whether ONNX Runtime may compute what depends on weights alone when it loads
                the segment. If not, each run does, in less memory.
            final: Those of the values that no later call asks for: they are held no longer than
                they are read.
            apart: Whether the values of all inputs are wanted at once, behind the session: they
                lie in files where they are much, as those that are held do.

        Yields:
            For each input the values by name.

        Raises:
            ModelError: ONNX Runtime cannot load or run the segment.
        """
        stop = self.position(wanted)
        activity("running the model", self._done, len(self._nodes), f"up to {wanted[0]}")
        part = [index for index in self._needed if self._done <= index < stop]
        later = {name for name, last in self._last.items() if last >= stop}
        later -= {name for name in final if self._read.get(name, -1) < stop}
        made = {value.name or "" for index in part for value in self._nodes[index].outputs}
        again = {v.name or "" for index in self._repeat for v in self._nodes[index].outputs}
        outputs = sorted(made & ((later - again) | set(wanted)))
        part = self._with_repeated(part, outputs)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            found = self._results(part, outputs, Path(folder), folded)
            for number, held in enumerate(self._held):
                held = {**held, **next(found)}
                kept = later.union(wanted) if apart else later
                held |= {name: self._filed(array) for name, array in held.items() if name in kept}
                self._held[number] = {name: a for name, a in held.items() if name in later}
                yield {name: held[name] for name in wanted}
                for array in held.values():
                    let_go(array)
            found.close()  # its session goes, and its memory with it
        return_freed_memory()
        self._done = max(self._done, stop)
        self._weights = {n: w for n, w in self._weights.items() if self.needs(n)}

    def _filed(self, array: Array) -> Array:
        """The same values, in a file of no name where they are much and are held here."""
        plain = isinstance(array, np.ndarray) and not array.dtype.hasobject
        if not plain or self._runs is not None or array.nbytes * len(self._held) < _MOST_HELD:
            return array
        return filed(array, self._folder)

    def _with_repeated(self, part: list[int], outputs: Sequence[str]) -> list[int]:
        """The nodes of a segment with those that are computed again for them, and no others."""
        if not self._repeat:
            return part
        pending = [index for index in part if index not in self._repeat]
        pending += [self._producer[name] for name in outputs]
        found = set(pending)
        while pending:
            for value in read_values(self._nodes[pending.pop()]):
                index = self._producer.get(value.name or "", -1)
                if index in self._repeat and index not in found:
                    found.add(index)
                    pending.append(index)
        return sorted(found)

    def _results(
        self, part: Sequence[int], outputs: Sequence[str], folder: Path, folded: bool
    ) -> Generator[dict[str, Array], None, None]:
        """The outputs of a segment for each input."""
        from onnxcomp.runtime.session import needs_library

        if not outputs or not self._held:
            yield from ({} for _ in self._held)
            return
        model = segment(self._model, part, outputs, self._held[0], self._weights)
        path = Path(save(model, folder / "segment.onnx").files[0])
        del model
        library = self._library and needs_library(path)
        if self._runs is not None and not library:
            self._runs.keep(array for held in self._held for array in held.values())
            yield from self._runs.run(path, outputs, list(self._held))
            return
        run = segment_runner(path, outputs, folded=folded, library=library)
        for held in list(self._held):
            yield run(held)


def segment_runner(
    path: Path,
    outputs: Sequence[str],
    *,
    folded: bool = True,
    library: bool = False,
    threads: int | None = None,
) -> Callable[[Feed], dict[str, Array]]:
    """A function from held values to the outputs of a segment.

    Args:
        path: The segment.
        outputs: Names of what it gives.
        folded: Whether ONNX Runtime may compute what depends on weights alone when it loads it.
        library: Whether the operator library is registered.
        threads: Threads of one operator; None for ONNX Runtime's choice.
    """
    from onnxcomp.runtime.evaluate import runner
    from onnxcomp.runtime.session import import_runtime, open_session

    options = import_runtime().SessionOptions()
    options.log_severity_level = 4
    # Between segments the threads would wait in a loop, while encoders want the processors.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not folded:
        options.add_session_config_entry(_LEFT_OUT, "ConstantFolding")
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    session = open_session(path, library=library, session_options=options, threads=threads)
    names = [value.name for value in session.get_inputs()]
    call = runner(session)

    def run(held: Feed) -> dict[str, Array]:
        results = call({name: held[name] for name in names})
        return dict(zip(outputs, results, strict=True))

    return run


def segment(
    model: ir.Model,
    part: Sequence[int],
    outputs: Sequence[str],
    held: Feed,
    weights: Mapping[str, Array],
) -> ir.Model:
    """A model of some nodes that reads what is held and returns the outputs.

    It is made of these nodes alone: a model in many pieces is not copied for each of them. Tensors
    and functions are those of the model.

    Args:
        model: The model.
        part: Numbers of the nodes, in order.
        outputs: Names of the values to return.
        held: Values that may be read, of one input.
        weights: What is in the place of initializers.

    Raises:
        ModelError: A value that is read is no tensor.
    """
    graph, everything = model.graph, list(model.graph)
    nodes = [everything[index] for index in part]
    made = {value.name: value for node in nodes for value in node.outputs}
    read = {value.name: value for node in nodes for value in read_values(node)}
    initializers = [value for name, value in graph.initializers.items() if name in read]
    declared = [value for value in graph.inputs if value.name in held or value.name in read]
    declared = [value for value in declared if not value.is_initializer() or value.name in read]
    fed = [v for v in read.values() if _is_of(v.producer(), graph) and v.name not in made]
    view = ir.GraphView(
        [*declared, *fed],
        [made[name] for name in outputs],
        nodes=nodes,
        initializers=initializers,
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    copy = view.clone()
    copy.meta.update(graph.meta)
    for value in copy.inputs[len(declared) :]:
        _describe(value, held[value.name or ""])
    for name, array in weights.items():
        changed = copy.initializers.get(name)
        if changed is not None:
            assert changed.const_value is not None
            kind = changed.const_value.dtype
            values = array.astype(kind.numpy(), copy=False)
            changed.const_value = ir.Tensor(values, dtype=kind, name=name)
    return ir.Model(copy, ir_version=model.ir_version, functions=_called(model, nodes))


def _is_of(node: ir.Node | None, graph: ir.Graph) -> bool:
    return node is not None and node.graph is graph


def _called(model: ir.Model, nodes: Sequence[ir.Node]) -> list[ir.Function]:
    """The functions that some nodes call, and those that these call."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        pending.extend(inner for _, graph in subgraphs(node) for inner in graph)
        key = node.op_identifier()
        if key in model.functions and key not in found:
            found[key] = model.functions[key]
            pending.extend(found[key])
    return [function for key, function in model.functions.items() if key in found]


def _describe(value: ir.Value, sample: Array) -> None:
    """Give an input the type of a value that it may have."""
    if not isinstance(sample, np.ndarray):
        raise ModelError(f"value {value.name!r} is not a tensor: the model cannot be split there")
    text = sample.dtype.kind in "OSU"
    value.type = ir.TensorType(ir.DataType.STRING if text else ir.DataType.from_numpy(sample.dtype))
    value.shape = ir.Shape([None] * sample.ndim)
    value.const_value = None
