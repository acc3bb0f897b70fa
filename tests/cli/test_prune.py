"""Pruning on the command line: groups, what went, exit codes, the JSON object."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Run = Callable[..., Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with one hidden layer of 64 neurons."""
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 64), "b": (64,), "c": (64, 4)}
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h0"]),
        helper.make_node("Add", ["h0", "b"], ["h1"]),
        helper.make_node("Relu", ["h1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "c"], ["y"]),
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", 8), ("y", 4))
    ]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)
    path = tmp_path / "model.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(proto, path)
    return path


def test_inspect_lists_groups_and_why_others_stay(onnxcomp: Run, model: Path) -> None:
    answer = onnxcomp("inspect", model, "--groups", "--json")
    assert answer.code == 0, answer.err
    assert [(group["name"], group["size"]) for group in answer.json["groups"]] == [("a", 64)]
    assert answer.json["kept"] == [{"name": "c", "reason": "it is an output of the model"}]
    assert "it is an output of the model" in onnxcomp("inspect", model, "--groups").out


def test_optimize_says_what_was_pruned(onnxcomp: Run, model: Path, tmp_path: Path) -> None:
    command = ("optimize", model, "-o", tmp_path / "out.onnx", "--method", "prune")
    answer = onnxcomp(*command, "--prune-ratio", "0.3")
    assert answer.code == 0, answer.err
    assert "of parameters pruned" in answer.out
    assert "no --data: weights alone decided" in answer.out
    report = onnxcomp(*command, "--target-flops", "0.5", "--json").json
    schema = json.loads((ROOT / "docs" / "result.schema.json").read_text())
    jsonschema.validate(report, schema)
    assert report["prune"]["unit"] == "flops"
    assert report["prune"]["after"]["flops"] <= 0.5 * report["prune"]["before"]["flops"]


def test_a_ratio_out_of_reach_exits_with_3(onnxcomp: Run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    answer = onnxcomp("optimize", model, "-o", output, "-m", "prune", "--prune-ratio", "0.99")
    assert answer.code == 3
    assert "99.0 % were asked for" in answer.err
    assert output.exists()


def test_a_ratio_out_of_range_exits_with_2(onnxcomp: Run, model: Path, tmp_path: Path) -> None:
    answer = onnxcomp("optimize", model, "-o", tmp_path / "out.onnx", "--prune-ratio", "1.5")
    assert answer.code == 2
