"""The frame of the command line: help, suggestions, exit codes, where output goes."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from onnxcomp import errors
from onnxcomp.cli import app, main
from onnxcomp.cli.terminal import Terminal, bytes_text, fitting_columns, json_text, plain_lines

ERRORS = (
    errors.CompressionError,
    errors.UsageError,
    errors.BudgetError,
    errors.VerifyError,
    errors.ModelError,
    errors.RuntimeMissingError,
)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """Make `onnxcomp codecs` raise the exception in the list."""
    raised: list[BaseException] = []

    @click.command("codecs")
    @click.option("--debug", is_flag=True)
    @click.option("--json", "as_json", is_flag=True)
    def command(debug: bool, as_json: bool) -> None:
        raise raised[0]

    monkeypatch.setattr("onnxcomp.cli.codecs.command", command)
    yield raised


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_help_names_every_command_without_importing_it() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in app.COMMANDS:
        assert name in out


@pytest.mark.parametrize(
    "name",
    [
        *sorted(set(app.COMMANDS) - {"config", "eval", "ops", "package"}),
        *("config init", "config check", "config schema"),
        *("ops path", "ops info", "package dir", "package triton", "package genai", "eval lm"),
    ],
)
def test_every_command_has_help_and_a_json_form(name: str) -> None:
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    for option in ("--json", "--quiet", "--verbose", "--debug"):
        assert option in out


def test_without_a_command_the_help_is_printed() -> None:
    code, out, _ = run()
    assert code == 0
    assert "onnxcomp demo" in out


def test_a_misspelt_command_gets_a_suggestion() -> None:
    code, out, err = run("optimise")
    assert (code, out) == (2, "")
    assert "Did you mean 'optimize'?" in err


def test_a_misspelt_option_gets_a_suggestion() -> None:
    code, _, err = run("plan", "model.onnx", "--ration", "8")
    assert code == 2
    assert "--ratio" in err


def test_version_is_the_version_of_the_distribution() -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("onnxcomp 0.")


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_its_exit_code_message_and_hint(
    kind: type[errors.CompressionError], failing: list[BaseException]
) -> None:
    failing.append(kind("what happened with 7 values", hint="what to do"))
    code, out, err = run("codecs")
    assert code == kind.exit_code
    assert out == ""
    assert err == "error: what happened with 7 values\nhint: what to do\n"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_exits_130(interrupt: BaseException, failing: list[BaseException]) -> None:
    failing.append(interrupt)
    code, _, err = run("codecs")
    assert code == 130
    assert "interrupted" in err


def test_an_unexpected_exception_is_one_line_and_a_hint(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("division by zero\nsecond line"))
    code, _, err = run("codecs")
    assert code == 1
    assert err.splitlines()[0] == "error: ZeroDivisionError: division by zero"
    assert "--debug" in err.splitlines()[1]
    assert "Traceback" not in err


def test_debug_shows_the_traceback(failing: list[BaseException]) -> None:
    failing.append(ZeroDivisionError("division by zero"))
    code, _, err = run("codecs", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_the_log_is_shown_while_a_command_runs_and_no_longer(demo_model_path: Path) -> None:
    logger = logging.getLogger("onnxcomp")
    before = (logger.level, list(logger.handlers))
    for _ in range(2):
        code, _, err = run("plan", str(demo_model_path), "--verbose")
        assert code == 0
        assert err.count("onnxcomp.passes.transforms.pass_manager: canonicalize") == 1
    assert (logger.level, list(logger.handlers)) == before


def test_with_json_an_error_is_one_json_object_on_stdout(failing: list[BaseException]) -> None:
    failing.append(errors.ModelError("no such file", hint="check the path"))
    code, out, _ = run("codecs", "--json")
    assert json.loads(out)["error"] == {
        "kind": "ModelError",
        "message": "no such file",
        "hint": "check the path",
        "exit_code": code,
    }


def test_help_starts_quickly() -> None:
    """The promise is 0.4 s; CPU time, because other processes must not fail this test."""
    program = "import sys; sys.argv = ['onnxcomp', '--help']\nfrom onnxcomp.cli import main\nmain()"
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        after = os.times()
        children = after.children_user + after.children_system
        best = min(best, children - before.children_user - before.children_system)
    assert best < 0.4


def test_module_form_is_the_same_program() -> None:
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-m", "onnxcomp", "--help"], capture_output=True, text=True, check=True
    )
    assert "onnxcomp demo" in run.stdout
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1547371, "1.55 MB"), (15473710, "15.5 MB"), (2e9, "2.00 GB")],
)
def test_bytes_are_printed_in_decimal_units(count: float, text: str) -> None:
    assert bytes_text(count) == text


def test_json_never_holds_what_strict_parsers_refuse() -> None:
    text = json_text({"snr_db": float("inf"), "list": [float("nan"), 1.5]})
    assert json.loads(text) == {"snr_db": None, "list": [None, 1.5]}


def test_plain_tables_align_columns() -> None:
    assert plain_lines(("tensor", "bytes"), [("a", "1"), ("long", "100")], 1) == [
        "tensor  bytes",
        "a           1",
        "long      100",
    ]


def test_narrow_terminals_do_without_spare_columns() -> None:
    cells = [("tensor", "shape", "after"), ("a.name.that.is.much.too.long", "128x128", "12.7 KB")]
    assert fitting_columns(cells, ("shape",), 80) == [0, 1, 2]
    assert fitting_columns(cells, ("shape",), 30) == [0, 2]


def test_with_json_tables_and_verdict_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(json=True)
    terminal.table(("a", "b"), [("1", "2")])
    terminal.finish({"ratio": 7.5}, "done")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"ratio": 7.5}
    assert captured.err.splitlines()[-1] == "done"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(quiet=True)
    terminal.table(("a", "b"), [("1", "2")])
    terminal.finish({}, "done")
    assert capsys.readouterr() == ("", "")
