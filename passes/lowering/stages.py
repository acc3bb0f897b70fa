"""Let ONNX Runtime expand weights piece by piece when it loads a model without the library.

ONNX Runtime folds a body to a dense constant when a session is created, and frees intermediate
results only when a pass over the graph is over. All weights in one pass take many times their
memory. Here, weights wait for each other::

    blocks -> HyperMatMul(.., blocks, ..)    becomes    Mul(blocks, go_2) -> HyperMatMul(.., .., ..)

where ``go_2`` is the number 1, which folding finds out in its third pass and not before:
``go_1 = Shape(If(one) {Expand(one, go_0)})``. The shape of an If is only inferred between passes.
When the last weight is expanded, all of this is folded away; with the library, too, whose kernels
do not read `blocks`. ONNX Runtime repeats passes up to ten times: seven pieces leave a few.

A product whose weight is most of the model is expanded in parts of its rows, see `part_products`:
its definition has the same nodes inside, and the parts come in the first pieces.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxcomp.passes.analysis.constant_arguments import constant
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Codec, LoadMemory
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import STAGE_KEY, ManifestEntry, own_name, shared_name
from onnxcomp.passes.ir.traversal import Names, default_opset, remove_dead, scopes, subgraphs
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.lowering.runtime_value import FrontNodes, runtime_one
from onnxcomp.passes.weight import DOMAIN, Kind

__all__ = [
    "LEAST",
    "Call",
    "calls_of",
    "end_waiting",
    "generalize",
    "in_passes",
    "is_staged",
    "kind_of",
    "loading_peak",
    "remove_stages",
    "stage_loading",
    "stages_of",
    "weight_body",
]

# Pieces of a model at most.
_MOST = 7

# Models that take less memory than this to expand are left as they are.
LEAST = 16 << 20

_KINDS: Mapping[str, Kind] = {
    "MatMul": "matmul", "Gather": "gather", "Experts": "experts", "Weight": "weight",
    "Rows": "weight", "Decode": "decode",
}  # fmt: skip


def kind_of(operator: str) -> Kind | None:
    """How an operator of ours uses a weight."""
    return next((kind for end, kind in _KINDS.items() if operator.endswith(end)), None)


def _kind_of_call(call: ir.Node) -> Kind | None:
    """How a call uses a weight: a constant choice of matrices is known when a session starts."""
    kind = kind_of(call.op_type)
    chosen = call.inputs[1] if kind == "experts" else None
    return kind if chosen is None or constant(chosen) is None else "batch"


def stages_of(needs: Sequence[LoadMemory]) -> list[int]:
    """In which piece each of the weights is expanded.

    As few pieces as keep to the memory that a dense model takes; the least memory at the peak,
    where none do.
    """
    if sum(need.kept for need in needs) < LEAST:
        return [0] * len(needs)
    high = sum(need.kept for need in needs)
    # More pieces than this takes would cost time only: a dense model takes as much to load.
    results = sum(need.result for need in needs if need.passes == 1)
    low = min(high, LEAST + results)
    while low < high:
        limit = (low + high) // 2
        if max(_pieces(needs, limit)) < _MOST:
            high = limit
        else:
            low = limit + 1
    return _pieces(needs, high)


def _pieces(needs: Sequence[LoadMemory], limit: int) -> list[int]:
    """As few pieces as keep the limit, as far as single weights do.

    The largest come first, when few others are in memory. Weights that are expanded in several
    passes begin with the first piece; they are not counted, as sessions with the library expand
    the others only.
    """
    stages = [0] * len(needs)
    stage = before = held = results = 0
    for number in sorted(range(len(needs)), key=lambda number: 2 * needs[number].kept <= limit):
        need = needs[number]
        if need.passes > 1:
            continue
        if held and before + held + need.kept > limit:
            stage, before, held, results = stage + 1, before + results, 0, 0
        stages[number] = stage
        held += need.kept
        results += need.result
    return stages


_NOTHING = LoadMemory(0, 0)


def _divided(needs: Iterable[LoadMemory]) -> list[LoadMemory]:
    """What uses that are expanded in several passes take in each piece."""
    pieces = [_NOTHING] * _MOST
    for need in (need for need in needs if need.passes > 1):
        part = need.share(need.passes)
        for stage in range(need.passes):
            pieces[stage] = _together([pieces[stage], part])
    return pieces


def _together(needs: Sequence[LoadMemory]) -> LoadMemory:
    return LoadMemory(
        sum(need.kept for need in needs),
        max((need.working for need in needs), default=0),
        sum(need.result for need in needs),
    )


def loading_peak(needs: Sequence[LoadMemory], *, staged: bool = True) -> int:
    """Memory at the peak of expanding all of these.

    Args:
        needs: What each takes, in their order in the model.
        staged: Whether the model was written with `stage_loading`.
    """
    stages = stages_of(needs) if staged else [0] * len(needs)
    peak = before = 0
    for stage, divided in enumerate(_divided(needs)):
        whole = [
            need
            for need, number in zip(needs, stages, strict=True)
            if number == stage and need.passes == 1
        ]
        piece = _together([divided, *whole])
        peak = max(peak, before + piece.kept + piece.working)
        before += piece.result
    return peak


def stage_loading(model: ir.Model, placements: Sequence[Placement]) -> int:
    """Make weights wait for each other, in place.

    Args:
        model: A model that `rewrite` made, with functions.
        placements: What was placed.

    Returns:
        The number of pieces; 1 where nothing was changed.
    """
    calls = sorted(calls_of(model, placements), key=_layout)
    stages = stages_of([in_passes(model, call.node, call.need) for call in calls])
    count = max(stages, default=0) + 1
    if count == 1 or (default_opset(model) or 0) < 8:
        return 1
    front = FrontNodes(model, Names(model), {STAGE_KEY: "1"})
    one = runtime_one(model, front)
    if one is None:
        return 1
    tokens = _tokens(front, one, count)
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for call, stage in zip(calls, stages, strict=True):
        value = call.node.inputs[call.waiting]
        if stage == 0 or value is None:
            continue
        if (value, stage) not in made:
            made[value, stage] = front.node("Mul", [value, tokens[stage]])
        call.node.replace_input_with(call.waiting, made[value, stage])
    front.place()
    return count


def _layout(call: Call) -> str:
    """What weights that can be joined have in common, so that they come into one piece."""
    value = call.node.inputs[call.waiting]
    return "" if value is None or kind_of(call.node.op_type) != "weight" else value.name or ""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """An operator of ours that can wait.

    Attributes:
        node: The call.
        waiting: Index of the input that waits.
        need: Memory to expand it.
        placement: Its weight.
    """

    node: ir.Node
    waiting: int
    need: LoadMemory
    placement: Placement


def calls_of(model: ir.Model, placements: Sequence[Placement]) -> list[Call]:
    """Calls that can wait, in their order in the model."""
    return list(_calls(model, placements))


def _calls(model: ir.Model, placements: Sequence[Placement]) -> Iterator[Call]:
    owners = {
        own_name(placement.site.name, key): placement
        for placement in placements
        for key in placement.payload.tensors
    }
    for scope in scopes(model):
        calls = [call for call in scope.graph if call.domain == DOMAIN]
        read = [next(filter(owners.get, map(_stored_name, call.inputs)), "") for call in calls]
        # A graph expands a weight once; several calls are its parts.
        parts = collections.Counter(
            name
            for call, name in zip(calls, read, strict=True)
            if kind_of(call.op_type) == "weight"
        )
        for call, name in zip(calls, read, strict=True):
            placement, kind = owners.get(name), _kind_of_call(call)
            index = None if placement is None else _waiting_input(call, placement.codec)
            if placement is not None and index is not None and kind is not None:
                need = _need(placement, kind, parts[name] if kind == "weight" else 1)
                yield Call(call, index, need, placement)


def in_passes(model: ir.Model, call: ir.Node, need: LoadMemory) -> LoadMemory:
    """Memory of a call whose definition may expand its weight in parts."""
    function = model.functions.get(call.op_identifier())
    count = "1" if function is None else function.metadata_props.get(STAGE_KEY, "1")
    return dataclasses.replace(need, passes=int(count))


def _stored_name(value: ir.Value | None) -> str:
    """The name of an input, or of the initializer that it is a part of."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Slice":
        value = producer.inputs[0]
    return "" if value is None else value.name or ""


