"""Which channels of a model stand or fall together.

`analyse` visits the nodes of the main graph in order. Each operator's rule relates the atoms of its
inputs (see `atoms`), binds axes of weights, and notes what must be rewritten when atoms go. What
no rule understands keeps its channels, with the reason. Subgraphs are not entered: what they read
stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.segmented_run import read_values
from onnxcomp.passes.ir.traversal import is_default_domain, subgraphs
from onnxcomp.passes.transforms.prune import rules, rules_attention, rules_shape
from onnxcomp.passes.transforms.prune.atoms import Block, Relations
from onnxcomp.passes.transforms.prune.observed_shapes import ObservedShapes, observe_shapes
from onnxcomp.passes.transforms.prune.patch import Patch
from onnxcomp.passes.transforms.prune.walk import Member, QkProduct, Walk
from onnxcomp.runtime.evaluate import Feed

__all__ = ["Analysis", "analyse"]

Rule = Callable[[Walk, ir.Node], None]

_ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "Cast",
    "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh",
    "ThresholdedRelu", "Where", "Xor", "Dropout",
)  # fmt: skip

_REDUCTIONS = (
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "ArgMax", "ArgMin",
)  # fmt: skip

_DEFAULT: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, rules.elementwise),
    **dict.fromkeys(
        _REDUCTIONS,
        rules_shape.reduce,
    ),
    **dict.fromkeys(
        ["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool"],
        rules_shape.pool,
    ),
    **dict.fromkeys(
        ["Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization"],
        rules_shape.softmax,
    ),
    "MatMul": rules.matmul,
    "Gemm": rules.gemm,
    "Conv": rules.conv,
    "ConvTranspose": rules.conv_transpose,
    "BatchNormalization": rules.batch_norm,
    "InstanceNormalization": rules.batch_norm,
    "Attention": rules_attention.attention,
    "Transpose": rules_shape.transpose,
    "Reshape": rules_shape.reshape,
    "Flatten": rules_shape.flatten,
    "Squeeze": rules_shape.squeeze,
    "Unsqueeze": rules_shape.unsqueeze,
    "Expand": rules_shape.expand,
    "Tile": rules_shape.tile,
    "Concat": rules_shape.concat,
    "Split": rules_shape.split,
    "Slice": rules_shape.slice_,
    "Gather": rules_shape.gather,
    "Pad": rules_shape.pad,
    "Resize": rules_shape.resample,
    "Upsample": rules_shape.resample,
    "Shape": rules_shape.shape,
}

_MICROSOFT: Mapping[str, Rule] = {
    "FusedConv": rules.conv,
    "Gelu": rules.elementwise,
    "FastGelu": rules.elementwise,
    "QuickGelu": rules.elementwise,
    "BiasGelu": rules.elementwise,
    "Attention": rules_attention.packed_attention,
    "MultiHeadAttention": rules_attention.multi_head_attention,
    "GroupQueryAttention": rules_attention.group_query_attention,
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What is known about the channels of a model.

    Attributes:
        model: The model; nodes and initializers below belong to it.
        seen: Sizes of its values.
        relations: Classes of atoms, and what is frozen.
        members: Axes of initializers and inputs that hold atoms.
        labels: Blocks of atoms by value.
        moved: Blocks of values between an initializer and the node that binds it.
        patches: What to write anew when atoms go.
        qk_products: Products of two activations that sum over atoms.
        stuck: Why weights that make channels have no atoms, by name.
    """

    model: ir.Model
    seen: ObservedShapes
    relations: Relations
    members: tuple[Member, ...]
    labels: Mapping[ir.Value, tuple[Block, ...]]
    moved: tuple[tuple[ir.Value, Block], ...]
    patches: tuple[Patch, ...]
    qk_products: tuple[QkProduct, ...]
    stuck: Mapping[str, str]

    def classes(self, atoms: np.ndarray) -> np.ndarray:
        """Class numbers of atoms."""
        return np.asarray(self.relations.classes[atoms])


