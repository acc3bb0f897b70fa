"""Take out whole experts of mixtures, and what their router says of them.

A mixture is a router, ``TopK(Softmax(MatMul(x, R)))`` with R ``(h, e)``, and stacks ``W (e, ...)``
that are read through Gather with the indices that TopK gives. Without experts A::

    R -> R[:, kept]      its offset b -> b[kept]      W -> W[kept] for each stack

What is left is chosen as before: indices are those of the smaller router. Experts go that the
outputs miss least on the calibration data, see `expert_losses`; in models too large for that, those
that are chosen least; without data, those with the least column of the router.
Visits the main graph. Every router of stacks that stays as it is has a reason.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.constant_arguments import constant, integers
from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import is_default_domain
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.transforms.prune.expert_losses import Contest, can_measure, least_missed
from onnxcomp.passes.weight import Array, Feed

__all__ = ["Mixture", "mixtures", "prune_experts"]

log = logging.getLogger(__name__)

# Operators between a router's product and TopK that treat all experts alike.
_SCORES = ("Softmax", "Sigmoid", "Identity", "Cast", "Add")

# Operators that read scores of all experts, and stay right with fewer of them.
_READERS = (*_SCORES, "TopK", "GatherElements")

# Operators that change the shape of indices only.
_MOVES = ("Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten")


@dataclasses.dataclass(slots=True)
class Mixture:
    """One router and the stacks that it chooses from.

    Attributes:
        node: The TopK.
        experts: How many there are.
        chosen: How many a token gets; 0 where that is not known.
        parts: Initializers of which entries go, with the axis of the experts.
        router: The router's weight.
        reason: Why it stays as it is; None where experts can go.
    """

    node: ir.Node
    experts: int
    chosen: int
    parts: dict[ir.Value, int]
    router: ir.Value | None
    reason: str | None = None

    @property
    def label(self) -> str:
        """How users know it."""
        named = self.node if self.router is None else self.router
        return named.name or ""


def prune_experts(model: ir.Model, context: Context) -> Change:
    """Take experts out of the mixtures of a model, in place: those that the outputs miss least."""
    asked = context.settings.prune_experts
    assert asked is not None
    found = list(mixtures(model))
    if not found:
        log.warning("--prune-experts found no router with stacks of experts")
    ready = [mixture for mixture in found if mixture.reason is None]
    for mixture in found:
        if mixture.reason is not None:
            log.warning("experts of %s stay: %s", mixture.label, mixture.reason)
    notes = []
    for mixture, gone in zip(ready, _removed(model, ready, context, asked), strict=True):
        if len(gone):
            notes.append(_cut(mixture, gone))
            log.warning("%s", notes[-1])
    return Change(len(notes), tuple(notes))


def mixtures(model: ir.Model) -> Iterator[Mixture]:
    """Routers of the main graph that choose from stacks, in graph order."""
    for node in model.graph:
        if node.op_type in ("MoE", "QMoE"):
            yield Mixture(node, 0, 0, {}, None, f"they are inside of the operator {node.op_type}")
        if node.op_type != "TopK" or not is_default_domain(node.domain):
            continue
        scores, router, problem = _router(node)
        if router is None:
            if any(len(shape) == 3 for shape in _picked(node.outputs[1])):
                problem = "its router is no product with a weight of its own"
                yield Mixture(node, 0, 0, {}, None, problem)
            continue
        parts, reason = _stacks(node.outputs[1], _experts(router))
        if parts:
            parts |= scores
            reason = reason or problem or _shared(parts, node, router)
        else:
            reason = "no stack is picked by its indices" + (f": {reason}" if reason else "")
        chosen = _chosen(node.inputs[1])
        reason = reason or (None if chosen else "how many are chosen is not constant")
        yield Mixture(node, _experts(router), chosen, parts, router, reason)


def _chosen(value: ir.Value | None) -> int:
    """The number that TopK reads, a scalar in a new shape as exporters write it; 0 if unknown."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in _MOVES:
            break
        value = producer.inputs[0]
    found = None if value is None else constant(value)
    return 0 if found is None else int(np.ravel(found.numpy())[0])


def _picked(indices: ir.Value) -> Iterator[tuple[int, ...]]:
    """Shapes of constants that are read by indices."""
    for node, place in indices.uses():
        if node.op_type in _MOVES and place == 0:
            yield from _picked(node.outputs[0])
        elif node.op_type in ("Gather", "GatherND") and place == 1:
            stack = _stored(node)
            if stack is not None and stack.const_value is not None:
                yield shape_of(stack.const_value)


