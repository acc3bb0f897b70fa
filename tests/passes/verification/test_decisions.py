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


def branch(name: str, nodes: list, kind: int, shape: list) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [info(nodes[-1].output[0], kind, shape)])


def labels_in_branches(depth: int) -> onnx.NodeProto:
    """An If whose branches give labels, inside of others."""
    kind, shape, last = TensorProto.INT64, ["b"], depth == 1
    inner = [
        node("Mul", ["s", "two"], ["twice"]), node("ArgMax", ["twice"], ["t"], axis=1, keepdims=0)
    ] if last else [labels_in_branches(depth - 1)]  # fmt: skip
    yes = branch(f"yes{depth}", inner, kind, shape)
    other = ("ArgMin", ["s"], {"axis": 1, "keepdims": 0}) if last else ("Identity", ["none"], {})
    no = branch(f"no{depth}", [node(other[0], other[1], [f"o{depth}"], **other[2])], kind, shape)
    return node("If", ["go"], [f"y{depth}"], then_branch=yes, else_branch=no)


def test_few_labels_without_floats_are_no_verdict(tmp_path: Path) -> None:
    """Where nothing in front of a decision can be seen, as in branches of branches."""
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.5)):
        tail = [labels_in_branches(3), node("Identity", ["y3"], ["y"])]
        output = info("y", TensorProto.INT64, ["b"])
        constants = {"go": np.array(True), "two": np.float32(2), "none": np.zeros(4, np.int64)}
        paths.append(save(tmp_path / f"{name}.onnx", tail, output, constants, noise))
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


@pytest.mark.parametrize("go", [True, False])
def test_floats_in_branches_are_looked_at(go: bool, tmp_path: Path) -> None:
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.1)):
        tail = [labels_in_branches(1), node("Identity", ["y1"], ["y"])]
        output = info("y", TensorProto.INT64, ["b"])
        constants = {"go": np.array(go), "two": np.float32(2)}
        paths.append(save(tmp_path / f"{name}.onnx", tail, output, constants, noise))
    found = verify(*paths, tolerance=0.3)
    assert found.passed, found.failures
    assert 0.05 < found.taps["s"].rel_l2 < 0.13
    assert (found.taps["y1/twice"].rel_l2 > 0.05) == go  # nothing where the other branch ran
    assert not verify(*paths, tolerance=0.05).passed


def test_bytes_that_a_branch_makes_are_compared_before_they_are_made(tmp_path: Path) -> None:
    paths = []
    for name, noise in (("a", 0.0), ("b", 0.05)):
        nodes = [
            node("Mul", ["s", "scale"], ["m"]),
            node("Cast", ["m"], ["b"], to=TensorProto.UINT8),
        ]
        yes = branch("yes", nodes, TensorProto.UINT8, ["b", N])
        no = branch(
            "no", [node("Cast", ["s"], ["o"], to=TensorProto.UINT8)], TensorProto.UINT8, ["b", N]
        )
        tail = [
            node("Abs", ["s"], ["a"]),
            node("If", ["go"], ["y"], then_branch=yes, else_branch=no),
        ]
        output = info("y", TensorProto.UINT8, ["b", N])
        constants = {"go": np.array(True), "scale": np.float32(9)}
        paths.append(save(tmp_path / f"{name}.onnx", tail, output, constants, noise))
    found = verify(*paths)
    assert found.passed, found.failures
    assert 0.0 < found.taps["y/m"].rel_l2 < 0.1


def picking(path: Path, noise: float, calls: int) -> Path:
    """Labels that a model-local function gives, called once or twice."""
    names = [f"y{number}" for number in range(calls)]
    tail = [helper.make_node("Pick", ["s"], [name], domain="own") for name in names]
    tail.append(node("Concat", names, ["y"], axis=0))
    save(path, tail, info("y", TensorProto.INT64, ["b"]), {}, noise)
    model = onnx.load(path)
    body = [node("Softmax", ["v"], ["p"]), node("ArgMax", ["p"], ["i"], axis=1, keepdims=0)]
    imports = [helper.make_opsetid("", model.opset_import[0].version)]
    model.functions.append(helper.make_function("own", "Pick", ["v"], ["i"], body, imports))
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("calls", [1, 2])
def test_floats_in_functions_are_looked_at_where_they_are_called_once(
    calls: int, tmp_path: Path
) -> None:
    found = verify(
        picking(tmp_path / "a.onnx", 0.0, calls), picking(tmp_path / "b.onnx", 0.1, calls)
    )
    assert found.passed, found.failures
    assert ("y0/p" in found.taps) == (calls == 1)
    assert 0.05 < found.taps["s"].rel_l2 < 0.13
