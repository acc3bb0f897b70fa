"""The program in docs/lowrank.md runs as printed, and its tables are those of the result files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "lowrank.md"


def test_the_recipe_of_the_page_runs() -> None:
    pytest.importorskip("torch")
    [program] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), flags=re.S)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    model: object = names["model"]
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", ["lowrank_tables", "sparse_tables"])
def test_tables_of_pages_are_those_of_the_result_files(script: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, 'benchmarks'); import {script}\n"
        f"text = {script}.PAGE.read_text(encoding='utf-8')\n"
        f"sys.exit({script}.put_into(text) != text)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=PAGE.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, f"run benchmarks/{script}.py --write\n{run.stderr}"
