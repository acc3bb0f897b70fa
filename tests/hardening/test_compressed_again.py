"""A compressed model as input: recognised, left alone with a reason, counted honestly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import onnxcomp as oc


@pytest.fixture
def compressed(onnxcomp: Callable[..., Any], small: Path, tmp_path: Path) -> Path:
    """The small model with one of its two weights compressed."""
    path = tmp_path / "once.onnx"
    assert onnxcomp("optimize", small, "-o", path, "--exclude", "^v$").code == 0
    return path


def _outputs(path: Path, *, library: bool) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    session = oc.InferenceSession(path) if library else onnxruntime.InferenceSession(str(path))
    return session.run(None, {"x": x})[0]


def test_payloads_are_skipped_with_a_reason_and_the_rest_is_compressed(
    onnxcomp: Callable[..., Any], small: Path, compressed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "twice.onnx"
    done = onnxcomp("optimize", compressed, "-o", output, "--json")
    assert done.code == 0, done.err
    sites = {site["name"]: site for site in done.json["sites"]}
    assert sites["v"]["method"] == "hyper"
    # Payload tensors below the minimum size may go unmentioned, larger ones may not.
    kept = {name: site["reason"] for name, site in sites.items() if site["method"] == "dense"}
    assert all("already compressed" in reason for reason in kept.values()), kept
    assert done.json["input"]["bytes"] == compressed.stat().st_size
    assert done.json["ratio"] == pytest.approx(compressed.stat().st_size / output.stat().st_size)
    model = onnx.load(output)
    functions = [(function.domain, function.name) for function in model.functions]
    domains = [entry.domain for entry in model.opset_import]
    assert len(set(functions)) == len(functions) and len(set(domains)) == len(domains)
    once = tmp_path / "at_once.onnx"
    assert onnxcomp("optimize", small, "-o", once).code == 0
    for library in (True, False):
        want = _outputs(once, library=library)
        np.testing.assert_array_equal(_outputs(output, library=library), want)


def test_nothing_left_to_compress_is_said_and_gives_the_same_model(
    onnxcomp: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    assert onnxcomp("optimize", small, "-o", first).code == 0
    done = onnxcomp("optimize", first, "-o", second, "--json")
    assert done.code == 0, done.err
    assert done.json["ratio"] == pytest.approx(1, abs=0.02)
    assert not [site for site in done.json["sites"] if site["method"] != "dense"]
    np.testing.assert_array_equal(_outputs(first, library=True), _outputs(second, library=True))


def test_a_ratio_is_relative_to_the_given_file(
    onnxcomp: Callable[..., Any], compressed: Path, tmp_path: Path
) -> None:
    done = onnxcomp("optimize", compressed, "-o", tmp_path / "out.onnx", "--ratio", 8, "--json")
    assert done.code == 3, done.err  # one weight is left: 8x is out of reach, and said to be
    assert done.json["target"]["bytes"] == compressed.stat().st_size // 8
    assert not done.json["target"]["met"]


def test_expanding_twice_compressed_models_gives_back_both_weights(
    onnxcomp: Callable[..., Any], small: Path, compressed: Path, tmp_path: Path
) -> None:
    twice, dense = tmp_path / "twice.onnx", tmp_path / "dense.onnx"
    assert onnxcomp("optimize", compressed, "-o", twice, "--bits", 6).code == 0
    assert onnxcomp("expand", twice, "-o", dense).code == 0
    model = onnx.load(dense)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert not model.functions and [entry.domain for entry in model.opset_import] == [""]
    want = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(small).graph.initializer}
    for tensor in model.graph.initializer:
        exact = want[tensor.name]
        error = np.linalg.norm(onnx.numpy_helper.to_array(tensor) - exact) / np.linalg.norm(exact)
        assert error < 0.1