def analyse(
    model: ir.Model, feeds: Sequence[Feed], *, freeze_inputs: bool = False, caches: bool = True
) -> Analysis:
    """Find out which channels of a model stand or fall together.

    Args:
        model: A canonical model; not changed.
        feeds: Inputs it accepts, preferably two of different sizes.
        freeze_inputs: Whether initializers that are listed as inputs may shrink.
        caches: Whether inputs that hold a cache may shrink.

    Raises:
        ModelError: ONNX Runtime cannot run the model on the inputs.
    """
    seen = observe_shapes(model, feeds)
    walk = Walk(model, seen, freeze_inputs=freeze_inputs, caches=caches)
    for node in model.graph:
        _visit(walk, node)
    _keep_outputs(walk)
    _keep_shared(walk)
    return Analysis(
        model,
        seen,
        walk.atoms.settle(),
        tuple(walk.members),
        walk.labels,
        tuple(walk.moved),
        tuple(walk.patches),
        tuple(walk.qk_products),
        walk.stuck,
    )


def _visit(walk: Walk, node: ir.Node) -> None:
    nested = [
        value for _, graph in subgraphs(node) for inner in graph for value in read_values(inner)
    ]
    nested += [value for _, graph in subgraphs(node) for value in graph.outputs]
    for value in nested:
        walk.freeze(walk.label(value), f"a subgraph of {node.name} reads it")
    table = _DEFAULT if is_default_domain(node.domain) else {}
    if node.domain == "com.microsoft":
        table = _MICROSOFT
    rule = table.get(node.op_type)
    known = all(value is None or value.name in walk.seen.shapes for value in node.inputs)
    if rule is None or nested or not known or not node.outputs[0].name:
        rules.unknown(walk, node)
    elif all(out.name in walk.seen.shapes for out in node.outputs[:1]):
        rule(walk, node)
    else:
        rules.unknown(walk, node)


def _keep_outputs(walk: Walk) -> None:
    for value in walk.model.graph.outputs:
        if value not in walk.caches:
            walk.freeze(walk.label(value), "it is an output of the model")


def _keep_shared(walk: Walk) -> None:
    """Weights that are read in several places shrink only where all readers agree."""
    readers: dict[ir.Value, dict[tuple[ir.Node, int], dict[tuple[int, ...], list[Member]]]] = {}
    for member in walk.members:
        if member.node is not None:
            own = readers.setdefault(member.value, {}).setdefault(
                (member.node, member.input_index), {}
            )
            own.setdefault(member.axes, []).append(member)
    for value, found in readers.items():
        bound = [member for axes in found.values() for group in axes.values() for member in group]
        foreign = _foreign(walk, value)
        if foreign is not None:
            for member in bound:
                walk.atoms.freeze(member.atoms, f"{value.name} is also read by {foreign}")
        _agree(walk, value, [set(axes) for axes in found.values()], bound)


def _agree(
    walk: Walk, value: ir.Value, axes: Sequence[set[tuple[int, ...]]], bound: Sequence[Member]
) -> None:
    common = set.intersection(*axes)
    first: dict[tuple[int, ...], Member] = {}
    for member in bound:
        if member.axes not in common:
            walk.atoms.freeze(member.atoms, f"{value.name} is also read where it cannot shrink")
        else:
            walk.atoms.same(first.setdefault(member.axes, member).atoms, member.atoms)


def _foreign(walk: Walk, value: ir.Value) -> str | None:
    """A reader of a weight, or of what only moves it, that no rule has claimed."""
    if value.is_graph_output():
        return "the outputs of the model"
    for use in value.uses():
        if (use.node, use.idx) not in walk.claimed:
            return f"{use.node.op_type} {use.node.name}"
        if use.idx == 0 and use.node.op_type in ("Transpose", "Reshape", "Identity", "Cast"):
            found = _foreign(walk, use.node.outputs[0])
            if found is not None:
                return found
    return None
