"""Every rule against finite differences of the operator itself, as ONNX Runtime computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.backward import RULES, backward, missing_rules, with_shapes
from onnxcomp.passes.gradients.tape import Tape
from onnxcomp.passes.weight import Array

OPSET = 17
STEP = 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator with inputs.

    Attributes:
        op: The operator.
        inputs: Shapes of random inputs, or arrays to take as they are.
        wanted: Numbers of the inputs to differentiate by.
        attributes: Of the node.
        span: Random inputs lie between these.
        outputs: Number of outputs.
        opset: The first opset that has the operator, where it is newer than the tests'.
    """

    op: str
    inputs: Sequence[tuple[int, ...] | Array]
    wanted: Sequence[int] = (0,)
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    span: tuple[float, float] = (-2.0, 2.0)
    outputs: int = 1
    opset: int = OPSET


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


UNARY = {
    **dict.fromkeys(("Cos", "Erf", "Identity", "Neg", "Sigmoid", "Sin", "Softplus"), (-2.0, 2.0)),
    **dict.fromkeys(("Exp", "Tanh", "Dropout", "HardSwish", "Elu"), (-2.0, 2.0)),
    **dict.fromkeys(("Log", "Reciprocal", "Sqrt", "Abs", "Relu", "LeakyRelu"), (0.3, 2.0)),
}
CASES = [
    *(Case(op, [(3, 5)], span=span) for op, span in UNARY.items()),
    *(Case(op, [(3, 5)], span=(-2.0, -0.3)) for op in ("Abs", "Relu", "LeakyRelu")),
    Case("HardSigmoid", [(3, 5)], span=(-1.0, 1.0)),
    Case("Gelu", [(3, 5)], opset=20),
    Case("Gelu", [(3, 5)], attributes={"approximate": "tanh"}, opset=20),
    Case("Swish", [(3, 5)], attributes={"alpha": 1.5}, opset=24),
    Case("Cast", [(3, 5)], attributes={"to": 1}),
    *(Case(op, [(4, 3, 5), (3, 1)], (0, 1)) for op in ("Add", "Sub", "Mul", "Sum")),
    *(Case(op, [(3, 1), (4, 3, 5)], (0, 1)) for op in ("Add", "Sub", "Mul")),
    Case("Div", [(4, 3, 5), (5,)], (0, 1), span=(0.5, 2.0)),
    Case("Pow", [(3, 5), np.array(2.0, np.float32)]),
    Case("Pow", [(3, 5), np.array(3, np.int64)]),
    Case("Pow", [(3, 5), (5,)], (0, 1), span=(0.5, 2.0)),
    Case("Where", [np.arange(15).reshape(3, 5) % 2 == 0, (3, 5), (1, 5)], (1, 2)),
    Case("Max", [(3, 5), np.full((5,), 0.01, np.float32)], (0,), span=(0.1, 2.0)),
    Case("Min", [(3, 5), (3, 5)], (0, 1), span=(0.1, 2.0)),
    Case("Clip", [(3, 5), np.float32(-1.9), np.float32(9.0)], span=(-1.5, 2.0)),
    Case("PRelu", [(3, 5), (5,)], (0, 1), span=(0.2, 1.0)),
    Case("MatMul", [(4, 3), (3, 5)], (0, 1)),
    Case("MatMul", [(2, 4, 3), (3, 5)], (0, 1)),
    Case("MatMul", [(2, 6, 4, 3), (6, 3, 5)], (0, 1)),
    *(
        Case("Gemm", [a, b, (5,)], (0, 1, 2), {"transA": ta, "transB": tb, "alpha": 1.5})
        for ta, a in enumerate(((4, 3), (3, 4)))
        for tb, b in enumerate(((3, 5), (5, 3)))
    ),
    Case("Conv", [(2, 3, 9, 8), (4, 3, 3, 2), (4,)], (0, 1, 2), {"pads": [1, 0, 2, 1]}),
    Case("Conv", [(2, 3, 9, 8), (4, 3, 3, 3)], (0, 1), {"strides": [2, 3]}),
    Case("Conv", [(2, 3, 11), (4, 3, 3)], (0, 1), {"dilations": [2], "strides": [2]}),
    Case("Conv", [(2, 4, 9, 8), (6, 2, 3, 3)], (0, 1), {"group": 2, "strides": [2, 2]}),
    Case("Conv", [(3, 4, 9, 8), (4, 1, 3, 3)], (0, 1), {"group": 4, "pads": [1, 1, 0, 1]}),
    Case("Conv", [(2, 6, 11), (6, 2, 3)], (0, 1), {"group": 3, "dilations": [2], "strides": [2]}),
    Case("Softmax", [(3, 4, 5)]),
    Case("Softmax", [(3, 4, 5)], attributes={"axis": 1}),
    Case("LogSoftmax", [(3, 4, 5)]),
    *(Case(op, [(3, 4, 5)], attributes={"axes": [1]}) for op in ("ReduceMean", "ReduceL2")),
    Case("ReduceMean", [(3, 4, 5)], attributes={"axes": [-1, 0], "keepdims": 0}),
    Case("ReduceMean", [(3, 4, 5), ints(1)], opset=18),
    Case("ReduceSum", [(3, 4, 5), ints(-1)], attributes={"keepdims": 0}),
    Case("ReduceSum", [(3, 4, 5)]),
    Case("ReduceMax", [np.arange(20, dtype=np.float32).reshape(4, 5)], attributes={"axes": [1]}),
    Case("ReduceMin", [np.arange(20, dtype=np.float32).reshape(4, 5)], attributes={"axes": [1]}),
    Case("LayerNormalization", [(3, 4, 5), (5,), (5,)], (0, 1, 2)),
    Case("RMSNormalization", [(3, 4, 5), (5,)], (0, 1), opset=23),
    Case(
        "BatchNormalization",
        [(2, 3, 4, 5), (3,), (3,), (3,), np.array([0.5, 1.0, 2.0], np.float32)],
        (0, 1, 2),
    ),
    Case("GlobalAveragePool", [(2, 3, 4, 5)]),
    Case("Reshape", [(3, 4), ints(2, -1)]),
    Case("Flatten", [(3, 4, 2)]),
    Case("Transpose", [(3, 4, 2)], attributes={"perm": [2, 0, 1]}),
    Case("Transpose", [(3, 4, 2)]),
    Case("Squeeze", [(3, 1, 2), ints(1)]),
    Case("Unsqueeze", [(3, 2), ints(0, 2)]),
    Case("Expand", [(3, 1), ints(2, 3, 4)]),
    Case("Concat", [(3, 2), (3, 4)], (0, 1), {"axis": 1}),
    Case("Split", [(3, 6), ints(2, 4)], attributes={"axis": 1}, outputs=2),
    Case("Slice", [(5, 6), ints(1, 5), ints(4, -7), ints(0, 1), ints(2, -1)]),
    Case("Gather", [(5, 3), np.array([[0, 2], [2, 4]], np.int64)]),
    Case("Pad", [(3, 4), ints(1, 0, 2, 3)]),
]


