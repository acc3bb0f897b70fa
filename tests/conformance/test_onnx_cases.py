"""Short form of ``benchmarks/bench_onnx_cases.py``: some of the cases that come with onnx."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_onnx_cases.py"


def run_cases(*options: str) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def test_cases_of_single_operators_keep_their_outputs() -> None:
    counts = run_cases("--kinds", "node", "--every", "45")
    assert counts["dense: passed"] == counts["run by ONNX Runtime"] > 40
    assert counts["codes: with compressed weights"] > 10


def test_cases_with_empty_tensors_keep_their_outputs() -> None:
    counts = run_cases("--kinds", "node", "--only", "reduce_max_empty_set")
    assert counts["of these with weights"] == 1


def test_converted_models_keep_their_outputs() -> None:
    counts = run_cases("--kinds", "simple", "pytorch-converted", "pytorch-operator", "--every", "5")
    assert counts["dense: passed"] == counts["run by ONNX Runtime"] > 12
    assert counts["codes: with compressed weights"] > 0  # the others are of operator set 6


def test_a_known_network_whose_weights_are_made_by_nodes_keeps_its_outputs() -> None:
    counts = run_cases("--kinds", "light", "--only", "squeezenet")
    assert counts["dense: passed"] == counts["bits: passed"] == 1
