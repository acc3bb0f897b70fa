"""Plans for a size compress small weights where these would take much of it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Six filters of 9 KiB before a weight of 147 KiB, and one of less than 1 KiB."""
    rng = np.random.default_rng(0)
    shapes = {"first": (16, 1, 3, 3), "wide": (256, 16, 3, 3)}
    shapes |= {f"small{number}": (16, 16, 3, 3) for number in range(6)}
    names = ["first", *(f"small{number}" for number in range(6)), "wide"]
    fixed = [
        numpy_helper.from_array((rng.standard_normal(shapes[n]) / 9).astype(np.float32), n)
        for n in names
    ]
    values = ["x", *names[:-1], "y"]
    values[1:-1] = [f"{name}.out" for name in names[:-1]]
    nodes = [
        helper.make_node("Conv", [values[i], name], [values[i + 1]], pads=[1, 1, 1, 1])
        for i, name in enumerate(names)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], fixed)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


SMALL = {f"small{number}" for number in range(6)}


def compressed(path: Path, **options: Any) -> set[str]:
    """Names of the weights that a plan compresses."""
    plan = onnxcomp.plan(path, method="hyper", portable=False, **options)
    return {choice.site for choice in plan if not choice.kept}


def test_a_small_size_takes_small_weights(path: Path) -> None:
    assert compressed(path, ratio=6) == {"wide", *SMALL}
    assert compressed(path, target_size="40KB") == {"wide", *SMALL}


def test_other_plans_leave_them_alone(path: Path) -> None:
    assert compressed(path, bits=4) == {"wide"}
    assert compressed(path, ratio=6, min_size="20KiB") == {"wide"}
    assert compressed(path, ratio=3, exclude=["small"]) == {"wide"}


def test_small_weights_that_take_little_stay(path: Path) -> None:
    model = onnx.load(path)
    del model.graph.node[2:7]
    model.graph.node[2].input[0] = model.graph.node[1].output[0]
    kept = {"first", "small0", "wide"}
    fixed = [tensor for tensor in model.graph.initializer if tensor.name in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(fixed)
    onnx.save(model, path)
    assert compressed(path, ratio=2) == {"wide"}
    assert compressed(path, ratio=7) == {"small0", "wide"}


def test_a_plan_is_carried_out_with_its_weights(path: Path, tmp_path: Path) -> None:
    plan = onnxcomp.plan(path, method="hyper", portable=False, ratio=6)
    assert plan.settings.min_size == 1024
    plan.save(tmp_path / "plan.json")
    output = tmp_path / "m6.onnx"
    onnxcomp.apply(path, tmp_path / "plan.json", output, verify=False)
    assert output.stat().st_size <= path.stat().st_size / 6