def _experts(router: ir.Value) -> int:
    assert router.const_value is not None
    return int(shape_of(router.const_value)[_column_axis(router)])


def _column_axis(router: ir.Value) -> int:
    (node, _) = next(iter(router.uses()))
    product = _product(router)
    turned = node is not product
    turned ^= product.op_type == "Gemm" and product.attributes.get_int("transB", 0) == 1
    return 0 if turned else 1


def _product(router: ir.Value) -> ir.Node:
    """The product that reads a router's weight, as it is or turned."""
    (node, _) = next(iter(router.uses()))
    return next(iter(node.outputs[0].uses()))[0] if node.op_type == "Transpose" else node


def _weight_of(product: ir.Node) -> ir.Value | None:
    """The weight of a product that nobody else reads, as it is or turned; a matrix."""
    value = product.inputs[1]
    turning = None if value is None else value.producer()
    if value is not None and turning is not None and turning.op_type == "Transpose":
        value = turning.inputs[0] if len(value.uses()) == 1 else None
    if value is None or value.const_value is None or len(value.uses()) != 1:
        return None
    return value if len(shape_of(value.const_value)) == 2 else None


def _router(node: ir.Node) -> tuple[dict[ir.Value, int], ir.Value | None, str | None]:
    """Constants of a router with the axis of experts, its weight, and what stands against it."""
    parts: dict[ir.Value, int] = {}
    value, problem = node.inputs[0], None
    while value is not None and (producer := value.producer()) is not None:
        readers = {reader.op_type for reader, _ in value.uses()}
        if value.is_graph_output() or not readers <= set(_READERS):
            others = ", ".join(sorted(readers - set(_READERS))) or "the model's caller"
            problem = problem or f"its scores are also read by {others}"
        if producer.op_type in ("MatMul", "Gemm"):
            weight = _weight_of(producer)
            if weight is None:
                return parts, None, None
            parts[weight] = _column_axis(weight)
            offset = producer.inputs[2] if len(producer.inputs) > 2 else None
            if offset is not None:
                parts[offset] = -1
            return parts, weight, problem
        if producer.op_type not in _SCORES:
            return parts, None, None
        given = [v for v in producer.inputs if v is not None]
        constants = [v for v in given if v.const_value is not None]
        if len(given) != len(constants) + 1:
            return parts, None, None
        parts |= {v: -1 for v in constants if v.const_value is not None and v.const_value.size > 1}
        value = next(v for v in given if v not in constants)
    return parts, None, None


def _stacks(indices: ir.Value, experts: int) -> tuple[dict[ir.Value, int], str | None]:
    """Initializers that are read by indices of experts, and why they cannot be cut."""
    parts: dict[ir.Value, int] = {}
    reason = "indices are returned" if indices.is_graph_output() else None
    for node, place in indices.uses():
        if node.op_type in _MOVES and place == 0:
            found, problem = _stacks(node.outputs[0], experts)
            parts |= found
            reason = reason or problem
        elif node.op_type in ("Gather", "GatherND") and place == 1:
            stack = _stored(node)
            tensor = None if stack is None else stack.const_value
            if stack is None or tensor is None or shape_of(tensor)[0] != experts:
                reason = reason or f"{node.name} reads no stack of {experts} constant entries"
            else:
                parts[stack] = 0
        elif node.op_type != "GatherElements":
            reason = reason or f"indices are also read by {node.op_type}"
    return parts, reason


