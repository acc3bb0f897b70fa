"""The program in docs/sharing.md runs as printed; its tables and its picture are up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
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


# torch says these of its own exporters.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_program_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    programs = re.findall(r"```py\n(.*?)```", text, flags=re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(programs), "docs/sharing.md", "exec"), {})
    for name in ("model.onnx", "small.onnx"):
        operators = {node.op_type for node in onnx.load(tmp_path / name).graph.node}
        assert "HashMatMul" in operators
        assert (tmp_path / name).stat().st_size < 4 * 512 * 512 / 8


def test_the_tables_are_those_of_the_result_files() -> None:
    found = run(
        "import sharing_tables\n"
        "text = sharing_tables.PAGE.read_text(encoding='utf-8')\n"
        "sys.exit(sharing_tables.put_into(text) != text)"
    )
    assert found.returncode == 0, f"run benchmarks/sharing_tables.py --write\n{found.stderr}"


@pytest.mark.parametrize("name", ["sharing_training", "sharing_rivals"])
def test_the_pictures_are_those_of_the_result_files(name: str) -> None:
    found = run(
        f"import json, pathlib, bench_{name} as b\n"
        f"rows = json.loads((b.RESULTS / '{name}.json').read_text())['rows']\n"
        f"picture = pathlib.Path('docs/{name}.svg').read_text(encoding='utf-8')\n"
        "sys.exit(b.picture(rows) != picture)"
    )
    assert found.returncode == 0, f"run bench_{name}.py --draw\n{found.stderr}"
