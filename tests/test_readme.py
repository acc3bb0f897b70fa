"""The README does what it says: commands run, examples run, numbers come from result files."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples run, one after the other, as a reader would."""
    return tmp_path_factory.mktemp("readme")


def run_lines(script: str, folder: Path) -> None:
    """Run the lines of a shell block with the `onnxcomp` of this interpreter."""
    command = f'onnxcomp() {{ "{sys.executable}" -m onnxcomp "$@"; }}\n{script}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{script}\n{run.stdout}\n{run.stderr}"


def test_examples_run_in_order(folder: Path) -> None:
    shell, python = blocks("sh"), blocks("python")
    assert len(shell) >= 4 and len(python) >= 2
    for script in shell:
        run_lines(script, folder)
    for name in ("small.onnx", "mixed.onnx", "dense.onnx", "plan.json", "planned.onnx"):
        assert (folder / name).is_file()
    assert (folder / "repository" / "characters" / "config.pbtxt").is_file()
    for number, program in enumerate(python):
        (folder / f"example_{number}.py").write_text(program)
        run_lines(f'"{sys.executable}" example_{number}.py', folder)


def test_two_commands_near_the_top_do_all_their_own_set_up() -> None:
    commands = re.findall(r"^python3 -m venv .*$", TEXT, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/onnxcomp demo")
    assert commands[1].endswith(".venv/bin/pytest")
    assert TEXT.index(commands[1]) < 2000
    assert all("pip install" in command for command in commands)


def test_the_console_script_is_installed() -> None:
    script = Path(sysconfig.get_path("scripts")) / "onnxcomp"
    if not script.exists():
        pytest.skip("onnxcomp is on the path, not installed")
    run = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("onnxcomp ")


def test_the_tables_are_those_of_the_result_files() -> None:
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import readme_tables\n"
        "sys.exit(', '.join(map(str, readme_tables.stale_pages())) or None)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"run benchmarks/readme_tables.py --write\n{run.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_command_and_option_is_in_the_manual() -> None:
    import click

    from onnxcomp.cli import app, main

    manual = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in app.COMMANDS}
    for name, group in list(commands.items()):
        if isinstance(group, click.Group):
            commands |= {f"{name} {inner}": group.commands[inner] for inner in group.commands}
    for name, command in commands.items():
        assert command is not None
        assert f"onnxcomp {name}" in manual
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(f"`{option}" in manual for option in parameter.opts[-1:]), parameter.opts
