"""Losses are what their names say, and their seeds are their gradients."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.passes.gradients.loss import add_loss
from onnxcomp.passes.gradients.tape import Tape

Array = npt.NDArray[Any]
SHAPE = (3, 4, 6)


def model(node: onnx.NodeProto, name: str, table: bool = False) -> ir.Model:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(SHAPE)) for n in ("x", name)]
    fixed, nodes = [], [node]
    if table:
        fixed = [
            numpy_helper.from_array(np.ones((SHAPE[-1], 2), np.float32), "table"),
            numpy_helper.from_array(np.zeros(1, np.int64), "ids"),
        ]
        nodes.append(helper.make_node("Gather", ["table", "ids"], ["rows"]))
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], fixed)
    opset = helper.make_opsetid("", 17)
    return ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=8))


def evaluated(given: ir.Model, x: Array, wanted: Array) -> tuple[float, Array]:
    """The loss, and the gradient with respect to the output."""
    loss = add_loss(Tape(given), given)
    (seed,) = loss.seeds.values()
    (name,) = loss.references.values()
    given.graph.outputs.extend([loss.value, seed])
    session = onnxruntime.InferenceSession(ir.to_proto(given).SerializeToString())
    names = [loss.value.name, seed.name]
    found = session.run(names, {"x": x, name: wanted})
    return float(found[0]), found[1]


def divergence(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum() / (p.size // p.shape[-1]))


def softmax(x: Array) -> Array:
    exponents = np.exp(x.astype(np.float64))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def inputs() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("table", [False, True], ids=["by name", "by a table as wide"])
def test_logits_are_compared_as_distributions(table: bool) -> None:
    x, wanted = inputs()
    name = "y" if table else "logits"
    identity = helper.make_node("Identity", ["x"], [name])
    loss, seed = evaluated(model(identity, name, table), x, wanted)
    p, q = softmax(wanted), softmax(x)
    assert loss == pytest.approx(divergence(p, q), rel=1e-5)
    np.testing.assert_allclose(seed, (q - p) / 12, atol=1e-6)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_probabilities_are_distributions(op: str) -> None:
    x, wanted = inputs()
    p, q = softmax(wanted), softmax(x)
    given = p if op == "Softmax" else np.log(p)
    node = helper.make_node(op, ["x"], ["y"])
    loss, seed = evaluated(model(node, "y"), x, given.astype(np.float32))
    assert loss == pytest.approx(divergence(p, q), rel=1e-4)
    np.testing.assert_allclose(seed, -(p / q if op == "Softmax" else p) / 12, rtol=1e-4)


def test_other_outputs_are_compared_by_their_values() -> None:
    x, wanted = inputs()
    loss, seed = evaluated(model(helper.make_node("Identity", ["x"], ["y"]), "y"), x, wanted)
    power = float(np.square(wanted).sum())
    assert loss == pytest.approx(float(np.square(x - wanted).sum()) / power, rel=1e-5)
    np.testing.assert_allclose(seed, 2 * (x - wanted) / power, rtol=1e-4, atol=1e-7)


def test_a_model_without_computed_outputs_has_no_loss() -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)
    given = model(node, "y")
    given.graph.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    with pytest.raises(ModelError, match="nothing to compare"):
        add_loss(Tape(given), given)
