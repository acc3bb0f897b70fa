"""Where a model decides: the last floating-point values before it, and what was decided.

Outputs of ArgMax, NonMaxSuppression, NonZero or a greedy loop jump where a float moves by a
rounding: two correct forms of a model may disagree on them, and a few labels say nothing about the
loss. What can be compared are the floats that were decided on. A value *behind* a decision can be
compared only where the decision fell the same in both forms.

Visits the main graph, and the bodies of Loop and Scan nodes in it, whose values are seen iteration
by iteration. Branches of If and bodies of functions are not looked into.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from onnxcomp.passes.ir.tensors import is_float
from onnxcomp.passes.ir.traversal import is_default_domain, subgraphs

__all__ = ["Tap", "Taps", "find_taps", "is_discrete"]

# More values than these are not looked at: the copy of the model would not be the model any more.
_MOST = 256

# Operators that decide, whatever is known of the types of their outputs.
_DECIDES = frozenset(
    (
        *("ArgMax", "ArgMin", "TopK", "NonZero", "NonMaxSuppression", "Unique", "Hardmax"),
        *("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN", "IsInf"),
        *("Sign", "Floor", "Ceil", "Round", "Multinomial", "Bernoulli"),
    )
)

# Operators that round floats to steps: their results move by a step where the float moves by a
# rounding, and what follows is as continuous as before.
_ROUNDS = frozenset(("QuantizeLinear", "DynamicQuantizeLinear"))
_BYTES = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4))

# Operators whose result depends on the sizes of their input alone.
_SIZES = frozenset(("Shape", "Size"))

# Operators that give back elements of their inputs, or combine them to the same type.
_SAME_TYPE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "Clip", "CumSum"),
        *("Not", "And", "Or", "Xor", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd"),
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"),
        *("Reshape", "Slice", "Split", "Squeeze", "Unsqueeze", "Tile", "Transpose", "Pad"),
        *("Where", "Compress", "ScatterElements", "ScatterND", "Range", "OneHot"),
    )
)
# Inputs of these that say where or how much, and nothing of the type of the result.
_DATA = {"Where": (1, 2), "Concat": None, "Range": None, "Min": None, "Max": None}


@dataclasses.dataclass(frozen=True, slots=True)
class Tap:
    """One value to look at.

    Attributes:
        name: Name of the value.
        loop: First output of the Loop or Scan whose body computes it; empty in the main graph.
    """

    name: str
    loop: str = ""

    @property
    def key(self) -> str:
        """How the value is called among the outputs of a copy of the model."""
        return f"{self.loop}/{self.name}" if self.loop else self.name


@dataclasses.dataclass(frozen=True, slots=True)
class Taps:
    """What to look at in a model.

    Attributes:
        values: Floats that something is decided on.
        decisions: What was decided.
        behind: Keys of the decisions in front of each value and each output, by key.
        stepped: Outputs that are floats rounded to steps, as quantisation and images do it.
    """

    values: tuple[Tap, ...]
    decisions: tuple[Tap, ...]
    behind: Mapping[str, frozenset[str]]
    stepped: frozenset[str]

    @property
    def all(self) -> tuple[Tap, ...]:
        """Both, each once."""
        return tuple(dict.fromkeys((*self.values, *self.decisions)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What is known of one value.

    Attributes:
        computed: Whether it depends on the values of the model's inputs.
        discrete: Whether it holds integers, truth values or texts.
        stepped: Whether it holds floats rounded to integers.
        decisions: Keys of the decisions in front of it.
    """

    computed: bool = False
    discrete: bool = False
    stepped: bool = False
    decisions: frozenset[str] = frozenset()