def _waiting_input(call: ir.Node, codec: Codec) -> int | None:
    if codec.pacing is None:
        return None
    start = shared_name(codec.pacing)
    names = [_pacing_name(value) for value in call.inputs]
    return next((index for index, name in enumerate(names) if name.startswith(start)), None)


def _pacing_name(value: ir.Value | None) -> str:
    """The name of an input, whether it waits or not."""
    producer = None if value is None else value.producer()
    if producer is not None and STAGE_KEY in producer.metadata_props:
        value = producer.inputs[0]
    return "" if value is None else value.name or ""


def _need(placement: Placement, kind: Kind, parts: int) -> LoadMemory:
    """Memory of one call, where calls of a codec that makes several count as equal parts."""
    codec, site = placement.codec, placement.site
    params = placement.params or codec.params_type()
    whole = codec.load_memory(site, params, kind)
    parts = max(parts, codec.calls)
    working = whole.working if codec.row_parts is None else whole.working // parts
    return LoadMemory(whole.kept // parts, working, whole.result // parts)


def _tokens(front: FrontNodes, one: ir.Value, count: int) -> list[ir.Value]:
    """Int64 ``(1,)`` ones: number k is known in pass k of folding."""
    yes = front.node("Cast", [one], {"to": int(ir.DataType.BOOL)})
    tokens = [front.ints(1)]
    for _ in range(count):
        branches = {
            name: ir.AttrGraph(name, _expanding(front, one, tokens[-1]))
            for name in ("then_branch", "else_branch")
        }
        tokens.append(front.node("Shape", [front.node("If", [yes], branches)]))
    # The first If is of a known shape before the first pass.
    return tokens[1:]


def _expanding(front: FrontNodes, one: ir.Value, shape: ir.Value) -> ir.Graph:
    """A branch: ``Expand(one, shape)``, both from outside."""
    node = front.inner_node("Expand", [one, shape])
    return ir.Graph([], node.outputs, nodes=[node], name=node.name)


def is_staged(model: ir.Model) -> bool:
    """Whether weights of a model wait for each other."""
    divided = any(f.metadata_props.get(STAGE_KEY, "1") != "1" for f in model.functions.values())
    return divided or any(STAGE_KEY in node.metadata_props for node in model.graph)


def end_waiting(model: ir.Model) -> None:
    """Let all weights be expanded at once again, as engines without passes do it; in place."""
    for node in [n for n in model.graph if STAGE_KEY in n.metadata_props and n.op_type == "Mul"]:
        value = node.inputs[0]
        assert value is not None
        node.outputs[0].replace_all_uses_with(value)
    remove_stages(model)
    generalize(model)


def generalize(model: ir.Model) -> None:
    """Put general definitions in the place of those that serve some weights only; in place."""
    opset = default_opset(model)
    special = [key for key, body in model.functions.items() if STAGE_KEY in body.metadata_props]
    if opset is None or not special:
        return
    bodies = {body.name: body for codec in CODECS.values() for body in codec.functions(opset)}
    for domain, name, overload in special:
        if name in bodies:
            function = ir.serde.deserialize_function(bodies[name])
            model.functions[domain, name, overload] = function


def weight_body(record: ManifestEntry, operator: str, opset: int | None) -> ir.Function | None:
    """The definition that expands weights best, where that is not the general one."""
    recipe = record.recipe
    special = CODECS[recipe.codec].special if recipe.codec in CODECS else None
    if special is None or opset is None or not recipe.params:
        return None
    codec = CODECS[recipe.codec]
    params = typed_params(codec.params_type, recipe.params, codec.name)
    make = special.rows if operator.endswith("Rows") else special.weight
    body = make(opset, record.site, params)
    return None if body is None else ir.serde.deserialize_function(body)


def remove_stages(model: ir.Model) -> None:
    """Remove what made weights wait, where nothing waits for it any more."""
    for node in reversed([n for n in model.graph if STAGE_KEY in n.metadata_props]):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        for _, graph in subgraphs(node):
            for inner in graph:
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
        remove_dead([node])
