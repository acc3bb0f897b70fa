"""What attention operators mean for atoms: whole heads, and positions inside heads.

A query head goes with its key and value heads; key and value heads that several query heads share
go with all of them. What ONNX Runtime 1.31 accepts decides what stays: GroupQueryAttention wants
keys and values of one size in multiples of 8, so only heads go there; stacked caches
``(2, batch, heads, ...)`` hold keys and values of one size, too.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.transforms.prune.patch import Heads
from onnxcomp.passes.transforms.prune.rules import unknown
from onnxcomp.passes.transforms.prune.walk import CONSUMED, PRODUCED, QkProduct, Side, Walk
from onnxcomp.passes.weight import Array

__all__ = [
    "attention",
    "group_query_attention",
    "multi_head_attention",
    "packed_attention",
]


def _atoms(walk: Walk, value: ir.Value | None, heads: int) -> Array | None:
    """Atoms ``(heads, size)`` of queries, keys or values in either layout; None without any."""
    shape, blocks = walk.label(value), walk.label(value)
    rank = len(walk.shape(value))
    own = [b for b in blocks if b.axes == ((rank - 1,) if rank == 3 else (1, 3))]
    walk.freeze([block for block in blocks if block not in own], "attention works along its axis")
    if value is None or not own or not shape:
        return None
    atoms = own[0].atoms
    return atoms.reshape(heads, -1) if atoms.size % heads == 0 else None


def _read(walk: Walk, node: ir.Node, heads: int, shared: int) -> Heads | None:
    """Atoms of the first three inputs; freezes them all where one has none."""
    values = node.inputs[:3]
    counts = (heads, shared, shared)
    found = [_atoms(walk, v, n) for v, n in zip(values, counts, strict=False)]
    if len(found) < 3 or any(atoms is None for atoms in found) or heads % max(shared, 1):
        for value in values:
            walk.freeze(walk.label(value), f"{node.op_type} reads values that cannot shrink")
        return None
    return Heads(*(atoms for atoms in found if atoms is not None))


def _relate(walk: Walk, heads: Heads) -> Array:
    """Join queries with keys, and their rows with those of values; atoms of the output."""
    keys, values = heads.repeated(heads.key), heads.repeated(heads.value)
    walk.atoms.same(heads.query, keys)
    for part in (heads.query, heads.key, heads.value, keys, values):
        walk.atoms.rows(part)
    walk.atoms.same(walk.atoms.rows(heads.query), walk.atoms.rows(values))
    return values


def _caches(walk: Walk, node: ir.Node, heads: Heads, first: int) -> bool:
    """Bind past keys and values, and label the present ones."""
    for offset, atoms in enumerate((heads.key, heads.value)):
        index = first + offset
        past = node.inputs[index] if index < len(node.inputs) else None
        if past is not None and not walk.bind_cache(node, index, (1, 3), atoms):
            return False
        if 1 + offset < len(node.outputs):
            walk.put(node.outputs[1 + offset], [Block((1, 3), atoms)])
    return True


def _scores_bias(walk: Walk, node: ir.Node, index: int, heads: Heads) -> str | None:
    """A bias ``(batch, heads, queries, keys)`` of the scores loses heads as well."""
    value = node.inputs[index] if index < len(node.inputs) else None
    shape = walk.shape(value)
    if value is None or len(shape) < 3 or shape[-3] == 1:
        return None
    return walk.bind_or_gather(node, index, (len(shape) - 3,), walk.atoms.rows(heads.query))


def _finish(walk: Walk, node: ir.Node, heads: Heads, reason: str | None) -> None:
    out = node.outputs[0]
    atoms = _relate(walk, heads)
    if reason is not None:
        for part in (heads.query, heads.key, heads.value):
            walk.atoms.freeze(part, f"{node.op_type}: {reason}")
    if node.op_type != "Attention" or node.domain != "com.microsoft":
        walk.qk_products.append(_qk_product(walk, node, heads))
    four = len(walk.shape(out)) == 4
    walk.put(out, [Block((1, 3), atoms) if four else Block((2,), atoms.ravel())])
    walk.patches.append(lambda editor: editor.attention(node, heads))


def _qk_product(walk: Walk, node: ir.Node, heads: Heads) -> QkProduct:
    """Where queries are multiplied with keys, in either layout."""
    sides = []
    for value, atoms in zip(node.inputs, (heads.query, heads.key), strict=False):
        assert value is not None
        flat = len(walk.shape(value)) == 3
        times = len(heads.query) // len(atoms)
        sides.append(Side(value.name or "", (1, 3), len(atoms) if flat else 0, times))
    return QkProduct(node, sides[0], sides[1], heads.query)


def multi_head_attention(walk: Walk, node: ir.Node) -> None:
    """com.microsoft.MultiHeadAttention with separate queries, keys and values."""
    count = node.attributes.get_int("num_heads", 0)
    heads = _read(walk, node, count, count) if count else None
    if heads is None:
        return unknown(walk, node)
    reason = None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        parts = [heads.query.ravel(), heads.key.ravel(), heads.value.ravel()]
        reason = walk.bind(node, 3, (0,), np.concatenate(parts))
    reason = reason or _scores_bias(walk, node, 5, heads)
    if not _caches(walk, node, heads, 6):
        reason = "its cache is not an input of the model"
    return _finish(walk, node, heads, reason)


def attention(walk: Walk, node: ir.Node) -> None:
    """ai.onnx Attention: heads may share keys and values."""
    four = len(walk.shape(node.inputs[0])) == 4
    shapes = walk.shape(node.inputs[0]), walk.shape(node.inputs[1])
    count = shapes[0][1] if four else node.attributes.get_int("q_num_heads", 0)
    shared = shapes[1][1] if four else node.attributes.get_int("kv_num_heads", 0)
    heads = _read(walk, node, count, shared) if count and shared else None
    if heads is None:
        return unknown(walk, node)
    reason = _scores_bias(walk, node, 3, heads)
    if not _caches(walk, node, heads, 4):
        reason = "its cache is not an input of the model"
    if len(node.outputs) > 3 and node.outputs[3].name:
        reason = "its scores are returned"
    return _finish(walk, node, heads, reason)


def group_query_attention(walk: Walk, node: ir.Node) -> None:
    """com.microsoft.GroupQueryAttention: key and value heads go, with their query heads."""
    count = node.attributes.get_int("num_heads", 0)
    shared = node.attributes.get_int("kv_num_heads", 0)
    heads = _read(walk, node, count, shared) if count and shared else None
    if heads is None:
        return unknown(walk, node)
    for part in (heads.query, heads.key, heads.value):
        walk.atoms.freeze_columns(part, "GroupQueryAttention wants heads of one size")
    reason = None if _caches(walk, node, heads, 3) else "its cache is not an input of the model"
    if any(value is not None for value in node.inputs[9:]):
        reason = "it has inputs that are not understood"
    return _finish(walk, node, heads, reason)


def packed_attention(walk: Walk, node: ir.Node) -> None:
    """com.microsoft.Attention: one weight makes queries, keys and values."""
    count = node.attributes.get_int("num_heads", 0)
    width = walk.shape(node.inputs[1])[-1] if node.inputs[1] is not None else 0
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes", (width // 3,) * 3))
    x = node.inputs[0]
    if not count or sum(sizes) != width or any(size % count for size in sizes):
        return unknown(walk, node)
    if "do_rotary" in node.attributes or any(v is not None for v in node.inputs[6:]):
        return unknown(walk, node)
    heads = Heads(*(walk.atoms.new(count, size // count) for size in sizes))
    packed = np.concatenate([heads.query.ravel(), heads.key.ravel(), heads.value.ravel()])
    reason = walk.bind(node, 1, (1,), packed, PRODUCED)
    for block in walk.label(x):
        why = walk.bind(node, 1, (0,), block.atoms, CONSUMED) if block.axes == (2,) else "its axis"
        if why is not None:
            walk.freeze([block], f"Attention: {why}")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        reason = reason or walk.bind(node, 2, (0,), packed)
    reason = reason or _scores_bias(walk, node, 5, heads)
    reason = reason or _stacked_cache(walk, node, heads)
    return _finish(walk, node, heads, reason)


def _stacked_cache(walk: Walk, node: ir.Node, heads: Heads) -> str | None:
    """Past and present ``(2, batch, heads, steps, size)``: only whole heads may go."""
    past = node.inputs[4] if len(node.inputs) > 4 else None
    present = len(node.outputs) > 1 and bool(node.outputs[1].name)
    if past is None and not present:
        return None
    for part in (heads.query, heads.key, heads.value):
        walk.atoms.freeze_columns(part, "keys and values are stacked in one cache")
    rows = walk.atoms.rows(heads.query)
    if past is not None and not walk.bind_cache(node, 4, (2,), rows):
        return "its cache is not an input of the model"
    if present:
        walk.put(node.outputs[1], [Block((2,), rows)])
    return None
