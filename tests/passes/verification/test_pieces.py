"""A model that runs piece by piece gets the verdict of a model in one session."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.verification.clock import Clock
from onnxcomp.passes.verification.copies import Copy
from onnxcomp.passes.verification.fidelity import verify
from onnxcomp.passes.verification.pieces import Pieces
from onnxcomp.runtime.evaluate import run_model

# What is measured with times or by chance, and what says how it was run.
NOT_COMPARED = {"slowdown", "layer_by_layer"}


def assert_equal_verdicts(whole: Any, pieces: Any, where: str = "") -> None:
    """Numbers may differ by what other orders of sums do to them, everything else may not."""
    if isinstance(whole, dict):
        assert whole.keys() - NOT_COMPARED == pieces.keys() - NOT_COMPARED, where
        for key in whole.keys() - NOT_COMPARED:
            assert_equal_verdicts(whole[key], pieces[key], f"{where}/{key}")
    elif isinstance(whole, float) and math.isfinite(whole):
        assert pieces == pytest.approx(whole, rel=2e-3, abs=2e-6) or where.endswith("snr_db"), where
    else:
        assert whole == pieces, where


def convolutions(path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((24, 3, 3, 3)) / 5,
        "b": rng.standard_normal((32, 24, 3, 3)) / 15,
        "c": rng.standard_normal((32, 10)) / 6,
    }
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Conv", ["x", "a"], ["h"]), node("Relu", ["h"], ["r"]),
            node("Conv", ["r", "b"], ["g"]), node("GlobalAveragePool", ["g"], ["p"]),
            node("Flatten", ["p"], ["f"]), node("MatMul", ["f", "c"], ["y"]),
            node("ArgMax", ["y"], ["best"], axis=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["n", 1]),
        ],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in tensors.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


@pytest.mark.parametrize("kind", ["everything", "convolutions", "lowrank", "int8"])
def test_verdicts_are_those_of_whole_sessions(
    kind: str, decoder_folder: Path, tools: Any, tmp_path: Path
) -> None:
    dense, options = decoder_folder / "model.onnx", {"min_size": 64, "bits": 4}
    if kind == "everything":
        dense = tmp_path / "dense.onnx"
        onnx.save(tools.everything(), dense)
    elif kind == "convolutions":
        dense = convolutions(tmp_path / "dense.onnx")
    elif kind == "lowrank":
        options |= {"method": "lowrank"}
    elif kind == "int8":
        options |= {"precision": "int8"}
    small = tmp_path / "small.onnx"
    onnxcomp.optimize(dense, small, verify=False, **options)
    whole = verify(dense, small, memory=1 << 50)
    pieces = verify(dense, small, memory=1 if kind == "everything" else 1_600_000)
    assert whole.layer_by_layer == ()
    assert "the original" in pieces.layer_by_layer and len(pieces.layer_by_layer) >= 2
    assert whole.passed
    assert_equal_verdicts(whole.to_json(), pieces.to_json())


def test_a_loss_is_judged_in_pieces_as_well(tmp_path: Path) -> None:
    dense, small = convolutions(tmp_path / "dense.onnx"), tmp_path / "small.onnx"
    onnxcomp.optimize(dense, small, verify=False, bits=2, min_size=64)
    whole, pieces = (verify(dense, small, memory=m, tolerance=1e-3) for m in (1 << 50, 1))
    assert not whole.passed and not pieces.passed
    assert len(whole.failures) == len(pieces.failures)
    assert pieces.error == pytest.approx(whole.error, rel=1e-3)


@pytest.mark.parametrize("limit", [1, 50_000, 1 << 30])
@pytest.mark.parametrize("library", [True, False])
def test_outputs_are_those_of_one_session(
    limit: int, library: bool, decoder_folder: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.onnx"
    onnxcomp.optimize(decoder_folder / "model.onnx", small, verify=False, bits=4, min_size=64)
    pieces = Pieces(Copy(small), library=library, available=limit)
    assert (len(pieces) == 1) == (limit == 1 << 30)
    feeds = [inputs(seed) for seed in range(2)]
    found = pieces.outputs(feeds, Clock())
    for wanted, own in zip(run_model(small, feeds, library=library), found, strict=True):
        assert wanted.keys() == own.keys()
        for name, array in wanted.items():
            np.testing.assert_allclose(own[name], array, rtol=1e-4, atol=1e-5)


def inputs(seed: int) -> dict[str, np.ndarray]:
    """For the decoder: three tokens behind two in its cache."""
    rng = np.random.default_rng(seed)
    names = [f"past_key_values.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    caches = {n: rng.standard_normal((1, 2, 2, 16)).astype(np.float32) for n in names}
    return {
        "input_ids": rng.integers(0, 300, (1, 3)),
        "attention_mask": np.ones((1, 5), np.int64),
        "position_ids": np.arange(2, 5)[None],
        **caches,
    }


def test_outputs_that_nothing_computes(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["w"], ["v"]),  # of weights alone, and an output
            helper.make_node("MatMul", ["x", "v"], ["y"]),
            helper.make_node("SplitToSequence", ["y"], ["parts"], axis=1),
            helper.make_node("SequenceLength", ["parts"], ["count"]),
        ],
        "g",
        [info("x", TensorProto.FLOAT, [2, 4])],
        [
            info("w", TensorProto.FLOAT, [4, 4]), info("x", TensorProto.FLOAT, [2, 4]),
            info("v", TensorProto.FLOAT, [4, 4]), info("count", TensorProto.INT64, []),
            helper.make_tensor_sequence_value_info("parts", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    feeds = [{"x": np.arange(8, dtype=np.float32).reshape(2, 4)}]
    (found,) = Pieces(Copy(path), library=True, available=1).outputs(feeds, Clock())
    (wanted,) = run_model(path, feeds)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_model_that_computes_nothing(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Neg", ["w"], ["y"])],
        "g",
        [],
        [info("y", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.ones(3, np.float32), "w")],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    (found,) = Pieces(Copy(tmp_path / "m.onnx"), library=True, available=1).outputs([{}], Clock())
    np.testing.assert_array_equal(found["y"], -np.ones(3))


def test_a_branch_without_a_declared_result_is_no_obstacle(tmp_path: Path) -> None:
    info, node = helper.make_tensor_value_info, helper.make_node
    branches = {
        name: helper.make_graph(
            [node(op, ["x"], [name])], name, [], [info(name, TensorProto.FLOAT, None)]
        )
        for name, op in (("then_branch", "Neg"), ("else_branch", "Abs"))
    }
    nodes = [node("If", ["go"], ["h0"], **branches)]
    weights = []
    for number in range(4):
        nodes.append(node("MatMul", [f"h{number}", f"w{number}"], [f"m{number}"]))
        nodes.append(node("Add", [f"m{number}", "h0"], [f"h{number + 1}"]))
        weights.append(numpy_helper.from_array(np.eye(8, dtype=np.float32), f"w{number}"))
    graph = helper.make_graph(
        nodes,
        "g",
        [info("go", TensorProto.BOOL, []), info("x", TensorProto.FLOAT, [2, 8])],
        [info("h4", TensorProto.FLOAT, [2, 8])],
        weights,
    )
    path = tmp_path / "m.onnx"
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    pieces = Pieces(Copy(path), library=True, available=1)
    assert len(pieces) >= 4
    feeds = [{"go": np.array(True), "x": np.arange(16, dtype=np.float32).reshape(2, 8)}]
    (found,) = pieces.outputs(feeds, Clock())
    np.testing.assert_array_equal(found["h4"], run_model(path, feeds)[0]["h4"])


# Bytes beyond what the libraries take: whole sessions need 200 to 220 MB, pieces 100 to 140.
HEADROOM = 165 << 20

LIMITED = """
import resource, sys
from onnxcomp.passes.verification.fidelity import verify
from onnxcomp.runtime.session import open_session