def _varies(array: Array) -> bool:
    return array.dtype == np.float32 and array.ndim > 0


def model_of(case: Case, arrays: Sequence[Array]) -> onnx.ModelProto:
    names = [f"x{number}" for number in range(len(arrays))]
    results = [f"y{number}" for number in range(case.outputs)]
    node = helper.make_node(case.op, names, results, name="node", **case.attributes)
    kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    given = [
        helper.make_tensor_value_info(name, kind, array.shape)
        for name, kind, array in zip(names, kinds, arrays, strict=True)
        if _varies(array)
    ]
    # Settings are initializers, as in models.
    fixed = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in zip(names, arrays, strict=True)
        if not _varies(array)
    ]
    outputs = [helper.make_tensor_value_info(name, 1, None) for name in results]
    graph = helper.make_graph([node], "case", given, outputs, fixed)
    opset = helper.make_opsetid("", case.opset)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def run(model: ir.Model, feed: Mapping[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True))


def name_of(case: Case) -> str:
    return f"{case.op}-{case.inputs[0] if isinstance(case.inputs[0], tuple) else 'given'}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_rule_agrees_with_finite_differences(case: Case) -> None:
    rng = np.random.default_rng(0)
    arrays = [
        rng.uniform(*case.span, entry).astype(np.float32)
        if isinstance(entry, tuple)
        else np.asarray(entry)
        for entry in case.inputs
    ]
    feed = {f"x{n}": a for n, a in enumerate(arrays) if _varies(a)}
    model = ir.from_proto(model_of(case, arrays))
    plain = ir.from_proto(model_of(case, arrays))
    exact = run(plain, feed)
    weights = {name: rng.standard_normal(y.shape).astype(np.float32) for name, y in exact.items()}
    found = run(differentiated(model, weights, case.wanted), feed)
    for index in case.wanted:
        name = f"x{index}"
        assert found[f"d{name}"].shape == arrays[index].shape
        for _ in range(3):
            way = rng.standard_normal(arrays[index].shape).astype(np.float32)
            ends = [run(plain, {**feed, name: feed[name] + sign * STEP * way}) for sign in (1, -1)]
            slope = sum(
                float((weights[y].astype(np.float64) * (ends[0][y] - ends[1][y])).sum())
                for y in weights
            ) / (2 * STEP)
            size = float(np.linalg.norm(found[f"d{name}"]) * np.linalg.norm(way))
            assert abs(float((found[f"d{name}"] * way).sum()) - slope) < 3e-3 * max(size, 1.0)