def find_taps(model: ir.Model) -> Taps:
    """The values in front of the decisions that a model's outputs depend on; the model is read."""
    search = _Search()
    for value in model.graph.inputs:
        search.facts[value] = _Facts(computed=True, discrete=is_discrete(value))
    search.walk(model.graph, "")
    values = [*search.values]
    for output in model.graph.outputs:
        values += [Tap(value.name or "") for value in search.last_floats(output)]
    behind = {tap.key: search.behind(value) for tap, value in search.places.items()}
    behind |= {output.name or "": search.behind(output) for output in model.graph.outputs}
    for tap in values:
        behind.setdefault(tap.key, frozenset())
    stepped = {out.name or "" for out in model.graph.outputs if search.of(out).stepped}
    distinct = tuple(dict.fromkeys(values))[:_MOST]
    decisions = tuple(dict.fromkeys(search.decisions))[:_MOST]
    return Taps(distinct, decisions, behind, frozenset(stepped))


class _Search:
    """One walk through a model, in the order of its nodes.

    Attributes:
        facts: What is known of each value so far.
        values: Floats in front of decisions.
        decisions: The decisions.
        places: The value of each tap.
    """

    def __init__(self) -> None:
        self.facts: dict[ir.Value, _Facts] = {}
        self.values: list[Tap] = []
        self.decisions: list[Tap] = []
        self.places: dict[Tap, ir.Value] = {}
        self._bodies: dict[str, ir.Graph] = {}

    def of(self, value: ir.Value) -> _Facts:
        """What is known of a value; constants are not computed."""
        return self.facts.get(value) or _Facts(discrete=is_discrete(value))

    def behind(self, value: ir.Value) -> frozenset[str]:
        """Keys of the decisions in front of a value."""
        return self.of(value).decisions

    def walk(self, graph: ir.Graph, loop: str) -> None:
        """Look at the nodes of one graph, in the body of `loop` or in the main graph."""
        for node in graph:
            read = [value for value in (*node.inputs, *_captured(node)) if value is not None]
            known = [self.of(value) for value in read]
            front = frozenset().union(*(facts.decisions for facts in known))
            computed = any(facts.computed for facts in known) and not _of_sizes(node)
            if node.op_type in ("Loop", "Scan") and not loop and is_default_domain(node.domain):
                front |= self._body(node, computed)
            elif computed and self._decides(node):
                front |= self._decided(node, loop)
            self._describe(node, known, computed or bool(front), front)

    def _body(self, node: ir.Node, computed: bool) -> frozenset[str]:
        """Decisions in a body; what its own inputs hold is computed if anything is."""
        found: set[str] = set()
        name = next((value.name for value in node.outputs if value.name), "")
        for _, graph in subgraphs(node):
            before = len(self.decisions)
            self._bodies[name or ""] = graph
            for value in graph.inputs:
                self.facts[value] = _Facts(computed=computed, discrete=is_discrete(value))
            self.walk(graph, name or "")
            found |= {tap.key for tap in self.decisions[before:]}
        return frozenset(found)

    def _decides(self, node: ir.Node) -> bool:
        if _rounds(node) or not any(self._open(value) for value in node.inputs):
            return False
        if is_default_domain(node.domain) and node.op_type in _DECIDES:
            return True
        if node.op_type == "Cast" and is_default_domain(node.domain):
            return not is_float(ir.DataType(node.attributes.get_int("to", 1)))
        return not any(subgraphs(node)) and any(map(is_discrete, node.outputs))

    def _open(self, value: ir.Value | None) -> bool:
        """Whether a value holds floats that depend on the model's inputs, quantised ones too."""
        if value is None:
            return False
        facts = self.of(value)
        return facts.computed and (not facts.discrete or facts.stepped)

    def _decided(self, node: ir.Node, loop: str) -> frozenset[str]:
        """Note a decision; the keys of what it gives."""
        for value in node.inputs:
            if value is not None and self._open(value) and value.producer() is not None:
                self._tap(self.values, value, loop)
        sorts = node.op_type in ("TopK", "Unique")  # these give floats first
        made = [value for value in node.outputs[1 if sorts else 0 :] if value.name]
        return frozenset(self._tap(self.decisions, value, loop) for value in made)

    def _tap(self, taps: list[Tap], value: ir.Value, loop: str) -> str:
        node = value.producer()
        inside = node is not None and node.graph is self._bodies.get(loop)
        tap = Tap(value.name or "", loop if inside else "")
        taps.append(tap)
        self.places[tap] = value
        return tap.key

    def _describe(
        self, node: ir.Node, known: list[_Facts], computed: bool, front: frozenset[str]
    ) -> None:
        rounds = _rounds(node)
        passed = _moved(node, known)
        for value in node.outputs:
            discrete = is_discrete(value) or _made_discrete(node, value)
            if value.dtype is None and not discrete and passed:
                discrete = all(facts.discrete for facts in passed)
            stepped = rounds or (discrete and any(f.stepped for f in passed))
            self.facts[value] = _Facts(computed, discrete or rounds, stepped, front)

    def last_floats(self, output: ir.Value) -> Iterator[ir.Value]:
        """Floats that a discrete output is made of, going back through integers."""
        pending, seen = [output], {output}
        while pending:
            value = pending.pop()
            facts = self.of(value)
            if value is not output and not facts.discrete:
                if facts.computed and value.producer() is not None and value.name:
                    yield value
                continue
            node = value.producer()
            if not (facts.discrete and facts.computed) or node is None or any(subgraphs(node)):
                continue
            above = [item for item in node.inputs if item is not None and item not in seen]
            seen.update(above)
            pending += above


