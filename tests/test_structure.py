"""The rules of the source tree: how long things may be, and what a start may cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "ops", "runtime", "cli", "models")
SOURCES = sorted(
    path for folder in (*FOLDERS, "src/onnxcomp") for path in (ROOT / folder).rglob("*.py")
)
NATIVE = sorted(path for end in ("*.cc", "*.h", "*.cu") for path in (ROOT / "ops").rglob(end))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = first.end_lineno if documented else function.body[0].lineno - 1
    return (function.end_lineno or 0) - (start or 0)


def test_what_a_codec_can_do_is_a_field_of_it() -> None:
    """Callers never ask for the class of a codec, nor read anything from its name."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "isinstance",
                "issubclass",
            ):
                assert "Codec" not in ast.unparse(node), f"{name_of(path)}:{node.lineno}"
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
                asked = ast.unparse(node.comparators[0])
                assert not asked.endswith("codec.name"), f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [*SOURCES, *NATIVE], ids=name_of)
def test_files_stay_under_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_under_80_lines_and_are_annotated(path: Path) -> None:
    for function in functions(path):
        assert body_lines(function) <= 80, f"{function.name} in {name_of(path)}"
        assert function.returns is not None, f"{function.name} in {name_of(path)}"


def test_the_median_function_is_short() -> None:
    sizes = [body_lines(function) for path in SOURCES for function in functions(path)]
    assert median(sizes) <= 10
    assert sorted(sizes)[len(sizes) * 9 // 10] <= 40


def test_no_file_has_a_name_that_says_nothing() -> None:
    vague = {"utils", "util", "helpers", "helper", "manager", "misc", "common", "data", "info"}
    assert not [name_of(path) for path in SOURCES if path.stem in vague]


def test_the_package_and_its_command_line_import_nothing_heavy() -> None:
    """Start-up time is a promise: neither ONNX, nor ONNX Runtime, nor torch for `--help`."""
    program = (
        "import sys, onnxcomp, onnxcomp.cli, onnxcomp.models.character_kinds\n"
        "print(*sorted({'onnx', 'onnxruntime', 'onnx_ir', 'torch', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_links_in_the_source_package_point_to_the_folders() -> None:
    for folder in FOLDERS:
        link = ROOT / "src" / "onnxcomp" / folder
        assert link.is_symlink()
        assert link.resolve() == (ROOT / folder).resolve()
