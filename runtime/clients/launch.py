"""Start an application whose Python processes read `start/sitecustomize.py` first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.ops import library_path

__all__ = ["environment", "replace_process", "run_child"]

_START = Path(__file__).parent / "start"
_VARIABLE = "ONNXCOMP_CLIENT"
_PATH = "PYTHONPATH"

# What Python ignores for itself, and programs it starts would ignore, too.
_RESET = ("SIGPIPE", "SIGXFSZ")
_PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")
# Sent by the kernel: a terminal sends its signals to the child, too.
_SI_KERNEL = 0x80

_SIGNAL_CODE = 128


def environment(
    *, require_library: bool, record: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Variables for an application: those of this process and ours.

    Args:
        require_library: Whether a missing operator library is an error.
        record: Arguments of the `Recorder` in the application's processes, if there is to be one.

    Raises:
        RuntimeMissingError: There is no operator library.
        UsageError: The package lies in a folder that PYTHONPATH cannot name.
    """
    try:
        library = str(library_path().resolve())
    except RuntimeMissingError:
        if require_library:
            raise
        library = ""
    start = str(_START.resolve())
    if os.pathsep in start:
        raise UsageError(
            f"{_PATH} cannot name {start}",
            hint=f"install onnxcomp in a folder without {os.pathsep!r}",
        )
    before = [
        path for path in os.environ.get(_PATH, "").split(os.pathsep) if path and path != start
    ]
    settings = {"library": library, "record": dict(record) if record else None}
    return {
        **os.environ,
        _PATH: os.pathsep.join([start, *before]),
        _VARIABLE: json.dumps(settings),
    }


def replace_process(command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Become the application: its exit code, its signals and its terminal are this process's.

    Raises:
        UsageError: There is no such program, or it cannot be run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for number in _numbers(_RESET):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], list(command), dict(variables))
    except OSError as error:
        raise _not_run(command[0], error) from error


def run_child(command: Sequence[str], variables: Mapping[str, str], *, stdout: int = 1) -> int:
    """Run the application as a child; signals that this process gets are passed on.

    To be called from the main thread, before other threads are there: they would get the signals.

    Args:
        command: The program and its arguments.
        variables: Its environment.
        stdout: The file descriptor that is its stdout.

    Returns:
        Its exit code; 128 and the number of the signal where one ended it.

    Raises:
        UsageError: There is no such program, or it cannot be run.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return _run_child_simply(command, variables, stdout)
    awaited = {signal.SIGCHLD, *_numbers(_PASSED_ON)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    reaper = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        child = os.posix_spawnp(
            command[0], list(command), dict(variables),
            file_actions=[(os.POSIX_SPAWN_DUP2, stdout, 1)] if stdout != 1 else [],
            setsigmask=before, setsigdef=_numbers(_RESET),
        )  # fmt: skip
        return _exit_code(_wait(child, awaited))
    except OSError as error:
        raise _not_run(command[0], error) from error
    finally:
        signal.signal(signal.SIGCHLD, reaper)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(child: int, awaited: set[signal.Signals]) -> int:
    """The status of the child when it has ended."""
    while True:
        seen = signal.sigwaitinfo(awaited)
        if seen.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
        elif seen.si_code != _SI_KERNEL:
            os.kill(child, seen.si_signo)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _SIGNAL_CODE - code


def _run_child_simply(command: Sequence[str], variables: Mapping[str, str], stdout: int) -> int:
    """Where signals cannot be told apart: those of the terminal reach the child by themselves."""
    try:
        code = subprocess.run(list(command), env=dict(variables), stdout=stdout).returncode
    except OSError as error:
        raise _not_run(command[0], error) from error
    return code if code >= 0 else _SIGNAL_CODE - code


def _numbers(names: Sequence[str]) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _not_run(program: str, error: OSError) -> UsageError:
    hint = "the command stands after --, as in: -- python app.py"
    return UsageError(f"cannot run {program}: {error.strerror}", hint=hint)
