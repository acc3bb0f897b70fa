"""What README and docs say is true: examples run, links lead somewhere, tables are up to date."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from onnxcomp.cli import app, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# A block in `sh` or `python` runs as it stands. Those in `py` need torch, and run in tests/models;
# those without a language need files that a reader has to bring.
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Files that the examples of the README leave behind.
LEFT = ("demo/model.onnx", "small.onnx")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the blocks that run, in the order of the page."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def run_lines(script: str, folder: Path) -> None:
    """Run the lines of a shell block with the `onnxcomp` of this interpreter."""
    command = f'onnxcomp() {{ "{sys.executable}" -m onnxcomp "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{script}\n{run.stdout}\n{run.stderr}"


def run_page(page: Path, folder: Path) -> None:
    """Run a page's blocks one after the other, as a reader would."""
    for number, (language, text) in enumerate(blocks(page)):
        if language == "python":
            (folder / f"example_{number}.py").write_text(text, encoding="utf-8")
            text = f'"{sys.executable}" example_{number}.py'
        run_lines(text, folder)


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples of the README have run."""
    folder = tmp_path_factory.mktemp("readme")
    run_page(README, folder)
    return folder


def test_examples_of_the_readme_run_in_order(readme_folder: Path) -> None:
    languages = [language for language, _ in blocks(README)]
    assert {"sh", "python"} <= set(languages)
    assert all((readme_folder / name).is_file() for name in LEFT)


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.name
)
def test_examples_of_a_page_run_in_order(page: Path, readme_folder: Path, tmp_path: Path) -> None:
    if page.name == "distributed.md":
        pytest.importorskip("distributed", reason="dask[distributed] is not installed")
    shutil.copytree(readme_folder / "demo", tmp_path / "demo")
    if "-o small.onnx" not in page.read_text(encoding="utf-8"):
        shutil.copyfile(readme_folder / "small.onnx", tmp_path / "small.onnx")
    run_page(page, tmp_path)


def test_two_commands_near_the_top_do_all_their_own_set_up() -> None:
    commands = re.findall(r"^python3 -m venv .*$", TEXT, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/onnxcomp demo")
    assert commands[1].endswith(".venv/bin/pytest -n auto")
    assert TEXT.index(commands[1]) < 2000
    assert all("pip install" in command for command in commands)


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) < 200


def test_the_console_script_is_installed() -> None:
    script = Path(sysconfig.get_path("scripts")) / "onnxcomp"
    if not script.exists():
        pytest.skip("onnxcomp is on the path, not installed")
    run = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("onnxcomp ")


def test_tables_and_picture_are_those_of_the_result_files() -> None:
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import readme_tables\n"
        "sys.exit(', '.join(map(str, readme_tables.stale_pages())) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run benchmarks/readme_tables.py --write\n{run.stderr}"


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in words}


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Text, file and anchor of every link into the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            place, _, anchor = target.partition("#")
            yield target, (page.parent / place).resolve() if place else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target, place, anchor in links(page):
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("ops/*/spec.md"))], ids=name_of)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    folders = "benchmarks|cli|docs|models|ops|passes|runtime|src|tests"
    named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def all_commands() -> dict[str, click.Command]:
    """Every command by its words: "optimize", "package dir", ..."""
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in app.COMMANDS}
    for name, group in list(commands.items()):
        if isinstance(group, click.Group):
            commands |= {f"{name} {inner}": group.commands[inner] for inner in group.commands}
    return {name: command for name, command in commands.items() if command is not None}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_that_do_not_run_use_options_that_exist(page: Path) -> None:
    commands = all_commands()
    code = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in re.findall(r"^onnxcomp (.*)$", "".join(code), re.MULTILINE):
        words = shlex.split(line)
        command = commands.get(" ".join(words[:2])) or commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if re.match("--?[a-z]", word)} <= known, line


def test_every_command_and_option_is_in_the_manual() -> None:
    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in all_commands().items():
        assert f"onnxcomp {name}" in manual
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(f"`{option}" in manual for option in parameter.opts[-1:]), parameter.opts