def differentiated(
    model: ir.Model, weights: Mapping[str, Array], wanted: Sequence[int]
) -> ir.Model:
    """The model with outputs ``dx`` for some of its inputs, for ``L = sum(w y)``."""
    with_shapes(model)
    graph, tape = model.graph, Tape(model)
    inputs = {value.name: value for value in graph.inputs}
    chosen = [inputs[f"x{index}"] for index in wanted]
    seeds = {value: tape.constant(weights[value.name or ""]) for value in graph.outputs}
    assert not missing_rules(graph, seeds, chosen)
    gradients = backward(tape, graph, seeds, chosen)
    for value, gradient in gradients.items():
        result = tape.node("Identity", [gradient])
        result.name = f"d{value.name}"
        graph.outputs.append(result)
    return model


def test_every_rule_has_a_case() -> None:
    assert set(RULES) - {case.op for case in CASES} == {"SimplifiedLayerNormalization"}


def test_paths_that_meet_add_up() -> None:
    """``L = sum((x + x) x)`` has the gradient ``4 x``."""
    nodes = [
        helper.make_node("Add", ["x0", "x0"], ["twice"], name="a"),
        helper.make_node("Mul", ["twice", "x0"], ["y0"], name="b"),
    ]
    info = [helper.make_tensor_value_info(name, 1, [3]) for name in ("x0", "y0")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    model = differentiated(ir.from_proto(proto), {"y0": np.ones(3, np.float32)}, (0,))
    x = np.array([1.0, -2.0, 3.0], np.float32)
    np.testing.assert_allclose(run(model, {"x0": x})["dx0"], 4 * x)


def test_an_operator_without_a_rule_is_named() -> None:
    case = Case("Det", [(3, 3)])
    model = ir.from_proto(model_of(case, [np.eye(3, dtype=np.float32)]))
    graph, tape = model.graph, Tape(model)
    seeds = {graph.outputs[0]: tape.number(1.0)}
    assert missing_rules(graph, seeds, graph.inputs) == {"Det"}
    with pytest.raises(ModelError, match="Det"):
        backward(tape, graph, seeds, graph.inputs)


def test_old_opsets_are_refused() -> None:
    case = Case("Relu", [(3,)], opset=12)
    with pytest.raises(ModelError, match="opset 13"):
        Tape(ir.from_proto(model_of(case, [np.ones(3, np.float32)])))
