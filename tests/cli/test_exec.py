"""`onnxcomp exec`: applications whose sessions know the operators, in processes of their own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.ops import library_path
from onnxcomp.runtime.clients import launch, patching

Write = Callable[[str], Any]

OPEN = """
    import sys
    from onnxruntime import InferenceSession, SessionOptions
    options = SessionOptions()
    options.log_severity_level = 4
    try:
        InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    except Exception as error:
        print("refused" if "com.onnxcomp" in str(error) else error)
    else:
        print("opened")
"""


@pytest.fixture(scope="module")
def bare(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model that needs the library: without definitions of its operators."""
    import onnxcomp

    try:
        library_path()
    except RuntimeMissingError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("bare") / "bare.onnx"
    onnxcomp.optimize(small_model, path, verify=False)
    model = onnx.load(path)
    del model.functions[:]
    onnx.save(model, path)
    return path


def test_sessions_of_an_application_know_the_operators(
    application: Write, bare: Path, small_model: Path
) -> None:
    run = application(OPEN)
    answer = run(bare)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "opened\n", "")
    assert run(small_model).stdout == "opened\n"
    alone = subprocess.run(
        [sys.executable, run.path, bare], env=run.environment(), capture_output=True, text=True
    )
    assert alone.stdout == "refused\n"


def test_environments_with_other_runtimes_and_without_onnxcomp_are_served(
    bare: Path, tmp_path: Path
) -> None:
    pythons = os.environ.get("ONNXCOMP_ORT_PYTHONS", "")
    if not pythons:
        pytest.skip("ONNXCOMP_ORT_PYTHONS names no interpreters with other ONNX Runtime releases")
    program = """
import sys
import numpy as np
import onnxruntime
try:
    import onnxcomp
except ImportError:
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    print(session.run(None, {"ids": np.zeros((1, 3), np.int64)})[0].shape)
"""
    paths = list(filter(None, sys.path))
    start = f"import sys; sys.path[:0] = {paths!r}; from onnxcomp.cli import main; main()"
    variables = {**os.environ, "PYTHONPATH": ""}
    for number, python in enumerate(pythons.split(":")):
        output = tmp_path / f"{number}.npz"
        for by in (("exec",), ("record", "-o", output)):
            command = [sys.executable, "-c", start, *map(str, by), "--", python, "-c", program]
            done = subprocess.run(
                [*command, bare], env=variables, capture_output=True, text=True, check=False
            )
            assert done.stdout == "(1, 3, 64)\n", done.stderr
        assert output.is_file()


def test_nothing_of_onnxcomp_or_onnx_runtime_is_imported_for_it(
    application: Write, bare: Path
) -> None:
    run = application("""
        import sys
        assert not {"onnxruntime", "onnxcomp", "numpy", "ctypes"} & set(sys.modules)
        assert not any(path.endswith("start") for path in sys.path)
        import onnxruntime
        assert "onnxcomp" not in sys.modules
    """)
    answer = run()
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "shell"])
def test_children_of_an_application_know_them_too(
    method: str, application: Write, bare: Path
) -> None:
    run = application(f"""
        import multiprocessing, subprocess, sys

        def work(path):
            import onnxruntime
            onnxruntime.InferenceSession(path)

        if __name__ == "__main__":
            if sys.argv[2:]:
                work(sys.argv[1])
            elif {method!r} == "shell":
                again = [sys.executable, __file__, sys.argv[1], "again"]
                sys.exit(subprocess.run(again).returncode)
            else:
                start = multiprocessing.get_context({method!r})
                child = start.Process(target=work, args=sys.argv[1:])
                child.start()
                child.join()
                sys.exit(child.exitcode)
    """)
    answer = run(bare)
    assert answer.returncode == 0, answer.stderr


