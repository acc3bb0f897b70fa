"""A large model that makes zeros for weights: sizes of values do not depend on what these hold.

Each weight is made where it is read and goes again, so that a run takes memory for the largest of
them and not for all.
"""

from __future__ import annotations

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
    names = Names(copy)
    for name in [value.name or "" for value in large]:
        value = copy.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        sizes = np.array(shape_of(tensor), np.int64)
        shape = new_initializer(copy, names.value(f"{name}/sizes"), sizes)
        zero = ir.Tensor(np.zeros(1, tensor.dtype.numpy()), dtype=tensor.dtype)
        for node, index in list(value.uses()):
            made = ir.node("ConstantOfShape", [shape], {"value": zero})
            made.name = names.node(f"{name}/zeros")
            made.outputs[0].name = names.value(f"{name}/zeros")
            assert node.graph is not None
            node.graph.insert_before(node, made)
            node.replace_input_with(index, made.outputs[0])
        remove_initializer(value)
    return copy


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
    return open_session(path, session_options=options)
