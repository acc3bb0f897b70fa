"""Other forms of a model, made to be compared with it."""

import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from onnxcomp.cli.app import main
from onnxcomp.passes.driver import rivals
from onnxcomp.passes.latency import model as latency_model
from onnxcomp.passes.latency.cost_table import CostTable, machine

NAMES = [
    "ONNX Runtime dynamic int8",
    "MatMulNBits int4",
    "MatMulNBits int8",
    *(f"onnxcomp, {bits} bits" for bits in (4, 3, 2)),
    "onnxcomp, 4 bits, as fast",
]
OPERATORS = {
    "ONNX Runtime dynamic int8": "MatMulInteger",
    "MatMulNBits int4": "MatMulNBits",
    "MatMulNBits int8": "MatMulNBits",
    "onnxcomp, 4 bits": "HyperMatMul",
    "onnxcomp, 4 bits, as fast": "MatMul",
}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One product, on a machine where codes are slow."""
    slow = {f"hyper {k}{kind}": [1.0, 0, 0, 0] for k in range(1, 7) for kind in ("", " structured")}
    slow |= {name: [1.0, 0, 0, 0] for name in ("int 4", "int 8", "dynamic 8")}
    costs = CostTable(machine(), {"dense": [1e-6, 0, 0, 0], **slow})
    monkeypatch.setattr(latency_model, "cached_costs", lambda: costs)
    graph = onnx.parser.parse_graph(
        "g (float[n, 256] x) => (float[n, 256] y) { y = MatMul (x, w) }"
    )
    weight = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    return path


def test_every_rival_holds_what_its_name_says(dense: Path, tmp_path: Path) -> None:
    made = rivals.make_rivals(dense, tmp_path)
    assert [rival.name for rival in made] == NAMES
    paths = {rival.name: rival.path for rival in made}
    for name, operator in OPERATORS.items():
        path = paths[name]
        assert path is not None, name
        assert operator in {node.op_type for node in onnx.load(path).graph.node}, name


def test_what_cannot_be_made_is_left_out_with_the_reason(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    found = {rival.name: rival for rival in rivals.make_rivals(dense, tmp_path)}
    missing = found.pop("ONNX Runtime dynamic int8")
    assert missing.path is None and "onnxruntime.quantization" in missing.reason
    assert found["onnxcomp, 4 bits"].path is not None


def test_what_a_quantizer_leaves_alone_is_not_shown_as_its_work(
    dense: Path, tmp_path: Path
) -> None:
    model = onnx.load(dense)
    model.graph.node[0].op_type = "Gemm"
    onnx.save(model, dense)
    level = logging.getLogger().level
    found = {rival.name: rival for rival in rivals.make_rivals(dense, tmp_path)}
    integers = found["MatMulNBits int4"]
    assert integers.path is None and integers.reason == "it leaves this model as it is"
    assert found["onnxcomp, 4 bits"].path is not None
    assert logging.getLogger().level == level


def test_the_command_measures_them_beside_the_model(dense: Path) -> None:
    words = ["bench", str(dense), "--rivals", "--seconds", "0.01", "--threads", "1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    for name in (str(dense), *NAMES):
        assert name in result.stdout
