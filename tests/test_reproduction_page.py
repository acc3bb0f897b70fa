"""The tables and pictures of docs/reproduction.md are those of the result files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, "benchmarks")
from reproduction_tables import PAGE, PICTURES, put_into

text = PAGE.read_text(encoding="utf-8")
stale = [] if put_into(text) == text else [PAGE.name]
for name, picture in PICTURES.items():
    if (PAGE.parent / name).read_text(encoding="utf-8") != picture():
        stale.append(name)
sys.exit(", ".join(stale) or None)
"""


def test_tables_and_pictures_are_those_of_the_result_files() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"run benchmarks/reproduction_tables.py --write\n{run.stderr}"
