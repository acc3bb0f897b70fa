"""Bring a model into the form that the other passes expect.

Functions whose bodies hold weights are inlined (`inline_functions`). ``Constant() -> W`` becomes an
initializer ``W``; two equal initializers become one; ``W2 = transpose(W1)`` becomes
``Transpose(W1) -> W2``. Every node and every initializer has a name of its own. Visits the main
graph and all subgraphs. Function bodies that cannot be inlined stay as they are: they have no
initializers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.model import Change
from onnxcomp.passes.ir.tensors import WEIGHT_TYPES, is_matrix, shape_of
from onnxcomp.passes.ir.traversal import (
    LISTING_IR,
    Names,
    Scope,
    add_initializer,
    remove_initializer,
    rename_initializer,
    scopes,
)
from onnxcomp.passes.transforms.canonical_form import (
    CANONICAL_FORM,
    SHARED_BYTES,
    holds_weight,
    liftable,
)
from onnxcomp.passes.transforms.inline_functions import inline_functions
from onnxcomp.passes.transforms.pass_manager import Context, GraphPass
from onnxcomp.passes.weight import Array

__all__ = ["Canonicalize", "canonicalize"]

# Elements of the diagonal that two tensors must share before they are compared in full.
_PROBES = 64


class Canonicalize(GraphPass):
    """Bring the graph into the one form that other passes expect."""

    name: ClassVar[str] = "canonicalize"
    ensures: ClassVar[tuple[str, ...]] = tuple(CANONICAL_FORM)
    subgraphs: ClassVar[bool] = True
    functions: ClassVar[bool] = True

    def wanted(self, settings: Settings) -> bool:
        """Always."""
        del settings
        return True

    def run(self, model: ir.Model, context: Context) -> Change:
        """``Constant() -> W`` becomes an initializer ``W``, and so on: see `canonicalize`."""
        del context
        return canonicalize(model)


def canonicalize(model: ir.Model, *, deduplicate: bool = True) -> Change:
    """Inline functions with weights, lift constants to initializers, store equal weights once.

    Args:
        model: The model; changed in place.
        deduplicate: Also merge weights of 1 KiB or more with equal content, transposed or not.

    Returns:
        The number of functions inlined, nodes named, constants lifted, initializers renamed and
        weights merged, with a note on each but the nodes.
    """
    names = Names(model)
    notes = list(inline_functions(model, names, holds_weight))
    named = _name_nodes(model, names)
    notes += [*_lift_constants(model), *_rename_initializers(model, names)]
    if deduplicate:
        notes += _merge_equal(model, names)
    return Change(named + len(notes), tuple(notes))


def _name_nodes(model: ir.Model, names: Names) -> int:
    taken: set[str] = set()
    count = 0
    for scope in scopes(model):
        for node in scope.graph:
            if not node.name or node.name in taken:
                original = node.name
                node.name = names.node(original or node.op_type)
                # Names that nobody asked for are not written; see `metadata`.
                node.meta[metadata.GENERATED_NAME] = (node.name, original)
                count += 1
            taken.add(node.name)
    return count


def _lift_constants(model: ir.Model) -> Iterator[str]:
    for scope in list(scopes(model)):
        for node, tensor in liftable(model, scope):
            yield f"Constant {node.outputs[0].name} became an initializer"
            _lift(model, scope, node, tensor)


def _lift(model: ir.Model, scope: Scope, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    output = node.outputs[0]
    value = ir.Value(
        name=output.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(shape_of(tensor)),
        const_value=tensor,
        doc_string=output.doc_string,
        metadata_props=dict(output.metadata_props),
    )
    value.meta.update(output.meta)
    value.meta[metadata.LISTED] = output.type is not None
    output.replace_all_uses_with(value)
    scope.graph.remove(node, safe=True)
    if scope.parent is None:
        add_initializer(model, value)
    else:
        scope.graph.register_initializer(value)


def _rename_initializers(model: ir.Model, names: Names) -> Iterator[str]:
    """Two branches may each own an initializer of the same name: the later one gets another."""
    taken: set[str] = set()
    for scope in scopes(model):
        for name, value in list(scope.graph.initializers.items()):
            if name in taken:
                rename_initializer(value, names.value(name))
                yield f"initializer {name} in {scope.path} was renamed to {value.name}"
            taken.add(value.name or "")


def _mergeable(scope: Scope, value: ir.Value, ir_version: int) -> bool:
    tensor = value.const_value
    if tensor is None or tensor.dtype not in WEIGHT_TYPES or tensor.nbytes < SHARED_BYTES:
        return False
    overridable = value.is_graph_input() and (ir_version >= LISTING_IR or scope.parent is not None)
    return is_matrix(tensor) and not overridable and not value.is_graph_output()


def _bits(value: ir.Value) -> Array:
    """The values of an initializer as integers, so that every bit pattern equals itself."""
    tensor = value.const_value
    assert tensor is not None
    array = np.asarray(tensor.numpy())
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def _fingerprint(value: ir.Value) -> bytes:
    """Elements of the main diagonal: the same for a matrix and its transpose."""
    bits = _bits(value)
    rows = bits.reshape(bits.shape[0], -1)
    return np.ascontiguousarray(np.diagonal(rows)[:_PROBES]).tobytes()


def _merge_equal(model: ir.Model, names: Names) -> Iterator[str]:
    groups = defaultdict(list)
    for scope in list(scopes(model)):
        for value in scope.graph.initializers.values():
            if _mergeable(scope, value, model.ir_version):
                tensor = value.const_value
                assert tensor is not None
                shape = shape_of(tensor)
                key = (tensor.dtype, tuple(sorted(shape)) if len(shape) == 2 else shape)
                groups[key].append((scope, value))
    for group in groups.values():
        if len(group) > 1:
            yield from _merge_group(model, names, group)


def _equal_owner(value: ir.Value, owners: list[tuple[Scope, ir.Value]]) -> tuple[int, bool] | None:
    """Position of the owner with the same content, and whether that is transposed."""
    bits = _bits(value)
    for position, (_, owner) in enumerate(owners):
        other = _bits(owner)
        if np.array_equal(bits, other):
            return position, False
        if bits.ndim == 2 and np.array_equal(bits, other.T):
            return position, True
    return None


def _merge_group(
    model: ir.Model, names: Names, group: list[tuple[Scope, ir.Value]]
) -> Iterator[str]:
    owners: dict[bytes, list[tuple[Scope, ir.Value]]] = defaultdict(list)
    for scope, value in group:
        same = owners[_fingerprint(value)]
        found = _equal_owner(value, same)
        if found is None:
            same.append((scope, value))
            continue
        position, transposed = found
        owner_scope, owner = same[position]
        if transposed or not owner_scope.encloses(scope):
            same[position] = (_hoist(model, names, owner_scope, owner), owner)
        yield _merge(model, names, value, owner, transposed=transposed)


def _hoist(model: ir.Model, names: Names, scope: Scope, value: ir.Value) -> Scope:
    """Move an initializer to the main graph, where every subgraph sees it."""
    if scope.parent is not None:
        remove_initializer(value)
        rename_initializer(value, names.value(value.name or ""))
        add_initializer(model, value)
    return Scope("", model.graph)


def _merge(
    model: ir.Model, names: Names, value: ir.Value, owner: ir.Value, *, transposed: bool
) -> str:
    name = value.name or ""
    remove_initializer(value)
    if not transposed:
        value.replace_all_uses_with(owner)
        return f"{name} equals {owner.name} and is stored once"
    node = ir.Node(
        "", "Transpose", [owner], [ir.AttrInt64s("perm", [1, 0])], name=names.node("Tie")
    )
    node.meta[metadata.GENERATED_NAME] = (node.name, None)
    output = node.outputs[0]
    output.name = name
    value.replace_all_uses_with(output)
    if len(model.graph):
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.append(node)
    return f"{name} is the transpose of {owner.name} and is stored once"
