"""Noise and loss of outputs: of distributions it is the divergence that a user would see."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from scipy.special import log_softmax

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibration.output_difference import OutputDifference, kinds_by_name

RNG = np.random.default_rng(3)


def model(kind: str, *, output: str = "y", others: int = 0) -> ir.Model:
    """A model whose output comes from an operator, beside some that are values."""
    nodes = [helper.make_node(kind, ["x"], [output])]
    nodes += [helper.make_node("Relu", ["x"], [f"other{n}"]) for n in range(others)]
    names = [output, *(f"other{n}" for n in range(others))]
    graph = helper.make_graph(
        nodes, "m",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 7])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7]) for name in names],
    )  # fmt: skip
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


@pytest.mark.parametrize(
    ("kind", "output", "told"),
    [("Softmax", "y", "Softmax"), ("LogSoftmax", "y", "LogSoftmax"), ("Relu", "logits", "logits")],
)
def test_the_loss_of_distributions_is_their_divergence(kind: str, output: str, told: str) -> None:
    kinds = kinds_by_name(model(kind, output=output, others=1))
    assert kinds == {output: told}
    exact, found = RNG.standard_normal((2, 5, 7)).astype(np.float32)
    p, q = log_softmax(exact, axis=-1), log_softmax(found, axis=-1)
    wanted = float((np.exp(p) * (p - q)).sum() / 5)
    own = {"Softmax": np.exp, "LogSoftmax": lambda x: x, "logits": lambda x: x + 2.5}[told]
    difference = OutputDifference(kinds)
    for rows in (slice(0, 3), slice(3, 5)):
        other = {"other0": exact[rows]}
        difference.add({output: own(p[rows]), **other}, {output: own(q[rows]), **other})
    assert difference.mean().loss == pytest.approx(wanted, rel=1e-4)
    assert difference.losses().mean() == pytest.approx(wanted, rel=1e-4)
    assert len(difference.losses()) == 2


def test_a_change_that_all_words_share_is_noise_and_no_loss() -> None:
    logits = RNG.standard_normal((4, 7)).astype(np.float32)
    difference = OutputDifference({"y": "logits"})
    difference.add({"y": logits}, {"y": logits + 1})
    assert difference.mean().noise > 0.5
    assert difference.mean().loss < 1e-12


def test_small_divergences_are_not_lost_in_rounding() -> None:
    logits = RNG.standard_normal((8, 5000)).astype(np.float32)
    change = 1e-3 * RNG.standard_normal((8, 5000)).astype(np.float32)
    wide, moved = (log_softmax(a.astype(np.float64), axis=-1) for a in (logits, logits + change))
    difference = OutputDifference({"y": "logits"})
    difference.add({"y": logits}, {"y": logits + change})
    wanted = float((np.exp(wide) * (wide - moved)).sum() / 8)
    assert difference.mean().loss == pytest.approx(wanted, rel=0.01)


def test_values_lose_what_they_differ_by() -> None:
    kinds = kinds_by_name(model("Relu", others=1))
    assert set(kinds.values()) == {"values"}
    exact = {"y": np.ones((2, 7), np.float32), "other0": 2 * np.ones((2, 7), np.float32)}
    difference = OutputDifference(kinds)
    difference.add(exact, {"y": 1.1 * exact["y"], "other0": exact["other0"]})
    assert difference.mean().noise == difference.mean().loss == pytest.approx(0.005, rel=1e-3)
    assert difference.worst_noise() == pytest.approx(0.01, rel=1e-3)


def test_outputs_of_another_size_and_zeros_say_nothing() -> None:
    difference = OutputDifference({})
    difference.add({"y": np.zeros(3)}, {"y": np.ones(3)})
    difference.add({"z": np.ones(3)}, {"z": np.ones(4)})
    with pytest.raises(ModelError, match="every output"):
        difference.mean()


def test_whole_models_are_read_by_their_outputs_alone() -> None:
    proto = ir.to_proto(model("Softmax"))
    assert isinstance(proto, onnx.ModelProto)
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    assert kinds_by_name(ir.from_proto(proto)) == {}