def is_discrete(value: ir.Value) -> bool:
    """Whether a value is known to hold integers, truth values or texts."""
    dtype = value.dtype
    if dtype is None and value.const_value is not None:
        dtype = value.const_value.dtype
    return dtype is not None and not is_float(dtype)


def _made_discrete(node: ir.Node, value: ir.Value) -> bool:
    """Whether an operator gives integers or truth values there, by its definition."""
    if not is_default_domain(node.domain):
        return False
    if node.op_type == "Cast":
        return not is_float(ir.DataType(node.attributes.get_int("to", 1)))
    if node.op_type in ("TopK", "Unique"):
        return value is not node.outputs[0]
    floats = ("Sign", "Floor", "Ceil", "Round", "Hardmax", "Bernoulli")
    return node.op_type in _SIZES or (node.op_type in _DECIDES and node.op_type not in floats)


def _rounds(node: ir.Node) -> bool:
    """Whether a node rounds floats to steps."""
    if not is_default_domain(node.domain):
        return False
    to_bytes = node.op_type == "Cast" and node.attributes.get_int("to", 1) in list(map(int, _BYTES))
    return node.op_type in _ROUNDS or to_bytes


def _of_sizes(node: ir.Node) -> bool:
    return node.op_type in _SIZES and is_default_domain(node.domain)


def _moved(node: ir.Node, known: list[_Facts]) -> list[_Facts]:
    """What is known of the inputs whose elements a node gives back; nothing for other nodes."""
    if node.op_type not in _SAME_TYPE or not is_default_domain(node.domain):
        return []
    chosen = _DATA.get(node.op_type, (0,))
    if node.op_type in ("Add", "Sub", "Mul", "Div", "Mod", "And", "Or", "Xor"):
        chosen = (0, 1)
    return known if chosen is None else [known[index] for index in chosen if index < len(known)]


def _captured(node: ir.Node) -> Iterable[ir.Value]:
    """Values of outer graphs that the subgraphs of a node read."""
    for _, graph in subgraphs(node):
        inside = {value for inner in _nested(graph) for value in inner.outputs}
        inside.update(*(set(g.inputs) for g in _graphs(graph)))
        for inner in _nested(graph):
            yield from (v for v in inner.inputs if v is not None and v not in inside)


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for _, inner in subgraphs(node):
            yield from _graphs(inner)


def _nested(graph: ir.Graph) -> Iterator[ir.Node]:
    for inner in _graphs(graph):
        yield from inner
