"""Expand weights with equal settings together when a session is created.

``HyperWeight(codes_1, ..) -> W_1`` and ``HyperWeight(codes_2, ..) -> W_2`` become
``Split(HyperRows(Concat(codes_1, codes_2), ..)) -> W_1, W_2``, with a Reshape for each.

However small a weight is, ONNX Runtime folds all nodes of its body, one by one, and looks at all
nodes that are there several times. Joined, a weight has a share of a Split and a Reshape.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.codecs.load_memory import Joining
from onnxcomp.passes.ir.manifest import WEIGHT_KEY
from onnxcomp.passes.ir.traversal import default_opset, inherit_notes, remove_dead, replace_value
from onnxcomp.passes.lowering.builder import GraphBuilder, InitializerPool
from onnxcomp.passes.lowering.join_shapes import join_shapes
from onnxcomp.passes.lowering.rewrite import Placement
from onnxcomp.passes.lowering.stages import Call, calls_of, kind_of
from onnxcomp.passes.weight import DOMAIN

__all__ = ["join_weights"]

# Weights that are joined take at most this share of all that could be, and at least so many bytes,
# in float32: earlier versions of ONNX Runtime copy what they fold.
_SHARE = 8
_LEAST = 4 << 20

# So few weights that are so small together, in float32, take fewer bytes of the graph one by one,
# and load in no time.
_FEW, _SMALL = 2, 1 << 20

# From this opset on, Split takes its sizes as an input.
_SIZES_AS_INPUT = 13

# From this opset on, Slice takes its ends as inputs.
_SLICE_BY_INPUTS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """A call that expands a weight, or some rows of one.

    Attributes:
        call: The call.
        joining: How its codec joins weights.
        width: Columns of the matrix that it becomes a part of.
        extent: Rows and columns of the result.
    """

    call: Call
    joining: Joining
    width: int
    extent: tuple[int, int]

    @property
    def groups(self) -> int:
        """Rows of the matrix that each of its rows becomes."""
        return -(-self.extent[1] // self.width)

    @property
    def nbytes(self) -> int:
        """Bytes of the result, its columns padded."""
        return 4 * self.extent[0] * self.groups * self.width

    @property
    def inputs(self) -> list[ir.Value]:
        """Inputs of the call."""
        return [value for value in self.call.node.inputs if value is not None]

    @property
    def key(self) -> Hashable:
        """What has to be the same for weights that are joined."""
        node = self.call.node
        producer = self.inputs[self.call.waiting].producer()
        piece = None if producer is None else producer.inputs[1]
        return node.graph, node.op_type, self.width, piece, *self.joining.settings(self.inputs)


def join_weights(model: ir.Model, placements: Sequence[Placement]) -> int:
    """Expand weights together that have equal settings and the same piece, in place.

    Args:
        model: A model that `rewrite` made, with functions; its weights may wait for each other.
        placements: What was placed.

    Returns:
        How many weights, or parts of weights, were joined.
    """
    found = [member for call in calls_of(model, placements) for member in _members(call)]
    limit = max(_LEAST, sum(member.nbytes for member in found) // _SHARE)
    alike = collections.defaultdict(list)
    for member in found:
        alike[member.key].append(member)
    joined = 0
    pool = InitializerPool(model, default_opset(model) or 0)
    for members in alike.values():
        for some in filter(_is_worth_it, _portions(members, limit)):
            _join(some, pool)
            joined += len(some)
    return joined


def _members(call: Call) -> Iterator[_Member]:
    special = call.placement.codec.special
    if special is None or kind_of(call.node.op_type) != "weight":
        return
    kinds = ir.AttributeType
    numbers = {n: a.as_int() for n, a in call.node.attributes.items() if a.type == kinds.INT}
    rows, length = call.node.attributes["extent"].as_ints()
    yield _Member(call, special.joining, special.joining.width(numbers), (rows, length))


def _portions(members: Sequence[_Member], limit: int) -> Iterator[list[_Member]]:
    """Weights that are joined, by their groups: together at most so many bytes."""
    portion: list[_Member] = []
    for member in sorted(members, key=lambda member: member.groups):
        if sum(each.nbytes for each in portion) + member.nbytes > limit:
            yield from [portion] if portion else []
            portion = []
        portion.append(member)
    yield from [portion] if portion else []


def _is_worth_it(members: Sequence[_Member]) -> bool:
    return len(members) > _FEW or sum(member.nbytes for member in members) > _SMALL


def _join(members: Sequence[_Member], pool: InitializerPool) -> None:
    """Put the parts of one matrix in the place of the calls."""
    first, placement = members[0], members[0].call.placement
    order = {node: place for place, node in enumerate(first.call.node.graph or ())}
    anchor = min((member.call.node for member in members), key=order.__getitem__)
    builder = GraphBuilder(
        pool, anchor, DOMAIN, placement.site, placement.codec.name, placement.payload
    )
    calls, groups = [m.inputs for m in members], [m.groups for m in members]
    matrix = first.joining.emit(builder, calls, groups)
    parts = _split(builder, matrix, [m.joining.parts(m.extent, m.width) for m in members])
    weights = [_weight(builder, *pair) for pair in zip(parts, members, strict=True)]
    for member, weight in zip(members, weights, strict=True):
        _put(member, weight)


def _split(
    builder: GraphBuilder, matrix: ir.Value, parts: Sequence[tuple[int, int]]
) -> list[ir.Value]:
    """Weights out of the matrix, without the padding behind each."""
    sizes = [size for part in parts for size in part if size]
    if len(sizes) == 1:
        return [matrix]
    if builder.opset >= _SIZES_AS_INPUT:
        given = [matrix, _ints(builder, *sizes)]
        made = builder.outputs("Split", given, len(sizes), {"axis": 0})
    else:
        made = builder.outputs("Split", [matrix], len(sizes), {"axis": 0, "split": sizes})
    values = iter(made)
    result = []
    for _, padding in parts:
        result.append(next(values))
        if padding:
            next(values)
    return result


def _weight(builder: GraphBuilder, part: ir.Value, member: _Member) -> ir.Value:
    """A weight in the form that the call had, from its rows of the matrix."""
    rows, length = member.extent
    padded = (rows, member.groups * member.width)
    weight = builder.node("Reshape", [part, _ints(builder, *padded)])
    if length == padded[1]:
        return weight
    if builder.opset < _SLICE_BY_INPUTS:
        return builder.node("Slice", [weight], {"starts": (0,), "ends": (length,), "axes": (1,)})
    return builder.node("Slice", [weight, *(_ints(builder, end) for end in (0, length, 1))])


def _ints(builder: GraphBuilder, *values: int) -> ir.Value:
    return builder.constant("ints." + "x".join(map(str, values)), np.array(values, np.int64))


def _put(member: _Member, weight: ir.Value) -> None:
    """Put a weight in the place of the call's result."""
    node, producer = member.call.node, weight.producer()
    assert producer is not None and node.graph is not None
    if WEIGHT_KEY in node.metadata_props:
        producer.metadata_props[WEIGHT_KEY] = node.metadata_props[WEIGHT_KEY]
    inherit_notes(node, producer)
    replace_value(node.outputs[0], weight)
    waited = member.inputs[member.call.waiting].producer()
    node.graph.remove(node, safe=True)
    if waited is not None:
        remove_dead([waited])
    join_shapes(weight)