open_session(sys.argv[2])  # libraries
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = verify(sys.argv[1], sys.argv[2], memory=None if sys.argv[4] == "pieces" else 1 << 50)
print(found.passed, "|".join(found.layer_by_layer))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux alone")
def test_a_limit_of_the_address_space_is_kept(tmp_path: Path) -> None:
    """Sixteen weights of 4 MB, which the portable form expands in pieces of its own already."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for n in range(16):
        nodes.append(helper.make_node("MatMul", [f"x{n}", f"w{n}"], [f"y{n}"]))
        nodes.append(helper.make_node("Relu", [f"y{n}"], [f"x{n + 1}"]))
        values = rng.standard_normal((1024, 1024), dtype=np.float32) / 32
        weights.append(numpy_helper.from_array(values, f"w{n}"))
    shape = ["n", 1024]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("x16", TensorProto.FLOAT, shape)],
        weights,
    )
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), dense)
    onnxcomp.optimize(dense, small, verify=False, bits=4)

    def run(how: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", LIMITED, str(dense), str(small), str(HEADROOM), how]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    pieces, whole = run("pieces"), run("whole")
    assert pieces.stdout.split(" ", 1)[0] == "True", pieces.stderr
    assert "without the library it" in pieces.stdout
    assert not whole.stdout.startswith("True"), "the limit is none: take a smaller one"
