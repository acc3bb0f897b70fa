"""Which constant is added to the products of a convolution, and to nothing else."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.offsets import Offset, apply_shift, offset_of
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.weight import Shift, WeightSite

Array = npt.NDArray[Any]
CHANNELS = 4


def model_of(nodes: list[Any], **tensors: Array) -> ir.Model:
    shape = [1, CHANNELS, 8, 8]
    weight = np.ones((CHANNELS, CHANNELS, 3, 3), np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in {"w": weight, **tensors}.items()],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def conv(*inputs: str, output: str = "y") -> Any:
    return helper.make_node("Conv", list(inputs), [output], name=output)


def site_of(model: ir.Model) -> WeightSite:
    return next(site for site in find_sites(model, min_size=1).sites if site.name == "w")


def channels(value: float = 0.0) -> Array:
    return np.full(CHANNELS, value, np.float32)


def found(model: ir.Model) -> Offset | None:
    return offset_of(model, site_of(model))


def test_a_bias_is_added() -> None:
    assert found(model_of([conv("x", "w", "b")], b=channels())) == Offset("b", 1)


def test_without_a_bias_means_of_a_normalization_are_subtracted() -> None:
    nodes = [
        conv("x", "w", output="h"),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"], name="bn"),
    ]
    parts = {name: channels(1.0) for name in "sbmv"}
    offset = found(model_of(nodes, **parts))
    assert offset == Offset("m", -1)
    assert np.array_equal(offset.shift(channels(2.0)).change, channels(-2.0))


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    [
        pytest.param([conv("x", "w")], {}, id="no bias"),
        pytest.param(
            [conv("x", "w", "b", output="h"), conv("h", "w2", "b")],
            {"b": channels(), "w2": np.ones((CHANNELS, CHANNELS, 3, 3), np.float32)},
            id="two convolutions share a bias",
        ),
        pytest.param(
            [conv("x", "w", "b", output="h"), conv("h", "w", "c")],
            {"b": channels(), "c": channels(1.0)},
            id="two uses of the weight",
        ),
        pytest.param(
            [helper.make_node("Neg", ["c"], ["b"], name="n"), conv("x", "w", "b")],
            {"c": channels()},
            id="computed",
        ),
    ],
)
def test_nothing_else_is_taken(nodes: list[Any], tensors: dict[str, Array]) -> None:
    assert found(model_of(nodes, **tensors)) is None


def test_a_shift_keeps_the_type() -> None:
    model = model_of([conv("x", "w", "b")], b=channels(1.0).astype(np.float16))
    apply_shift(model, Shift("b", channels(0.5)))
    moved = model.graph.initializers["b"].const_value
    assert moved is not None
    assert moved.dtype == ir.DataType.FLOAT16
    assert np.array_equal(moved.numpy(), channels(1.5))
    with pytest.raises(ModelError, match="no initializer 'none'"):
        apply_shift(model, Shift("none", channels()))
