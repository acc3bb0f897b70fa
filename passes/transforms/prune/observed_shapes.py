"""Sizes of all values of a model, seen by running it on made-up inputs.

Shape inference gives up where exporters compute shapes. A run does not: beside each value a
``Shape`` node is returned, so that the activations themselves are dropped as usual. Two runs with
different sizes of the free dimensions tell which sizes are fixed.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.transforms.prune.hollow import for_sizes, unoptimised_session
from onnxcomp.passes.weight import Array
from onnxcomp.runtime.evaluate import Feed, runner

__all__ = ["ObservedShapes", "observe_shapes"]

# Integer values with more elements than this are not shapes, bounds or indices.
_SMALL = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class ObservedShapes:
    """What the runs showed.

    Attributes:
        shapes: Shape of each value in the first run; values that are not tensors are missing.
        fixed: For each value which of its sizes were equal in all runs.
        integers: Small integer values of the first run.
        steady: Names of integer values that were equal in all runs.
    """

    shapes: Mapping[str, tuple[int, ...]]
    fixed: Mapping[str, tuple[bool, ...]]
    integers: Mapping[str, Array]
    steady: frozenset[str]

    @property
    def elements(self) -> int:
        """Elements of all values together in the first run."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def observe_shapes(model: ir.Model, feeds: Sequence[Feed]) -> ObservedShapes:
    """Run a model and record sizes.

    Args:
        model: A model with named values; only read.
        feeds: Inputs by name; more than one set to learn which sizes are fixed.

    Raises:
        ModelError: ONNX Runtime cannot load or run the model.
    """
    runs = [_constants(model) | found for found in _run(model, feeds)]
    first = runs[0]
    shapes = {name: shape for name, (shape, _) in first.items()}
    fixed = {name: _equal_sizes(shape, name, runs) for name, shape in shapes.items()}
    integers = {name: value for name, (_, value) in first.items() if value is not None}
    steady = frozenset(
        name
        for name, value in integers.items()
        if all(name in run and np.array_equal(run[name][1], value) for run in runs)
    )
    return ObservedShapes(shapes, fixed, integers, steady)


_Seen = dict[str, tuple[tuple[int, ...], Any]]


def _equal_sizes(shape: tuple[int, ...], name: str, runs: Sequence[_Seen]) -> tuple[bool, ...]:
    others = [run[name][0] if name in run else () for run in runs]
    same = [other for other in others if len(other) == len(shape)]
    if len(same) < len(runs):
        return (False,) * len(shape)
    return tuple(len({other[axis] for other in same}) == 1 for axis in range(len(shape)))


def _integer(array: Array) -> Array | None:
    return array if array.dtype.kind in "iu" and array.size <= _SMALL else None


def _constants(model: ir.Model) -> _Seen:
    """Initializers: their shapes, and the values of small integer ones."""
    found: _Seen = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            shape = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
            small = tensor.dtype.is_integer() and tensor.size <= _SMALL
            found[name] = (shape, tensor.numpy() if small else None)
    return found


def _observed(model: ir.Model) -> tuple[ir.Model, list[str], list[str]]:
    """A copy that returns the shape of each value, and small integer values themselves."""
    copy = copy_model(model)
    graph = copy.graph
    shapes, values = [], []
    graph.outputs.clear()
    for node in list(graph):
        for value in node.outputs:
            if not value.name or not _is_tensor(node, value):
                continue
            made = ir.node("Shape", [value])
            made.outputs[0].name = f"{value.name}::shape"
            graph.append(made)
            shapes.append(value.name)
            made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            graph.outputs.append(made.outputs[0])
    for node in list(graph):
        for value in _parameters(node):
            if value.name and value.producer() is not None and value.name not in values:
                values.append(value.name)
                value.type = value.type or ir.TensorType(ir.DataType.INT64)
                graph.outputs.append(value)
    return copy, shapes, values


_NO_TENSORS = ("Sequence", "SplitToSequence", "Optional", "ZipMap", "CastMap")


def _is_tensor(node: ir.Node, value: ir.Value) -> bool:
    if value.type is not None:
        return isinstance(value.type, ir.TensorType)
    return not node.op_type.startswith(_NO_TENSORS)


# Operators whose inputs of these positions say how big or where something is.
_PARAMETERS = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Split": (1,), "Pad": (1, 3),
    "Tile": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Gather": (1,), "Resize": (3,),
    "ReduceMean": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMin": (1,), "ReduceL2": (1,),
}  # fmt: skip


def _parameters(node: ir.Node) -> list[ir.Value]:
    wanted = _PARAMETERS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ()
    found = [node.inputs[i] for i in wanted if i < len(node.inputs)]
    return [value for value in found if value is not None and not value.is_graph_input()]


def _run(model: ir.Model, feeds: Sequence[Feed]) -> list[_Seen]:
    copy, shapes, values = _observed(model)
    with tempfile.TemporaryDirectory() as folder:
        path = save(for_sizes(copy), Path(folder) / "probe.onnx").files[0]
        session = unoptimised_session(path)
    call = runner(session)
    found: list[_Seen] = []
    for feed in feeds:
        results = call(feed)
        seen: _Seen = {name: (np.shape(array), None) for name, array in feed.items()}
        seen |= {n: (tuple(r.tolist()), None) for n, r in zip(shapes, results, strict=False)}
        for name, result in zip(values, results[len(shapes) :], strict=True):
            if not isinstance(result, np.ndarray):
                raise ModelError(f"value {name!r} is not a tensor")
            seen[name] = (result.shape, _integer(result))
        found.append(seen)
    return found
