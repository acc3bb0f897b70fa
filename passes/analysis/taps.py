"""Where a model decides: the last floating-point values before it, and what was decided.

Outputs of ArgMax, NonMaxSuppression, NonZero or a greedy loop jump where a float moves by a
rounding: two correct forms of a model may disagree on them, and a few labels say nothing about the
loss. What can be compared are the floats that were decided on. A value *behind* a decision can be
compared only where the decision fell the same in both forms.

Visits the main graph, the bodies of Loop and Scan nodes in it, whose values are seen iteration by
iteration, the branches of If nodes in it, and model-local functions that it calls once. What lies
deeper is not looked into.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from onnxcomp.passes.ir.tensors import is_float
from onnxcomp.passes.ir.traversal import is_default_domain, scopes, subgraphs

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
        loop: First output of the Loop or Scan whose body computes it, or of the If or the call of
            a function; empty in the main graph.
        once: Whether that body runs once: a branch, or a function.
        whole: Whether it holds integers or truth values.
    """

    name: str
    loop: str = ""
    once: bool = False
    whole: bool = False

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
    search = _Search(model)
    for value in model.graph.inputs:
        search.facts[value] = _Facts(computed=True, discrete=is_discrete(value))
    search.walk(model.graph, "")
    values = [*search.values]
    for output in model.graph.outputs:
        values += [search.tap(value) for value in search.last_floats(output)]
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

    def __init__(self, model: ir.Model) -> None:
        self.facts: dict[ir.Value, _Facts] = {}
        self.values: list[Tap] = []
        self.decisions: list[Tap] = []
        self.places: dict[Tap, ir.Value] = {}
        self._bodies: dict[ir.Graph, str] = {}
        self._once: set[str] = set()
        self._ends: dict[ir.Value, list[_Facts]] = {}
        self._arguments: dict[ir.Value, ir.Value] = {}
        self._functions = model.functions
        nodes = (node for scope in scopes(model) for node in scope.graph)
        self._calls = collections.Counter(node.op_identifier() for node in nodes)

    def of(self, value: ir.Value) -> _Facts:
        """What is known of a value; constants are not computed."""
        return self.facts.get(value) or _Facts(discrete=is_discrete(value))

    def behind(self, value: ir.Value) -> frozenset[str]:
        """Keys of the decisions in front of a value."""
        return self.of(value).decisions

    def walk(
        self, graph: Iterable[ir.Node], loop: str, before: frozenset[str] = frozenset()
    ) -> None:
        """Look at the nodes of one graph, in the body of `loop` or in the main graph.

        Args:
            graph: Its nodes.
            loop: See `Tap.loop`.
            before: Keys of the decisions that whatever is in it depends on.
        """
        for node in graph:
            read = [value for value in (*node.inputs, *_captured(node)) if value is not None]
            known = [self.of(value) for value in read]
            front = before.union(*(facts.decisions for facts in known))
            computed = any(facts.computed for facts in known) and not _of_sizes(node)
            standard = is_default_domain(node.domain)
            if node.op_type in ("Loop", "Scan") and not loop and standard:
                front |= self._body(node, computed)
            elif node.op_type == "If" and not loop and standard:
                front |= self._branches(node, front)
            elif not loop and self._calls_once(node):
                front |= self._function(node, front)
            elif (function := self._functions.get(node.op_identifier())) is not None:
                self._note_ends(node, function)
                front |= self._decided(node) if computed and self._decides(node) else frozenset()
            elif computed and self._decides(node):
                front |= self._decided(node)
            self._describe(node, known, computed or bool(front), front)

    def _body(self, node: ir.Node, computed: bool) -> frozenset[str]:
        """Decisions in a body; what its own inputs hold is computed if anything is."""
        graphs = [graph for _, graph in subgraphs(node)]
        for graph in graphs:
            for value in graph.inputs:
                self.facts[value] = _Facts(computed=computed, discrete=is_discrete(value))
        return self._inside(node, graphs, frozenset())

    def _branches(self, node: ir.Node, front: frozenset[str]) -> frozenset[str]:
        """Decisions in the branches of an If, which run where the ones before them fell so."""
        graphs = [graph for _, graph in subgraphs(node)]
        found = self._inside(node, graphs, front)
        for place, value in enumerate(node.outputs):
            ends = [self.of(graph.outputs[place]) for graph in graphs if place < len(graph.outputs)]
            self._ends[value] = ends
        return found

    def _calls_once(self, node: ir.Node) -> bool:
        identifier = node.op_identifier()
        return identifier in self._functions and self._calls[identifier] == 1

    def _function(self, node: ir.Node, front: frozenset[str]) -> frozenset[str]:
        """Decisions in a function; its inputs are what they are called with."""
        function = self._functions[node.op_identifier()]
        for inner, value in zip(function.inputs, node.inputs, strict=False):
            if value is not None:
                self.facts[inner] = self.of(value)
                self._arguments[inner] = value
        found = self._inside(node, [function.graph], front)
        self._note_ends(node, function)
        return found

    def _note_ends(self, node: ir.Node, function: ir.Function) -> None:
        """What a function gives, as far as its last nodes say."""
        for inner, value in zip(function.outputs, node.outputs, strict=False):
            last = inner.producer()
            whole = last is not None and _made_discrete(last, inner)
            self._ends[value] = [_Facts(discrete=True) if whole else self.of(inner)]

    def _inside(
        self, node: ir.Node, graphs: list[ir.Graph], front: frozenset[str]
    ) -> frozenset[str]:
        """Keys of the decisions in what a node holds."""
        name = next((value.name for value in node.outputs if value.name), "") or ""
        if node.op_type not in ("Loop", "Scan"):
            self._once.add(name)
        before = len(self.decisions)
        for graph in graphs:
            self._bodies[graph] = name
            self.walk(graph, name, front)
        return frozenset(tap.key for tap in self.decisions[before:])

    def _decides(self, node: ir.Node) -> bool:
        if _rounds(node) or not any(self._open(value) for value in node.inputs):
            return False
        if is_default_domain(node.domain) and node.op_type in _DECIDES:
            return True
        if node.op_type == "Cast" and is_default_domain(node.domain):
            return _cast_to_discrete(node)
        ends = [facts.discrete for value in node.outputs for facts in self._ends.get(value, ())]
        return not any(subgraphs(node)) and (any(ends) or any(map(is_discrete, node.outputs)))

    def _open(self, value: ir.Value | None) -> bool:
        """Whether a value holds floats that depend on the model's inputs, quantised ones too."""
        if value is None:
            return False
        facts = self.of(value)
        return facts.computed and (not facts.discrete or facts.stepped)

    def _decided(self, node: ir.Node) -> frozenset[str]:
        """Note a decision; the keys of what it gives."""
        for value in map(self._given, node.inputs):
            if value is not None and self._open(value) and value.producer() is not None:
                self.values.append(self.tap(value))
        sorts = node.op_type in ("TopK", "Unique")  # these give floats first
        made = [value for value in node.outputs[1 if sorts else 0 :] if value.name]
        taps = [self.tap(value, _made_discrete(node, value)) for value in made]
        self.decisions += taps
        return frozenset(tap.key for tap in taps)

    def _given(self, value: ir.Value | None) -> ir.Value | None:
        """What an input of a function is in the call; any other value itself."""
        return None if value is None else self._arguments.get(value, value)

    def tap(self, value: ir.Value, whole: bool = False) -> Tap:
        """How a value is looked at.

        Args:
            value: It is computed in the main graph or a body.
            whole: Whether it is known to hold integers; they may be known from its type.
        """
        node = value.producer()
        body = None if node is None or not isinstance(node.graph, ir.Graph) else node.graph
        loop = "" if body is None else self._bodies.get(body, "")
        once = loop in self._once
        whole = whole or is_discrete(value) or self.of(value).discrete
        tap = Tap(value.name or "", loop, once, once and whole)
        self.places[tap] = value
        return tap

    def _describe(
        self, node: ir.Node, known: list[_Facts], computed: bool, front: frozenset[str]
    ) -> None:
        rounds = _rounds(node)
        passed = _moved(node, known)
        for value in node.outputs:
            discrete = is_discrete(value) or _made_discrete(node, value)
            passed = self._ends.get(value, passed)
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
            if not (facts.discrete and facts.computed) or node is None:
                continue
            read = list(node.inputs) if node.op_type == "If" or not any(subgraphs(node)) else []
            if node.op_type == "If":
                read += [g.outputs[node.outputs.index(value)] for _, g in subgraphs(node)]
            above = [item for item in map(self._given, read) if item is not None]
            fresh = [item for item in above if item not in seen]
            seen.update(fresh)
            pending += fresh


def is_discrete(value: ir.Value) -> bool:
    """Whether a value is known to hold integers, truth values or texts."""
    dtype = value.dtype
    if dtype is None and value.const_value is not None:
        dtype = value.const_value.dtype
    return dtype is not None and not is_float(dtype)


def _cast_to_discrete(node: ir.Node) -> bool:
    """Whether a Cast gives no floats; one whose type a function's caller names is taken to."""
    to = node.attributes.get("to")
    if to is None or to.is_ref():
        return False
    return not is_float(ir.DataType(to.as_int()))


def _made_discrete(node: ir.Node, value: ir.Value) -> bool:
    """Whether an operator gives integers or truth values there, by its definition."""
    if not is_default_domain(node.domain):
        return False
    if node.op_type == "Cast":
        return _cast_to_discrete(node)
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
