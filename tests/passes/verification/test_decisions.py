"""Outputs that are decided, not computed: judged by the floats that they were decided on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.analysis.taps import find_taps
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.verification.fidelity import verify

K, N = 32, 40


def weight(noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((K, N)) / np.sqrt(K)
    return (exact + noise * rng.standard_normal((K, N)) / np.sqrt(K)).astype(np.float32)


def save(
    path: Path,
    tail: Sequence[onnx.NodeProto],
    output: onnx.ValueInfoProto,
    constants: dict[str, np.ndarray],
    noise: float,
) -> Path:
    """``s = x @ W`` and what follows it."""
    tensors = {"W": weight(noise), **constants}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["s"]), *tail],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])],
        [output],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def info(name: str, kind: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


node = helper.make_node
ZERO, AXIS = np.float32(0.0), np.array([1])
CASES = {
    "non-zero": (
        [node("Greater", ["s", "z"], ["k"]), node("NonZero", ["k"], ["y"])],
        info("y", TensorProto.INT64, [2, "found"]),
        {"z": ZERO},
    ),
    "unique": (
        [
            node("Mul", ["s", "ten"], ["t"]),
            node("Cast", ["t"], ["i"], to=TensorProto.INT64),
            node("Unique", ["i"], ["y"]),
        ],
        info("y", TensorProto.INT64, ["values"]),
        {"ten": np.float32(10)},
    ),
    "kept floats": (
        [
            node("Greater", ["s", "z"], ["k"]),
            node("Reshape", ["k", "flat"], ["kk"]),
            node("Compress", ["s", "kk"], ["y"]),
        ],
        info("y", TensorProto.FLOAT, ["kept"]),
        {"z": ZERO, "flat": np.array([-1])},
    ),
    "no declared shape": (
        [node("Greater", ["s", "z"], ["k"]), node("NonZero", ["k"], ["y"])],
        info("y", TensorProto.INT64, None),
        {"z": ZERO},
    ),
    "bytes of an image": (
        [
            node("Mul", ["s", "scale"], ["t"]),
            node("Clip", ["t", "z", "most"], ["c"]),
            node("Cast", ["c"], ["y"], to=TensorProto.UINT8),
        ],
        info("y", TensorProto.UINT8, ["b", N]),
        {"z": ZERO, "scale": np.float32(90), "most": np.float32(255)},
    ),
    "quantised": (
        [node("QuantizeLinear", ["s", "scale", "zero"], ["y"])],
        info("y", TensorProto.INT8, ["b", N]),
        {"scale": np.float32(0.02), "zero": np.int8(3)},
    ),
    "labels": (
        [
            node("ArgMax", ["s"], ["i"], axis=1, keepdims=0),
            node("Gather", ["names", "i"], ["y"]),
        ],
        info("y", TensorProto.STRING, ["b"]),
        {"names": np.array([f"label {i}" for i in range(N)], object)},
    ),
    "largest": (
        [node("TopK", ["s", "k"], ["v", "y"])],
        info("y", TensorProto.INT64, ["b", 3]),
        {"k": np.array([3])},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_loss_is_told_and_no_failure(case: tuple[list, object, dict], tmp_path: Path) -> None:
    tail, output, constants = case
    reference = save(tmp_path / "a.onnx", tail, output, constants, 0.0)
    lossy = save(tmp_path / "b.onnx", tail, output, constants, 0.1)
    found = verify(reference, lossy)
    assert found.passed, found.failures
    (tap,) = found.taps.values()
    assert 0.05 < tap.rel_l2 < 0.13
    assert found.error == pytest.approx(0.1, rel=0.6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_limit_is_held_against_the_floats(
    case: tuple[list, object, dict], tmp_path: Path
) -> None:
    tail, output, constants = case
    reference = save(tmp_path / "a.onnx", tail, output, constants, 0.0)
    lossy = save(tmp_path / "b.onnx", tail, output, constants, 0.1)
    assert verify(reference, lossy, tolerance=0.3).passed
    failed = verify(reference, lossy, tolerance=0.05)
    assert not failed.passed
    assert "before a decision" in failed.failures[0]


def test_a_size_that_the_model_fixes_must_be_kept(tmp_path: Path) -> None:
    tail = [node("Relu", ["s"], ["y"])]
    reference = save(tmp_path / "a.onnx", tail, info("y", TensorProto.FLOAT, ["b", N]), {}, 0.0)
    cut = [node("Slice", ["s", "zero", "five", "one"], ["y"])]
    constants = {"zero": np.array([0]), "five": np.array([5]), "one": np.array([1])}
    other = save(tmp_path / "b.onnx", cut, info("y", TensorProto.FLOAT, None), constants, 0.0)
    found = verify(reference, other)
    assert not found.passed
    assert "shape" in found.failures[0]


def test_a_size_of_the_batch_is_not_free(tmp_path: Path) -> None:
    tail = [node("Relu", ["s"], ["y"])]
    reference = save(tmp_path / "a.onnx", tail, info("y", TensorProto.FLOAT, ["b", N]), {}, 0.0)
    cut = [node("Slice", ["s", "zero", "one", "zero"], ["y"])]
    constants = {"zero": np.array([0]), "one": np.array([1])}
    other = save(tmp_path / "b.onnx", cut, info("y", TensorProto.FLOAT, None), constants, 0.0)
    assert not verify(reference, other, shapes={"x": [3, K]}).passed


def greedy(path: Path, noise: float) -> Path:
    """Token after token until the last one comes up."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((N, K)).astype(np.float32)
    body = helper.make_graph(
        [
            node("Gather", ["table", "token"], ["e"]),
            node("Add", ["e", "x"], ["h"]),
            node("MatMul", ["h", "W"], ["logits"]),
            node("ArgMax", ["logits"], ["next"], axis=1, keepdims=0),
            node("ReduceMax", ["next"], ["most"], keepdims=0),
            node("Less", ["most", "end"], ["go"]),
            node("Identity", ["next"], ["out"]),
        ],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("c", TensorProto.BOOL, []),
            info("token", TensorProto.INT64, [1]),
        ],
        [
            info("go", TensorProto.BOOL, []),
            info("next", TensorProto.INT64, [1]),
            info("out", TensorProto.INT64, [1]),
        ],
    )
    tensors = {"W": weight(noise), "table": table, "n": np.array(9), "t": np.array(True)}
    tensors |= {"start": np.array([1]), "end": np.array(N - 1)}
    graph = helper.make_graph(
        [node("Loop", ["n", "t", "start"], ["last", "ids"], body=body)],
        "g",
        [info("x", TensorProto.FLOAT, [1, K])],
        [info("ids", TensorProto.INT64, ["steps", 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def test_a_loop_is_compared_up_to_the_first_other_token(tmp_path: Path) -> None:
    exact, lossy = greedy(tmp_path / "a.onnx", 0.0), greedy(tmp_path / "b.onnx", 0.1)
    found = verify(exact, lossy)
    assert found.passed, found.failures
    assert found.taps["last/logits"].rel_l2 < 0.3
    assert not verify(exact, lossy, tolerance=0.01).passed
    assert verify(exact, exact, tolerance=1e-9).taps["last/logits"].rel_l2 == 0.0


def test_taps_are_the_floats_in_front_of_the_first_decision(tmp_path: Path) -> None:
    tail, output, constants = CASES["kept floats"]
    taps = find_taps(load(save(tmp_path / "a.onnx", tail, output, constants, 0.0)))
    assert {tap.key for tap in taps.values} == {"s"}
    assert {tap.key for tap in taps.decisions} == {"k"}
    assert taps.behind["y"] == {"k"}
    assert taps.behind["s"] == frozenset()


def test_sizes_and_integers_are_no_decisions(tmp_path: Path) -> None:
    tail = [
        node("Shape", ["s"], ["d"]),
        node("Gather", ["d", "i"], ["n"]),
        node("Greater", ["n", "i"], ["more"]),
        node("Where", ["more", "s", "s"], ["y"]),
    ]
    output = info("y", TensorProto.FLOAT, ["b", N])
    taps = find_taps(load(save(tmp_path / "a.onnx", tail, output, {"i": np.array(0)}, 0.0)))
    assert taps.values == taps.decisions == ()


def test_steps_of_quantised_outputs_count_as_equal(tmp_path: Path) -> None:
    tail, output, constants = CASES["quantised"]
    reference = save(tmp_path / "a.onnx", tail, output, constants, 0.0)
    near = save(tmp_path / "b.onnx", tail, output, constants, 2e-3)
    found = verify(reference, near)
    assert found.outputs["y"].agreement == 1.0
    assert found.outputs["y"].rel_l2 > 0.0


def test_sequences_that_become_shorter_are_a_loss(tmp_path: Path) -> None:
    """A sequence has as many parts as values decide."""
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.3)):
        tail = [
            node("Greater", ["s", "z"], ["k"]),
            node("Reshape", ["k", "flat"], ["kk"]),
            node("Compress", ["s", "kk"], ["kept"]),
            node("SplitToSequence", ["kept"], ["y"], axis=0),
        ]
        constants = {"z": np.float32(0.5), "flat": np.array([-1])}
        output = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
        paths.append(save(tmp_path / f"{name}.onnx", tail, output, constants, noise))
    assert verify(*paths).passed


def test_few_labels_without_floats_are_no_verdict(tmp_path: Path) -> None:
    """Where nothing in front of a decision can be seen, as inside a branch."""
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.5)):
        then = helper.make_graph(
            [node("ArgMax", ["s"], ["t"], axis=1, keepdims=0)],
            "then",
            [],
            [info("t", TensorProto.INT64, ["b"])],
        )
        other = helper.make_graph(
            [node("ArgMin", ["s"], ["o"], axis=1, keepdims=0)],
            "else",
            [],
            [info("o", TensorProto.INT64, ["b"])],
        )
        tail = [node("If", ["yes"], ["y"], then_branch=then, else_branch=other)]
        output = info("y", TensorProto.INT64, ["b"])
        paths.append(save(tmp_path / f"{name}.onnx", tail, output, {"yes": np.array(True)}, noise))
    found = verify(*paths, tolerance=0.01, shapes={"x": [4, K]})
    assert found.passed
    assert found.outputs["y"].agreement is not None


