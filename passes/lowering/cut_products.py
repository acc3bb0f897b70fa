"""Cut products with large weights into products with some rows of them, for runs in little memory.

``MatMul(x, W)`` becomes ``Concat(MatMul(x, W[:, :n]), ...)``, and so do products on codes. The
model computes the same; it is not meant to be written, as tensors have other names in it.
Visits the main graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir.manifest import ManifestEntry, own_name, read_manifest, write_manifest
from onnxcomp.passes.ir.tensors import is_float, shape_of
from onnxcomp.passes.ir.traversal import (
    Names,
    default_opset,
    initializers,
    is_default_domain,
    new_initializer,
    remove_initializer,
    replace_value,
)
from onnxcomp.passes.lowering.builder import GraphBuilder, InitializerPool
from onnxcomp.passes.lowering.expand import stored_payload
from onnxcomp.passes.lowering.row_parts import row_bounds, some_rows
from onnxcomp.passes.lowering.stages import kind_of
from onnxcomp.passes.weight import DOMAIN

__all__ = ["cut_coded_products", "cut_dense_products"]

# From this operator set on, Concat takes the last axis by -1.
_OPSET = 11

# Attributes of products on codes that do not follow from the weight.
_OF_CALL = ("dtype", "precision")


def cut_dense_products(model: ir.Model, largest: int) -> int:
    """Cut products with dense weights, in place.

    Args:
        model: A model.
        largest: Bytes in float32 that the weight of one product may take.

    Returns:
        How many were cut.
    """
    if (default_opset(model) or 0) < _OPSET:
        return 0
    names, cut = Names(model), 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" and len(node.inputs) == 2 else None
        if weight is None or not is_default_domain(node.domain) or not _is_matrix(weight):
            continue
        tensor = weight.const_value
        assert tensor is not None
        length, rows = shape_of(tensor)
        count = -(-4 * tensor.size // largest)
        if count < 2:
            continue
        step, parts = max(1, -(-rows // count)), []
        for start, stop in row_bounds(rows, step):
            name = names.value(f"{weight.name}/{start}")
            columns = _excerpt(tensor, (slice(None), slice(start, stop)), (length, stop - start))
            part = new_initializer(model, name, columns)
            made = ir.Node("", "MatMul", [node.inputs[0], part], name=names.node(node.name or ""))
            made.outputs[0].name = names.value(name)
            model.graph.insert_before(node, made)
            parts.append(made.outputs[0])
        _join(node, parts, names)
        if not weight.uses():
            remove_initializer(weight)
        cut += 1
    return cut


def _is_matrix(value: ir.Value) -> bool:
    """Whether a value is a matrix of floats that nobody can override."""
    tensor = value.const_value
    fixed = value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()
    return fixed and tensor is not None and is_float(tensor.dtype) and len(shape_of(tensor)) == 2


def _excerpt(
    tensor: ir.TensorProtocol, place: tuple[slice, ...], shape: Sequence[int]
) -> ir.LazyTensor:
    """A part of a tensor, read when it is asked for and not kept."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy()[place].copy(), dtype=tensor.dtype),
        tensor.dtype,
        ir.Shape(shape),
    )


def _join(node: ir.Node, parts: Sequence[ir.Value], names: Names) -> None:
    """Put the parts of a product, side by side, in its place."""
    graph = node.graph
    assert graph is not None
    axis = ir.AttrInt64("axis", -1)
    joined = ir.Node("", "Concat", parts, [axis], name=names.node(node.name or ""))
    graph.insert_before(node, joined)
    replace_value(node.outputs[0], joined.outputs[0])
    graph.remove(node, safe=True)


def cut_coded_products(model: ir.Model, largest: int) -> int:
    """Cut products on codes whose definitions take more memory to expand, in place.

    Args:
        model: A compressed model whose weights do not wait for each other.
        largest: Bytes that expanding the weight of one product may take.

    Returns:
        How many were cut.
    """
    opset = default_opset(model) or 0
    try:
        records = read_manifest(model)
    except CompressionError:  # a damaged record, or one of a newer version
        return 0
    values, pool, cut = initializers(model), InitializerPool(model, opset), 0
    for name, record in list(records.items() if opset >= _OPSET else ()):
        for call in _products(model, record, values):
            parts = dict(_parts(call, record, values, pool, largest))
            if not parts:
                continue
            _join(call, [value for value, _ in parts.values()], pool.names)
            records |= {part: entry for part, (_, entry) in parts.items()}
            cut += 1
        own = [values[own_name(name, key)] for key in record.recipe.tensors]
        if own and not any(value.uses() for value in own):
            del records[name]
            for value in own:
                remove_initializer(value)
    if cut:
        write_manifest(model, records)
    return cut


def _products(
    model: ir.Model, record: ManifestEntry, values: Mapping[str, ir.Value]
) -> list[ir.Node]:
    """Products on the codes of a weight whose rows can be taken apart."""
    codec = CODECS.get(record.recipe.codec)
    if codec is None or codec.row_parts is None or not record.recipe.params:
        return []
    first = values.get(own_name(record.site.name, next(iter(record.recipe.tensors), "")))
    return [
        node
        for node, _ in (() if first is None else first.uses())
        if node.domain == DOMAIN and kind_of(node.op_type) == "matmul" and node.graph is model.graph
    ]


def _parts(
    call: ir.Node,
    record: ManifestEntry,
    values: Mapping[str, ir.Value],
    pool: InitializerPool,
    largest: int,
) -> Iterator[tuple[str, tuple[ir.Value, ManifestEntry]]]:
    """Products that take the place of one: names of their weights, results, and records."""
    site, recipe, x = record.site, record.recipe, call.inputs[0]
    codec = CODECS[recipe.codec]
    params = typed_params(codec.params_type, recipe.params, codec.name)
    need = codec.load_memory(site, params, "matmul")
    count = -(-(need.kept + need.working) // largest)
    cut, payload = codec.row_parts, stored_payload(record, values)
    assert cut is not None and x is not None
    unit = cut.unit(site, payload)
    step = max(1, site.rows // count // unit) * unit
    if count < 2 or site.rows <= step:
        return
    for start, stop in row_bounds(site.rows, step):
        part, entries = cut.part(site, payload, start, stop)
        name = pool.names.value(f"{site.name}/{start}")
        own = dataclasses.replace(some_rows(site, stop - start), name=name)
        builder = GraphBuilder(pool, call, name, own, codec.name, part)
        result = codec.emit(builder, own, part, "matmul", x)
        made = result.producer()
        assert made is not None
        for key, array in part.tensors.items():
            stored = values[own_name(site.name, key)].const_value
            assert stored is not None
            tensor = _excerpt(stored, (entries,), array.shape)
            builder.tensor(key).const_value = tensor
        for key in _OF_CALL:
            if key in call.attributes:
                made.attributes[key] = call.attributes[key]
        entry = dataclasses.replace(recipe, attributes=dict(part.attributes), shared=[*part.shared])
        yield name, (result, dataclasses.replace(record, site=own, recipe=entry))
