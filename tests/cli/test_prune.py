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
    assert "no --data: norms of weights decided" in answer.out
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


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Inputs of `model`."""
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((400, 8)).astype(np.float32))
    return path


def test_a_plan_knows_the_bytes_of_a_pruned_model(
    onnxcomp: Run, model: Path, inputs: Path, tmp_path: Path
) -> None:
    options = ("-m", "prune+int", "--bits", "8", "--min-size", "64", "--prune-ratio", "0.3")
    plan, output = tmp_path / "plan.json", tmp_path / "out.onnx"
    answer = onnxcomp("plan", model, *options, "--data", inputs, "-o", plan, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["prune"]["met"] and answer.json["prune"]["groups"][0]["after"] < 64
    done = onnxcomp("optimize", model, "-o", output, *options, "--data", inputs, "--json").json
    assert done["prune"] == answer.json["prune"]
    assert answer.json["bytes"] == done["output"]["bytes"] == output.stat().st_size
    again = tmp_path / "again.onnx"
    replayed = onnxcomp("optimize", model, "-o", again, "--plan", plan, "--data", inputs)
    assert replayed.code == 0, replayed.err
    assert again.read_bytes() == output.read_bytes()
    text = onnxcomp("plan", model, *options, "--data", inputs).out
    assert "% of parameters pruned" in text


def test_a_plan_that_prunes_by_inputs_needs_them_again(
    onnxcomp: Run, model: Path, inputs: Path, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    options = ("-m", "prune", "--prune-ratio", "0.3", "--data", inputs, "-o", plan)
    assert onnxcomp("plan", model, *options).code == 0
    answer = onnxcomp("optimize", model, "-o", tmp_path / "out.onnx", "--plan", plan)
    assert answer.code == 2
    assert "prunes by calibration inputs" in answer.err


def test_a_plan_that_cannot_prune_as_much_exits_with_3(onnxcomp: Run, model: Path) -> None:
    answer = onnxcomp("plan", model, "-m", "prune", "--prune-ratio", "0.99")
    assert answer.code == 3
    assert "of 99.0 % asked for" in answer.out


def test_configuration_files_say_what_to_prune(onnxcomp: Run, model: Path, tmp_path: Path) -> None:
    config = tmp_path / "plan.yaml"
    config.write_text("version: 1\nmethod: dense\nprune: {flops: 0.6, score: magnitude}\n")
    planned = onnxcomp("plan", model, "--config", config, "--json").json["prune"]
    assert (planned["unit"], planned["score"]) == ("flops", "magnitude")
    done = onnxcomp("optimize", model, "-o", tmp_path / "o.onnx", "--config", config, "--json")
    assert done.json["prune"] == planned


def test_a_size_for_pruning_and_codes_is_divided(
    onnxcomp: Run, model: Path, inputs: Path, tmp_path: Path
) -> None:
    command = ("optimize", model, "-o", tmp_path / "out.onnx", "-m", "prune", "-m", "int")
    options = ("--ratio", "1.6", "--min-size", "64", "--data", inputs)
    report = onnxcomp(*command, *options, "--json").json
    jsonschema.validate(report, json.loads((ROOT / "docs" / "result.schema.json").read_text()))
    assert report["target"]["met"] and report["division"][0]["met"]
    text = onnxcomp(*command, *options).out
    assert "error of pruning" in text and "taken" in text
    refused = onnxcomp(*command, *options[:-2])
    assert refused.code == 2 and "--data" in refused.err


def test_a_configuration_file_divides_a_size(
    onnxcomp: Run, model: Path, inputs: Path, tmp_path: Path
) -> None:
    config = tmp_path / "plan.yaml"
    text = f"method: [prune, int]\ntarget: {{ratio: 1.6}}\ndata: {{path: {inputs.name}}}\n"
    config.write_text(f"version: 1\nmin_size: 64\n{text}")
    answer = onnxcomp("plan", model, "--config", config, "--json")
    assert answer.code == 0, answer.err
    assert len(answer.json["division"]) > 1
