"""Weights that a model computes from two tensors that it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.masked_weights import MaskedWeights
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.weight import Array

RNG = np.random.default_rng(3)
W = RNG.standard_normal((96, 64)).astype(np.float32)
MASK = (RNG.random((96, 64)) < 0.2).astype(np.float32)
SCALE = RNG.uniform(0.5, 2, (96, 1)).astype(np.float32)
OTHER = RNG.standard_normal((96, 64)).astype(np.float32)

Nodes = list[onnx.NodeProto]


def node(operator: str, *inputs: str, to: str) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [to], name=f"make_{to}")


def model(nodes: Nodes, *, listed: str = "", returned: str = "") -> onnx.ModelProto:
    """``y = x w``, with nodes that make w from W, MASK, SCALE and the like."""
    tensors = {"W": W, "mask": MASK, "kept": MASK > 0, "scale": SCALE, "other": OTHER}
    tensors["zero"] = np.zeros((), np.float32)
    tensors["few"] = (RNG.random((96, 64)) < 0.03).astype(np.float32)
    tensors |= {"signs": np.sign(W), "codes": np.round(W * 40).clip(-128, 127)}
    read = {name for each in nodes for name in each.input}
    held = [numpy_helper.from_array(tensors[name], name) for name in tensors if name in read]
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["n", 96])]
    inputs += [info(listed, TensorProto.FLOAT, [96, 64])] if listed else []
    outputs = [info("y", TensorProto.FLOAT, ["n", 64])]
    outputs += [info(returned, TensorProto.FLOAT, [96, 64])] if returned else []
    nodes = [*nodes, node("MatMul", "x", "w", to="y")]
    graph = helper.make_graph(nodes, "masked", inputs, outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def joined(proto: onnx.ModelProto, **settings: Any) -> tuple[int, onnx.ModelProto]:
    """How many weights are joined, and the model then."""
    found = load(proto)
    canonicalize(found)
    change = MaskedWeights().run(found, Context(Settings(min_size=64, **settings)))
    return change.count, ir.to_proto(found)


def run(proto: onnx.ModelProto) -> Array:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    result: Array = session.run(["y"], {"x": x})[0]
    return result


CASES: dict[str, Callable[[], Nodes]] = {
    "mask": lambda: [node("Mul", "W", "mask", to="w")],
    "mask first": lambda: [node("Mul", "mask", "W", to="w")],
    "booleans": lambda: [
        helper.make_node("Cast", ["kept"], ["m"], name="cast", to=TensorProto.FLOAT),
        node("Mul", "W", "m", to="w"),
    ],
    "where": lambda: [node("Where", "kept", "W", "zero", to="w")],
    "most of it masked before": lambda: [
        node("Mul", "W", "few", to="v"),
        node("Mul", "v", "mask", to="w"),
    ],
    "scales of rows": lambda: [node("Div", "W", "scale", to="w")],
    "a difference, masked": lambda: [
        node("Sub", "W", "other", to="d"),
        node("Mul", "d", "mask", to="w"),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_one_tensor_takes_the_place_of_two_bit_for_bit(name: str) -> None:
    nodes = CASES[name]()
    proto = model(nodes)
    count, found = joined(proto)
    assert count == sum(each.op_type != "Cast" for each in nodes)
    assert [each.op_type for each in found.graph.node] == ["MatMul"]
    (held,) = found.graph.initializer
    assert held.name == "W"
    assert run(found).tobytes() == run(proto).tobytes()


LEFT = {
    "read elsewhere": (model([node("Mul", "W", "mask", to="w"), node("Neg", "W", to="v")]), {}),
    "may be overridden": (model([node("Mul", "W", "mask", to="w")], listed="W"), {}),
    "returned": (model([node("Mul", "W", "mask", to="w")], returned="w"), {}),
    "excluded": (model([node("Mul", "W", "mask", to="w")]), {"exclude": ("^W$",)}),
    "read by a node that is excluded": (
        model([node("Mul", "W", "mask", to="w")]),
        {"exclude": ("^make_y$",)},
    ),
    "not among those that are included": (
        model([node("Mul", "W", "mask", to="w")]),
        {"include": ("^other$",)},
    ),
    "signs and scales": (model([node("Mul", "signs", "scale", to="w")]), {}),
    "codes and scales": (model([node("Mul", "scale", "codes", to="w")]), {}),
    "smaller than its factor": (model([node("Mul", "scale", "scale", to="w")]), {}),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name: str) -> None:
    proto, settings = LEFT[name]
    assert joined(proto, **settings)[0] == 0


def test_masks_are_not_stored_beside_what_they_leave(tmp_path: Path) -> None:
    onnx.save(model([node("Mul", "W", "mask", to="w")]), tmp_path / "m.onnx")
    result = oc.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", method="sparse", min_size=64)
    (site,) = result.report.sites
    assert (site.name, site.method) == ("W", "sparse")
    assert site.params["kept"] == np.count_nonzero(W * MASK)
    assert result.verify is not None and result.verify.outputs["y"].rel_l2 == 0.0
