"""The tables of docs/sharing.md, and the picture beside them, are those of the result files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys; sys.path.insert(0, 'benchmarks')\n" + program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_tables_are_those_of_the_result_files() -> None:
    found = run(
        "import sharing_tables\n"
        "text = sharing_tables.PAGE.read_text(encoding='utf-8')\n"
        "sys.exit(sharing_tables.put_into(text) != text)"
    )
    assert found.returncode == 0, f"run benchmarks/sharing_tables.py --write\n{found.stderr}"


def test_the_picture_is_that_of_the_result_file() -> None:
    found = run(
        "import json, pathlib, bench_sharing_training as b\n"
        "rows = json.loads((b.RESULTS / 'sharing_training.json').read_text())['rows']\n"
        "picture = pathlib.Path('docs/sharing_training.svg').read_text(encoding='utf-8')\n"
        "sys.exit(b.picture(rows) != picture)"
    )
    assert found.returncode == 0, f"run bench_sharing_training.py --draw\n{found.stderr}"
