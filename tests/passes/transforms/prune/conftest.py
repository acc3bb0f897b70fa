"""Graphs to prune, and the same graphs with channels masked instead of removed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.passes.ir.model import copy_model, load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.axes import Analysis, analyse
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.groups import Groups, find_groups
from onnxcomp.passes.transforms.prune.prepare import prepare
from onnxcomp.passes.transforms.prune.shrink import remove, take

Array = Any

# Operators that sum over channels, with the inputs that hold them.
CONSUMERS = {
    "MatMul": (0, 1), "Gemm": (0,), "Conv": (0,), "ConvTranspose": (0,), "FusedConv": (0,),
    "Attention": (0, 1, 2), "MultiHeadAttention": (0, 1, 2), "GroupQueryAttention": (0, 1, 2),
}  # fmt: skip


def random_choice(groups: Groups, rng: np.random.Generator) -> set[int]:
    """Some candidates of some groups, never all of a group."""
    chosen: set[int] = set()
    for group in groups.groups:
        if rng.random() < 0.3:
            continue
        count = int(rng.integers(0, max(2, group.size // 2)))
        for slot in group.slots:
            for place in rng.choice(len(slot), min(count, len(slot) - 1), replace=False):
                chosen |= slot[place]
    return chosen


def masked(analysis: Analysis, classes: Collection[int]) -> ir.Model:
    """The model with zeros where removed channels are summed over."""
    gone = np.isin(analysis.relations.classes, list(classes))
    model = copy_model(analysis.model)
    twins = dict(zip(analysis.model.graph, list(model.graph), strict=True))
    for node, twin in twins.items():
        for index in CONSUMERS.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            for block in analysis.labels.get(value, ()) if value is not None else ():
                mask = _mask(analysis, value, block, gone)
                if mask is not None:
                    _multiply(model, twin, index, mask)
    for member in analysis.members:
        packed = member.node is not None and member.node.op_type == "Attention"
        if packed and member.role != "in":  # queries and keys are made inside: their weights
            _silence(model, member, ~gone[member.atoms])
    return model


def _silence(model: ir.Model, member: Any, kept: Array) -> None:
    value = model.graph.initializers[member.value.name]
    assert value.const_value is not None
    array = value.const_value.numpy()
    shape = [size if axis in member.axes else 1 for axis, size in enumerate(array.shape)]
    value.const_value = ir.Tensor(array * kept.reshape(shape).astype(array.dtype), name=value.name)


def _mask(analysis: Analysis, value: Any, block: Any, gone: Array) -> Array:
    kept = ~gone[block.atoms]
    if kept.all():
        return None
    rank = len(analysis.seen.shapes[value.name])
    dims = [kept.shape[block.axes.index(a)] if a in block.axes else 1 for a in range(rank)]
    return kept.reshape(dims)


def _multiply(model: ir.Model, node: ir.Node, index: int, mask: Array) -> None:
    value = node.inputs[index]
    name = f"{node.name}.{index}.{len(model.graph.initializers)}.mask"
    dtype = value.dtype if value.dtype is not None else ir.DataType.FLOAT
    constant = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(mask.shape))
    constant.const_value = ir.Tensor(mask.astype(dtype.numpy()), name=name)
    model.graph.register_initializer(constant)
    if model.ir_version < 4:
        model.graph.inputs.append(constant)
    made = ir.node("Mul", [value, constant])
    model.graph.insert_before(node, made)
    node.replace_input_with(index, made.outputs[0])


def run(model: ir.Model, feed: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    """Outputs of a model in ONNX Runtime."""
    from onnxcomp.runtime.evaluate import run_model

    path = save(model, folder / "run.onnx").files[0]
    return dict(run_model(path, [feed])[0])


class Case:
    """A model under analysis."""

    def __init__(self, source: Any, feeds: list[dict[str, Array]] | None = None) -> None:
        self.model = load(source)
        canonicalize(self.model)
        prepare(self.model)
        self.feeds = feeds or probe_feeds(self.model)
        self.analysis = analyse(self.model, self.feeds, freeze_inputs=True)
        self.groups = find_groups(self.analysis)

    def fresh(self) -> Case:
        """The same model again, to be changed."""
        return Case(copy_model(self.model), self.feeds)

    def kept(self, name: str, array: Array, classes: Collection[int]) -> Array:
        """An input or output without the positions that go."""
        gone = np.isin(self.analysis.relations.classes, list(classes))
        blocks = [
            (member.axes, member.atoms)
            for member in self.analysis.members
            if member.value.name == name and member.value.const_value is None
        ]
        for value in self.model.graph.outputs:
            if value.name == name:
                blocks += [(b.axes, b.atoms) for b in self.analysis.labels.get(value, ())]
        for axes, atoms in blocks:
            array = take(array, axes, ~gone[atoms])
        return array

    def check(self, classes: Collection[int], folder: Path, tolerance: float = 1e-4) -> None:
        """The pruned model equals the masked one, passes the checker and shape inference."""
        expected = run(masked(self.analysis, classes), self.feeds[-1], folder)
        pruned = self.fresh()
        remove(pruned.analysis, classes)
        feed = {n: self.kept(n, np.asarray(a), classes) for n, a in self.feeds[-1].items()}
        found = run(pruned.model, feed, folder)
        for name, array in expected.items():
            wanted = self.kept(name, array, classes)
            assert found[name].shape == wanted.shape
            if wanted.dtype.kind == "f":
                scale = float(np.abs(wanted).max(initial=1e-3))
                assert np.abs(found[name] - wanted).max(initial=0.0) <= tolerance * scale
            else:
                np.testing.assert_array_equal(found[name], wanted)
        proto = onnx.load(folder / "run.onnx")
        if all(node.domain in ("", "ai.onnx") for node in proto.graph.node):
            onnx.checker.check_model(proto)
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)


@pytest.fixture
def case() -> Callable[..., Case]:
    """Makes a case of a model."""
    return Case
