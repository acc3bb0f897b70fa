"""What is said about speed and losses at the end of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.cli.verdicts import code_remarks, gain_lines, remarks_of, speed_lines, warnings_of
from onnxcomp.passes.verification.clock import Clock
from onnxcomp.passes.verification.fidelity import verify

SITE = {"method": "hyper", "mode": "fused", "uses": ["MatMul"], "bytes_before": 4000}
USUAL = {"bits": 4, "state_bits": 7, "group": 128}


def report(slowdown: float | None, params: dict[str, Any] = USUAL, **config: Any) -> dict[str, Any]:
    verify = None if slowdown is None else {"slowdown": slowdown}
    return {"verify": verify, "config": config, "sites": [{**SITE, "params": params}]}


def test_a_slow_result_is_warned_of_with_what_helps() -> None:
    (line,) = speed_lines(report(1.4))
    assert line.startswith("warning: it ran 1.4 times as long") and "--max-slowdown 1" in line
    for quiet in (report(1.1), report(None), report(1.4, max_slowdown=2.0)):
        assert not list(speed_lines(quiet))


def test_codes_that_suit_the_machine_are_named() -> None:
    (line,) = code_remarks(report(0.8), "avx2")
    assert line.endswith("--target avx2")
    (line,) = code_remarks(report(None), "neon")
    assert line.endswith("--target neon")


@pytest.mark.parametrize(
    "suited",
    [
        report(0.8, target="avx512"),
        report(0.8, {**USUAL, "table": "structured"}),
        report(0.8, {**USUAL, "bits": 5}),
        report(0.8, {**USUAL, "state_bits": 12}),
    ],
)
def test_nothing_is_said_where_other_codes_would_not_help(suited: dict[str, Any]) -> None:
    assert not list(code_remarks(suited, "avx2"))
    folded = report(0.8)
    folded["sites"][0]["mode"] = "folded"
    assert not list(code_remarks(folded, "avx2"))
    assert not list(code_remarks(report(0.8), None))
    mostly = report(0.8)
    mostly["sites"].append({**SITE, "params": USUAL, "uses": ["Conv"], "mode": "folded"})
    assert not list(code_remarks(mostly, "avx2"))
    mostly["sites"][0]["bytes_before"] = 5000
    assert list(code_remarks(mostly, "avx2"))


def gained(before: int, after: int, **asked: Any) -> list[str]:
    """What is said of a file that stays mostly as it was, because of its integers."""
    sites = [
        {"method": "hyper", "reason": "asked for", "bytes_before": 9},
        {"method": "dense", "reason": "", "bytes_before": 10},
        {"method": "dense", "reason": "quantised already", "bytes_before": before - 19},
    ]
    ends = {"input": {"bytes": before}, "output": {"bytes": after}}
    return list(gain_lines({"target": None, "prune": None, "sites": sites, **ends, **asked}))


def test_a_result_that_is_hardly_smaller_is_said_to_be_no_gain() -> None:
    (line,) = gained(1000, 996)
    assert line.startswith("note: 0.4 % of the file is saved") and "(quantised already)" in line
    assert gained(1000, 1010)[0].startswith("note: 0.0 % of the file is saved")
    assert not gained(1000, 900) and not gained(1000, 996, target={"met": True})


def test_a_clock_compares_runs_on_equal_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 0.0, 2.0, 0.0, 8.0, 0.0, 3.0, 0.0, 1.0])
    monkeypatch.setattr("time.process_time", lambda: next(times))
    clock = Clock()
    for _ in range(2):
        with clock.running():
            pass
    clock.turn()
    assert clock.ratio is None
    for _ in range(2):
        with clock.running():
            pass
    assert clock.ratio == 1.5  # first runs do not count
    with clock.running():
        pass
    assert clock.ratio is None


K, N = 32, 40
ROWS = {"x": np.random.default_rng(5).standard_normal((800, K)).astype(np.float32)}


def product(path: Path, noise: float, scale: float, *tail: onnx.NodeProto, name: str) -> Path:
    """``s = x @ W`` and what follows it, up to an output of a name; `noise` is relative to W."""
    kind = TensorProto.INT64 if tail[-1].op_type == "NonZero" else TensorProto.FLOAT
    rng = np.random.default_rng(0)
    exact, error = rng.standard_normal((2, K, N)) / np.sqrt(K)
    tensors = {"W": (exact + noise * error) * scale, "half": 0.5, "three": 3.0}
    constants = [numpy_helper.from_array(np.float32(value), key) for key, value in tensors.items()]
    constants.append(numpy_helper.from_array(np.array([-1]), "flat"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["s"]), *tail],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])],
        [helper.make_tensor_value_info(name, kind, None)],
        constants,
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def compared(folder: Path, noise: float, scale: float, *tail: onnx.NodeProto, name: str) -> Any:
    """JSON of a verification of a model that has lost so much."""
    pair = [product(folder / f"{n}.onnx", n, scale, *tail, name=name) for n in (0.0, noise)]
    return verify(*pair, data=[ROWS]).to_json()


node = helper.make_node


@pytest.mark.parametrize("tail", [("Identity", "logits"), ("Softmax", "y"), ("LogSoftmax", "prob")])
def test_classes_that_change_are_warned_of_though_the_error_is_small(
    tmp_path: Path, tail: tuple[str, str]
) -> None:
    operator, name = tail
    sure = 12.0  # times as far apart as one would expect by chance
    last = node(operator, ["s"], [name])
    lossy = compared(tmp_path, 0.06, sure, last, name=name)
    assert lossy["outputs"][name]["labels"] == 800
    assert lossy["outputs"][name]["rel_l2"] < 0.1 or name == "y"
    (line,) = remarks_of(lossy)
    assert line.startswith("warning: ") and f"of 800 classes of output {name!r} are others" in line
    assert not remarks_of(lossy, judged=True)
    assert not remarks_of(compared(tmp_path, 0.002, sure, last, name=name))


def test_near_ties_of_a_model_in_doubt_are_no_loss(tmp_path: Path) -> None:
    """As the next token of a language model: more classes change than one in a hundred."""
    found = compared(tmp_path, 0.02, 1.0, node("Identity", ["s"], ["logits"]), name="logits")
    logits = found["outputs"]["logits"]
    assert logits["label_agreement"] < 0.99 and logits["label_doubt"] > 0.5
    assert not remarks_of(found)


def test_one_label_or_a_probability_for_each_class_is_no_verdict(tmp_path: Path) -> None:
    ones = {"rel_l2": 0.05, "label_agreement": 0.75, "labels": 4, "label_doubt": 0.01}
    assert not remarks_of({"outputs": {"logits": ones}})
    assert remarks_of({"outputs": {"logits": ones | {"labels": 40}}})
    several = compared(tmp_path, 0.05, 1.0, node("Sigmoid", ["s"], ["scores"]), name="scores")
    assert several["outputs"]["scores"]["label_agreement"] < 0.99
    assert "labels" not in several["outputs"]["scores"]
    assert not remarks_of(several)


SIZED = {
    "kept": [
        node("Greater", ["s", "half"], ["k"]),
        node("Reshape", ["k", "flat"], ["kk"]),
        node("Compress", ["s", "kk"], ["y"]),
    ],
    "as long as it says": [  # durations, as those of a voice
        node("ReduceMean", ["s"], ["m"], axes=[1], keepdims=0),
        node("Mul", ["m", "three"], ["d"]),
        node("Ceil", ["d"], ["c"]),
        node("Cast", ["c"], ["i"], to=TensorProto.INT64),
        node("Abs", ["i"], ["count"]),
        node("ReduceSum", ["count"], ["n"], keepdims=1),
        node("ConstantOfShape", ["n"], ["z"]),
        node("ReduceMean", ["s"], ["all"], keepdims=0),
        node("Add", ["z", "all"], ["y"]),
    ],
}


@pytest.mark.parametrize("tail", SIZED.values(), ids=SIZED)
def test_floats_of_another_size_are_warned_of(tmp_path: Path, tail: list[onnx.NodeProto]) -> None:
    found = compared(tmp_path, 0.05, 1.0, *tail, name="y")
    (line,) = warnings_of(found)
    assert "output 'y' has another size on 1 of 1 inputs (shape (" in line
    assert "its loss there is not known" in line
    assert not warnings_of(compared(tmp_path, 0.0, 1.0, *tail, name="y"))
    tiny = compared(tmp_path, 0.002, 1.0, *tail, name="y")  # near ties
    assert not warnings_of(tiny)


def test_indices_of_another_size_are_judged_by_what_they_are_decided_on(tmp_path: Path) -> None:
    tail = [
        node("Greater", ["s", "half"], ["k"]),
        node("NonZero", ["k"], ["y"]),
    ]
    assert not warnings_of(compared(tmp_path, 0.05, 1.0, *tail, name="y"))
