"""A real sentence encoder through the command line: size, memory, exact targets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def compile_minilm(model: Path, output: Path, *options: str) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-m", "onnxcomp", "optimize", str(model), "-o", str(output)]
    command += [*options, "--no-verify", "--json", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(("bits", "ratio"), [(4, 7.0), (3, 9.0), (2, 12.5)])
def test_bits_give_their_ratio_in_little_memory(
    bits: int, ratio: float, minilm_path: Path, tmp_path: Path
) -> None:
    result = compile_minilm(minilm_path, tmp_path / "small.onnx", "--bits", str(bits))
    assert result["ratio"] >= ratio
    assert result["coverage"] == 1.0
    assert result["peak_rss_bytes"] <= 350_000_000


@pytest.mark.parametrize("ratio", [5, 8, 10])
def test_a_ratio_is_met_within_one_percent(ratio: int, minilm_path: Path, tmp_path: Path) -> None:
    result = compile_minilm(minilm_path, tmp_path / "small.onnx", "--ratio", str(ratio))
    wanted = minilm_path.stat().st_size / ratio
    assert 0.99 * wanted <= result["output"]["bytes"] <= wanted
