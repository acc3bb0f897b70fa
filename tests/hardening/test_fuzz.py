"""Short forms of the long runs of tests/fuzz/run.sh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onnxcomp.ops import library_path

ROOT = Path(__file__).parents[2]
FUZZ = ROOT / "tests" / "fuzz"


def _figures(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def test_mutated_models_end_in_errors_of_this_package_or_in_none() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, str(FUZZ / "models.py"), "--count", "150", "--seed", "7000"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    figures = _figures(done)
    outcomes = figures["outcomes"]
    assert isinstance(outcomes, dict)
    assert outcomes["done"] > 20 and outcomes["ModelError"] > 20


def test_mutations_that_reach_new_lines_end_in_errors_of_this_package_or_in_none(
    tmp_path: Path,
) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    line = [sys.executable, str(FUZZ / "reader.py"), "--seconds", "10", "--keep", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    cases = _figures(done)["cases"]
    assert isinstance(cases, int) and cases > 20


def test_mutated_payloads_end_in_a_status_or_in_an_output(tmp_path: Path) -> None:
    """Without a sanitizer in the library this sees crashes, and reads that leave the page."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "kernels"
    source = ["-std=c++17", "-O1", f"-I{ROOT / 'ops'}", str(FUZZ / "kernels.cc")]
    subprocess.run([compiler, *source, "-o", str(driver), "-ldl"], check=True)
    line = [str(driver), str(library_path()), "20000", "1"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    figures = _figures(done)
    counts = [figures[key] for key in ("refused_at_creation", "refused_at_run", "ran")]
    assert sum(map(int, counts)) == 20000 and min(map(int, counts)) > 1000
