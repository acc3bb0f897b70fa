"""Targets on real models, and what a compile takes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, save

import onnxcomp as oc


def check_target(model: Path, output: Path, ratio: float) -> None:
    result = oc.optimize(model, output, ratio=ratio, verify=False)
    target = model.stat().st_size / ratio
    written = sum(Path(file).stat().st_size for file in result.report.output.files)
    assert written == result.plan.bytes
    assert 0.99 * target <= written <= target
    assert result.report.coverage > 0.97


@pytest.mark.parametrize("ratio", [5, 8, 10])
def test_the_language_model_is_just_below_its_target(
    language_model_path: Path, tmp_path: Path, ratio: float
) -> None:
    check_target(language_model_path, tmp_path / "out.onnx", ratio)


@pytest.mark.parametrize("ratio", [5, 8, 10])
def test_minilm_is_just_below_its_target(minilm_path: Path, tmp_path: Path, ratio: float) -> None:
    check_target(minilm_path, tmp_path / "out.onnx", ratio)


def compile_alone(model: Path, output: Path, bits: int) -> dict[str, Any]:
    """Compile in a process of its own, and say what it took and what it imported."""
    code = f"""
        import json, sys, time
        import onnxcomp as oc
        from onnxcomp.runtime.memory import peak_rss
        oc.optimize
        before = peak_rss()
        result = oc.optimize({str(model)!r}, {str(output)!r}, bits={bits}, verify=False)
        heavy = sorted({{"onnxruntime", "torch", "rich"}} & sys.modules.keys())
        print(json.dumps({{
            "before": before, "peak": peak_rss(), "heavy": heavy,
            "cpu": time.process_time(), "ratio": result.report.ratio,
        }}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_minilm_is_compiled_in_a_minute_and_little_memory(
    minilm_path: Path, tmp_path: Path
) -> None:
    found = compile_alone(minilm_path, tmp_path / "out.onnx", bits=4)
    assert found["ratio"] >= 7.0
    assert found["peak"] <= 0.35e9
    assert found["cpu"] < 120  # two cores for a minute
    assert found["heavy"] == []


def external_model(folder: Path, count: int, rows: int, columns: int) -> Path:
    """Square products with Relu between them; their weights lie in one data file."""
    tile = np.random.default_rng(0).standard_normal((1 << 16) + 1).astype(np.float32)
    nodes, tensors = [], []
    with (folder / "weights.bin").open("wb") as file:
        for index in range(count):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT)
            tensor.dims.extend((rows, columns))
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "weights.bin", "offset": file.tell(), "length": 4 * rows * columns}
            for key, value in place.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            np.resize(tile * np.float32(1 + index), (rows, columns)).tofile(file)
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{index}", f"w{index}"], [f"p{index}"]))
            nodes.append(helper.make_node("Relu", [f"p{index}"], [f"x{index + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", rows])
        for name in ("x0", f"x{count}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], tensors)
    path = folder / "model.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_memory_grows_with_the_largest_weight_and_not_with_the_model(tmp_path: Path) -> None:
    side, count = 3072, 4
    path = external_model(tmp_path, count, side, side)
    found = compile_alone(path, tmp_path / "out.onnx", bits=1)
    largest = 4 * side * side
    assert found["peak"] - found["before"] < 1.5 * largest + 16e6
    assert found["peak"] < 0.1e9 + 2 * largest
