"""benchmarks/gpu_check.sh, as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

ROOT = Path(__file__).parents[2]


def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}",
        "PYTHON": sys.executable,
    }
    for command in (
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh")],
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "library.so"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 6, run.stderr
        assert "no GPU found: torch" in run.stderr
        assert "run this on a machine with an NVIDIA GPU" in run.stderr


def test_comparisons_print_a_table_and_write_json(
    benchmarks: Any, emulated: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    check = benchmarks.gpu_check
    monkeypatch.setattr(benchmarks.results, "RESULTS", tmp_path)
    few = [
        benchmarks.Comparison("hyper matmul", "a", 0.25),
        benchmarks.Comparison("hyper matmul", "b", 0.5),
        benchmarks.Comparison("hash decode", "c", 0.0),
    ]
    monkeypatch.setattr(check.gpu_compare, "compare", lambda *_, **__: iter(few))
    check.main([str(emulated), "--emulated", "--seed", "3", "--name", "made"])
    document = json.loads((tmp_path / "made.json").read_text())
    assert document["gpu"] == "emulated"
    assert document["seed"] == 3
    assert [one["error"] for one in document["comparisons"]] == [0.5, 0.0]
    assert "| hyper matmul | 2 " in capsys.readouterr().out
    few.append(benchmarks.Comparison("hash decode", "here", float("inf")))
    with pytest.raises(SystemExit) as caught:
        check.main([str(emulated), "--emulated"])
    assert caught.value.code == 4
    assert "WRONG: hash decode, here: inf" in capsys.readouterr().err


def test_the_comparisons_of_a_gpu_hold_for_the_emulation(benchmarks: Any, emulated: Path) -> None:
    found = list(
        benchmarks.compare(benchmarks.Calls(emulated), benchmarks.HostMemory, quick=True, seed=1)
    )
    assert {one.kernel for one in found} == {
        f"{family} {what}"
        for family in ("hyper", "hash")
        for what in ("matmul", "decode", "gather")
    }
    assert [one for one in found if not one.error <= 1.0] == []


def test_memory_of_torch_serves_kernels_in_the_same_way(benchmarks: Any, emulated: Path) -> None:
    pytest.importorskip("torch")
    calls, case = benchmarks.Calls(emulated), benchmarks.hyper_case(35, 137)
    for dtype in benchmarks.DTYPES:
        memory = benchmarks.GpuMemory("cpu")
        assert benchmarks.product_error(calls, memory, case, 5, dtype) <= 1.0


def test_guard_bytes_find_what_is_written_outside(benchmarks: Any) -> None:
    import ctypes

    memory = benchmarks.HostMemory()
    address, read = memory.output((3,), np.float32)
    assert np.isnan(read()).all()
    ctypes.memset(address + 12, 0, 1)
    with pytest.raises(AssertionError, match="after the output"):
        read()
    address, read = memory.output((3,), np.float32)
    ctypes.memset(address - 1, 0, 1)
    with pytest.raises(AssertionError, match="before the output"):
        read()


def test_times_are_shown_beside_what_was_asked_for(benchmarks: Any, capsys: Any) -> None:
    timing = benchmarks.gpu_timing
    floor = timing.Floor(0.7, 4.0e6)
    rows = [
        timing.Row("hyper k=4", (8192, 8192), 1, 10.0, 30.0, 2.2, 3.7, 20.0, 20_000_000),
        timing.Row("hash int8", (8192, 8192), 4, 20.0, 30.0),
    ]
    benchmarks.gpu_check.print_times(rows, floor)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()[2:]
    ]
    assert lines == [
        ["hyper k=4", "8192x8192", "1", "10.0", "30.0", "20.0", "3.00", "0.50", "2.2", "3.7"],
        ["hash int8", "8192x8192", "4", "20.0", "30.0", "-", "1.50", "-", "-", "-"],
    ]


def test_sanitizers_are_left_out_when_no_time_is_left(
    benchmarks: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = benchmarks.gpu_check
    now = time.monotonic()
    clean = {"memcheck": "clean", "racecheck": "clean"}
    assert check.sanitize(Path("library.so"), 1, now + 100) == clean
    left_out = dict.fromkeys(clean, "no time left")
    assert check.sanitize(Path("library.so"), 1, now + 5) == left_out


@pytest.mark.parametrize("form", [0, 1, 2, 3])
def test_decoders_have_twelve_layers_and_run(benchmarks: Any, emulated: Path, form: int) -> None:
    import onnxruntime

    decoder = benchmarks.gpu_decoder
    shape = decoder.Shape(256, 384, 2)
    model = decoder.make_decoder(decoder.FORMS[form], shape)
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    product = ("MatMul", "MatMulNBits", "HyperMatMul", "HyperMatMul")[form]
    assert kinds.count(product) == 7 * shape.layers
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(emulated))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float16)
    (y,) = session.run(None, {"input": x})
    assert y.shape == (3, 256)
    # Residual branches are as large as what they are added to: every product counts, none drowns.
    assert 1.0 < y.astype(np.float32).std() < 5.0


def test_a_profile_tells_copies_and_nodes_that_ran_elsewhere(benchmarks: Any) -> None:
    sessions = benchmarks.gpu_sessions
    events = [
        {"name": "session_initialization"},
        {"name": "a_kernel_time", "args": {"op_name": "HyperMatMul", "provider": sessions.CUDA}},
        {"name": "b_kernel_time", "args": {"op_name": "HashMatMul", "provider": "CPU"}},
        {"name": "c_kernel_time", "args": {"op_name": "MemcpyToHost", "provider": sessions.CUDA}},
        {"name": "d_kernel_time", "args": {"op_name": "Add", "provider": "CPU"}},
    ]
    assert sessions.placement(events, sessions.CUDA) == (1, ("b",))


def test_sessions_are_compared_with_the_cpu(
    benchmarks: Any, hyper: Any, emulated: Path, tmp_path: Path
) -> None:
    weight = hyper.random_weight(40, 200)
    model = hyper.make_model("HyperMatMul", weight, (TensorProto.FLOAT, ["batch", 200]))
    onnx.save(model, tmp_path / "model.onnx")
    (row,) = benchmarks.gpu_sessions.compare_models(
        [tmp_path / "model.onnx"], "CPUExecutionProvider", emulated, tmp_path
    )
    assert (row.model, row.copies, row.elsewhere) == ("model.onnx", 0, ())
    assert row.error == 0.0
    assert row.tokens_per_second > 0


def test_models_are_written_in_all_forms_that_sessions_compare(
    benchmarks: Any, hyper: Any, emulated: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((128, 128)).astype(np.float32) / 12 for _ in range(2)]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w0"], ["h"]),
            onnx.helper.make_node("Relu", ["h"], ["r"]),
            onnx.helper.make_node("MatMul", ["r", "w1"], ["y"]),
        ],
        "perceptron",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 128])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 128])],
        [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    imports = [onnx.helper.make_opsetid("", 17)]
    model, folder = tmp_path / "net.onnx", tmp_path / "forms"
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), model)
    folder.mkdir()
    samples = {"x": rng.standard_normal((4, 64, 128)).astype(np.float32).reshape(256, 128)}
    written = list(benchmarks.gpu_models.write_models(model, folder, samples))
    names = [path.name.removeprefix("net.").removesuffix(".onnx") for path in written]
    assert names == ["float16", "4bit", "2bit", "pruned.4bit"]
    rows = benchmarks.gpu_sessions.compare_models(
        written, "CPUExecutionProvider", emulated, tmp_path
    )
    assert all(row.error == 0.0 and row.copies == 0 for row in rows)
    assert onnx.load(written[0]).graph.initializer[0].data_type == TensorProto.FLOAT16