def test_data_files_are_read_where_they_lie(tmp_path: Path) -> None:
    """A copy with more outputs holds no weights of its own where these are in another file."""
    tail, output, constants = CASES["largest"]
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.1)):
        path = save(tmp_path / f"{name}.onnx", tail, output, constants, noise)
        model = onnx.load(path)
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=f"{name}.data",
            size_threshold=64,
        )
        assert path.stat().st_size < K * N
        paths.append(path)
    found = verify(*paths)
    assert found.passed, found.failures
    assert 0.05 < found.taps["s"].rel_l2 < 0.13


def test_a_scan_is_compared_step_by_step(tmp_path: Path) -> None:
    """The state is one-hot of the best class: a decision that feeds the next step."""
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.1)):
        body = helper.make_graph(
            [
                node("Add", ["state", "row"], ["h"]),
                node("MatMul", ["h", "W"], ["logits"]),
                node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
                node("OneHot", ["best", "depth", "values"], ["next"]),
                node("Identity", ["best"], ["label"]),
            ],
            "body",
            [info("state", TensorProto.FLOAT, [1, K]), info("row", TensorProto.FLOAT, [1, K])],
            [info("next", TensorProto.FLOAT, [1, K]), info("label", TensorProto.INT64, [1])],
        )
        tensors = {
            "W": weight(noise)[:, :K].copy(),
            "depth": np.array(K),
            "values": np.float32([0, 1]),
            "start": np.zeros((1, K), np.float32),
        }
        graph = helper.make_graph(
            [node("Scan", ["start", "x"], ["last", "labels"], body=body, num_scan_inputs=1)],
            "g",
            [info("x", TensorProto.FLOAT, [6, 1, K])],
            [info("labels", TensorProto.INT64, [6, 1])],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in tensors.items()],
        )
        imports = [helper.make_opsetid("", 17)]
        onnx.save(
            helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / f"{name}.onnx"
        )
        paths.append(tmp_path / f"{name}.onnx")
    found = verify(*paths)
    assert found.passed, found.failures
    assert 0.05 < found.taps["last/logits"].rel_l2 < 0.3
    assert not verify(*paths, tolerance=0.01).passed