def _stored(node: ir.Node) -> ir.Value | None:
    """The initializer that a Gather along the first axis reads, as it is or each matrix turned."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        return None
    if node.op_type == "GatherND" and not _one_entry(node):
        return None
    value = node.inputs[0]
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "Cast", "Identity"):
            return None
        perm = producer.attributes.get_ints("perm", None)
        if producer.op_type == "Transpose" and (perm is None or perm[0] != 0):
            return None
        if len(value.uses()) != 1:
            return None
        value = producer.inputs[0]
    return value


def _one_entry(node: ir.Node) -> bool:
    indices = node.inputs[1]
    producer = None if indices is None else indices.producer()
    if producer is None or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    return producer.op_type == "Unsqueeze" and -1 in (integers(producer, "axes") or ())


def _shared(parts: dict[ir.Value, int], node: ir.Node, router: ir.Value) -> str | None:
    """Why initializers cannot be cut: others read them, or they have no entry for each expert."""
    experts = _experts(router)
    for value, axis in parts.items():
        tensor = value.const_value
        if len(value.uses()) != 1 or value.is_graph_output() or value.is_graph_input():
            return f"{value.name} is also read by others"
        if tensor is None or not shape_of(tensor) or shape_of(tensor)[axis] != experts:
            return f"{value.name} has no entry for each expert"
    axis = node.attributes.get_int("axis", -1)
    shape = None if node.inputs[0] is None else node.inputs[0].shape
    if axis != -1 and (shape is None or axis != len(shape) - 1):
        return "TopK is not over the last axis"
    return None


def _scores(model: ir.Model, ready: Sequence[Mixture], feeds: Sequence[Feed]) -> list[Array]:
    """What each expert is worth, of each mixture."""
    norms = [_column_norms(mixture) for mixture in ready]
    if not ready or not feeds:
        if ready:
            log.warning("experts go by the norms of their routers: give --data to see what is used")
        return norms
    names = [mixture.node.outputs[1].name or "" for mixture in ready]
    chain = Chain(model, feeds, [[name] for name in names])
    order = sorted(range(len(ready)), key=lambda at: chain.position([names[at]]))
    scores = list(norms)
    for at in order:
        counts = np.zeros(ready[at].experts)
        for values in chain.advance([names[at]]):
            indices = np.ravel(values[names[at]]).astype(np.int64)
            counts += np.bincount(indices, minlength=len(counts))
        # Norms, below one, decide between experts that are chosen equally often.
        scores[at] = counts + norms[at] / (1.0 + norms[at].max(initial=0.0))
    return scores


def _column_norms(mixture: Mixture) -> Array:
    assert mixture.router is not None and mixture.router.const_value is not None
    tensor, axis = mixture.router.const_value, mixture.parts[mixture.router]
    weight = np.moveaxis(np.asarray(tensor.numpy(), np.float64), axis, 0)
    return np.asarray(np.linalg.norm(weight, axis=1))


def _removed(
    model: ir.Model, ready: Sequence[Mixture], context: Context, asked: float
) -> list[Array]:
    """Experts that go, of each mixture."""
    feeds = list(context.feeds() or ())
    orders = [np.argsort(own, kind="stable") for own in _scores(model, ready, feeds)]
    counts = [_count(mixture, asked) for mixture in ready]
    if not feeds or not any(counts):
        return [order[:count] for order, count in zip(orders, counts, strict=True)]
    if not can_measure(model):
        log.warning("experts go by how often they are chosen: the model is too large to measure")
        return [order[:count] for order, count in zip(orders, counts, strict=True)]
    contests = [
        Contest(_name(mixture.node.inputs[0]), _scored(mixture), order.tolist(), count)
        for mixture, order, count in zip(ready, orders, counts, strict=True)
    ]
    found, loss = least_missed(model, contests, feeds)
    log.info("without these experts: loss of outputs %.3g", loss)
    return [np.array(gone, np.int64) for gone in found]


def _name(value: ir.Value | None) -> str:
    return "" if value is None else value.name or ""


def _scored(mixture: Mixture) -> str:
    """The value of a router's product."""
    assert mixture.router is not None
    return _name(_product(mixture.router).outputs[0])


def _count(mixture: Mixture, asked: float) -> int:
    """How many experts go: at least as many stay as a token gets."""
    count = math.floor(asked * mixture.experts) if asked < 1 else int(asked)
    most = mixture.experts - max(mixture.chosen, 1)
    if count > most:
        log.warning("%s loses %d experts, not %d: a token gets %d of %d",
                    mixture.label, most, count, mixture.chosen, mixture.experts)  # fmt: skip
    return min(count, most)


def _cut(mixture: Mixture, gone: Array) -> str:
    for value, axis in mixture.parts.items():
        tensor = value.const_value
        assert tensor is not None
        left = np.delete(np.asarray(tensor.numpy()), gone, axis=axis)
        value.const_value = ir.Tensor(
            np.ascontiguousarray(left), dtype=tensor.dtype, name=value.name
        )
        value.shape = ir.Shape(left.shape)
    _forget_shapes(mixture)
    names = ", ".join(map(str, sorted(gone.tolist())))
    left_over = mixture.experts - len(gone)
    return f"{mixture.label} chooses from {left_over} of {mixture.experts} experts, without {names}"


def _forget_shapes(mixture: Mixture) -> None:
    """Shapes that were stated with an axis of experts."""
    pending = [node for value in mixture.parts for node, _ in value.uses()]
    seen = set(pending)
    while pending:
        node = pending.pop()
        for value in node.outputs:
            stated = None if value.shape is None else list(value.shape)
            if stated is None or mixture.experts not in stated or value.is_graph_output():
                continue
            value.shape = None
            following = [reader for reader, _ in value.uses() if reader not in seen]
            seen.update(following)
            pending += following
