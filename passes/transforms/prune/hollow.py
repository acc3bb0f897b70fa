"""A large model that makes zeros for weights: sizes of values do not depend on what these hold.

Each weight is made where it is read and goes again, so that a run takes memory for the largest of
them and not for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.ir.model import copy_model
from onnxcomp.passes.ir.tensors import shape_of
from onnxcomp.passes.ir.traversal import Names, default_opset, new_initializer, remove_initializer

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["for_sizes", "unoptimised_session"]

# Bytes of a model's weights below which it is run as it is, and of weights that are kept.
_LEAST, _SMALL = 256 << 20, 1 << 16

# The operator set that brought ConstantOfShape, and the types that it has kernels for.
_OPSET, _TYPES = 9, (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)

# Operators whose results have sizes that depend on values, or that decide by them what is run.
_BY_VALUE = frozenset(
    ("NonZero", "Unique", "Compress", "NonMaxSuppression", "If", "Loop", "Scan", "SequenceMap")
)


def for_sizes(model: ir.Model) -> ir.Model:
    """A model whose values have the sizes of another one's; that itself where it is small.

    It is meant to be run without optimisation, which would keep the zeros.
    """
    large = [value for value in model.graph.initializers.values() if _is_large(value)]
    total = sum(value.const_value.nbytes for value in large if value.const_value is not None)
    by_value = any(node.op_type in _BY_VALUE for node in model.graph.all_nodes())
    if total < _LEAST or by_value or (default_opset(model) or 0) < _OPSET:
        return model
    copy = copy_model(model)
    work = _Hollow(copy)
    for name in [value.name or "" for value in large]:
        work.replace(copy.graph.initializers[name])
    return copy


class _Hollow:
    """A model that loses weights."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._names = model, Names(model)
        self._zero = new_initializer(model, self._names.value("zero"), np.zeros(1, np.int64))

    def replace(self, weight: ir.Value) -> None:
        """Make a weight of zeros in front of each of its uses."""
        tensor, name = weight.const_value, weight.name or ""
        assert tensor is not None
        array = np.array(shape_of(tensor), np.int64)
        sizes = new_initializer(self._model, self._names.value(f"{name}/sizes"), array)
        zero = ir.AttrTensor("value", ir.Tensor(np.zeros(1, tensor.dtype.numpy()), tensor.dtype))
        for node, index in list(weight.uses()):
            made = self._node(node, "ConstantOfShape", [self._late(node, sizes)], [zero])
            node.replace_input_with(index, made)
        remove_initializer(weight)

    def _late(self, node: ir.Node, sizes: ir.Value) -> ir.Value:
        """Sizes that are known when what a node reads is there, so that weights do not wait."""
        read = [value for value in node.inputs if value is not None]
        data = next((value for value in read if value.producer() is not None), None)
        if data is None:
            return sizes
        nothing = self._node(node, "Mul", [self._node(node, "Shape", [data]), self._zero])
        return self._node(node, "Add", [sizes, self._node(node, "ReduceSum", [nothing])])

    def _node(
        self,
        place: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: Sequence[ir.Attr] = (),
    ) -> ir.Value:
        made = ir.Node("", op_type, inputs, attributes, name=self._names.node(f"zeros/{op_type}"))
        made.outputs[0].name = self._names.value(f"zeros/{op_type}")
        assert place.graph is not None
        place.graph.insert_before(place, made)
        return made.outputs[0]


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    fixed = not value.is_graph_input() and not value.is_graph_output()
    return fixed and tensor is not None and tensor.dtype in _TYPES and tensor.nbytes >= _SMALL


def unoptimised_session(path: Path) -> onnxruntime.InferenceSession:
    """A session that runs a model as it is, and keeps no weights in another form.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    from onnxcomp.runtime.session import import_runtime, open_session

    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return open_session(path, session_options=options)
