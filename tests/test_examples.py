"""The page in examples/web, as far as it can be checked without a browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WEB = ROOT / "examples" / "web"


@pytest.mark.parametrize("script", sorted(WEB.glob("*.js")), ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    command = [node, "--input-type=module", "--check"]
    done = subprocess.run(command, input=script.read_bytes(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_page_names_files_that_are_there() -> None:
    named = re.findall(r'src="([^"]+)"', (WEB / "index.html").read_text(encoding="utf-8"))
    for script in WEB.glob("*.js"):
        named += re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))
    assert {name for name in named if not name.startswith("node_modules/")} == {
        path.name for path in WEB.glob("*.js")
    }


def test_the_figures_are_those_of_the_version_that_it_takes() -> None:
    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    found = json.loads((ROOT / "benchmarks" / "results" / "web.json").read_text(encoding="utf-8"))
    assert package["dependencies"]["onnxruntime-web"] == found["onnxruntime-web"]