def test_the_user_s_own_sitecustomize_runs(application: Write, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    own = tmp_path / "own" / "sitecustomize.py"
    own.write_text("import builtins\nbuiltins.mine = __file__\n")
    run = application(OPEN + "\n    print(mine, sys.modules['sitecustomize'].__file__)")
    answer = run(bare, PYTHONPATH=str(own.parent))
    assert answer.stdout.splitlines() == ["opened", f"{own} {own}"], answer.stderr
    own.write_text("import onnxruntime\nraise RuntimeError('of the user')\n")
    answer = run(bare, PYTHONPATH=str(own.parent))
    assert "of the user" in answer.stderr  # as Python reports it
    assert answer.stdout == "opened\n"
    assert "NameError" in answer.stderr  # the application's, which misses `mine`


def test_nested_commands_are_one(application: Write, bare: Path) -> None:
    run = application(OPEN)
    words = [sys.executable, "-m", "onnxcomp", "exec"]
    answer = subprocess.run(
        [*words, *words, sys.executable, run.path, bare],
        env=run.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert (answer.stdout, answer.stderr) == ("opened\n", "")


def test_an_application_with_onnxcomp_chooses_for_itself(application: Write, bare: Path) -> None:
    run = application("""
        import sys
        import onnxcomp, onnxruntime
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        with onnxcomp.patch_onnxruntime():
            onnxruntime.InferenceSession(sys.argv[1], options)
            onnxcomp.InferenceSession(sys.argv[1], options)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            onnxcomp.InferenceSession(sys.argv[1], options, library=False)
        except onnxcomp.errors.ModelError:
            print("portable")
    """)
    answer = run(bare)
    assert (answer.stdout, answer.stderr) == ("portable\n", "")


def test_a_library_that_does_not_load_is_warned_of_once(
    application: Write, small_model: Path, tmp_path: Path
) -> None:
    import onnxcomp

    small = tmp_path / "small.onnx"
    onnxcomp.optimize(small_model, small, verify=False)
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    run = application(OPEN + '\n    InferenceSession(sys.argv[1])\n    print("again")')
    answer = run(small, ONNXCOMP_OPS_LIBRARY=str(damaged))
    assert answer.stdout == "opened\nagain\n"
    assert answer.stderr.count("onnxcomp: warning: ONNX Runtime cannot load") == 1
    assert "run by their own definitions" in answer.stderr


def test_a_missing_library_is_an_error_before_the_start(application: Write, tmp_path: Path) -> None:
    run = application("print('started')")
    answer = run(ONNXCOMP_OPS_LIBRARY=str(tmp_path / "absent.so"))
    assert (answer.returncode, answer.stdout) == (6, "")
    assert "absent.so does not exist" in answer.stderr


def test_an_environment_without_our_files_goes_on(
    application: Write, bare: Path, tmp_path: Path
) -> None:
    """Another machine's path, or an onnxcomp that was removed while the application runs."""
    shutil.copytree(Path(launch.__file__).parent / "start", tmp_path / "clients" / "start")
    run = application(OPEN)
    variables = launch.environment(require_library=True)
    variables["PYTHONPATH"] = str(tmp_path / "clients" / "start")
    answer = subprocess.run(
        [sys.executable, run.path, bare], env=variables, capture_output=True, text=True
    )
    assert answer.stdout == "refused\n"
    assert "warning: ONNX Runtime stays as it is: FileNotFoundError" in answer.stderr


@pytest.mark.parametrize("code", [0, 3, 255])
def test_the_exit_code_is_the_application_s(code: int, application: Write, bare: Path) -> None:
    assert application(f"raise SystemExit({code})")().returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE])
def test_signals_reach_the_application(number: int, application: Write, bare: Path) -> None:
    """The application is the process: what is sent to one is sent to the other."""
    run = application("""
        import signal, sys, time

        def seen(number, frame):
            print("seen", number, flush=True)
            sys.exit(7)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE):
            signal.signal(number, seen)
        print("ready", flush=True)
        time.sleep(60)
    """)
    command = [sys.executable, "-m", "onnxcomp", "exec", "--", sys.executable, run.path]
    with subprocess.Popen(
        command, env=run.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (7, f"seen {number}\n")


def test_programs_do_not_inherit_what_python_ignores(application: Write, bare: Path) -> None:
    run = application("")
    command = [sys.executable, "-m", "onnxcomp", "exec", "--"]
    shell = ["sh", "-c", "grep SigIgn /proc/$$/status"]
    plain = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    below = subprocess.run(
        [*command, *shell], env=run.environment(), capture_output=True, text=True
    )
    assert below.stdout == plain


def test_options_after_the_command_are_the_command_s(
    onnxcomp: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, bare: Path
) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(launch, "replace_process", lambda words, _: started.append(words))
    onnxcomp("exec", "python", "app.py", "--json", "--help", "-q")
    onnxcomp("exec", "-q", "--", "tool", "--", "-v")
    assert started == [("python", "app.py", "--json", "--help", "-q"), ("tool", "--", "-v")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing argument"),
        (("--", "no-such-program"), "cannot run no-such-program: No such file"),
        (("--", "/"), "cannot run /: Permission denied"),
    ],
)
def test_what_cannot_run_is_said(
    words: tuple[str, ...], said: str, onnxcomp: Callable[..., Any], bare: Path
) -> None:
    before = signal.getsignal(signal.SIGPIPE)
    try:
        answer = onnxcomp("exec", *words)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert answer.code == 2
    assert said in answer.err


def test_the_start_file_names_the_module_of_onnx_runtime() -> None:
    text = (Path(launch.__file__).parent / "start" / "sitecustomize.py").read_text()
    assert f'_SESSIONS = "{patching.SESSIONS}"' in text
    assert f'"{launch._VARIABLE}"' in text
