"""Start an application whose Python processes read `start/sitecustomize.py` first."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.ops import library_path

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Supervisor", "environment", "replace_process"]

_START = Path(__file__).parent / "start"
_VARIABLE = "ONNXCOMP_CLIENT"
_PATH = "PYTHONPATH"

# What Python ignores for itself, and programs it starts would ignore, too.
_RESET = ("SIGPIPE", "SIGXFSZ")
_PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")
# Sent by the kernel: a terminal sends its signals to the child, too.
_SI_KERNEL = 0x80

_SIGNAL_CODE = 128

# Seconds between looks at the child where its end is not told.
_PATIENCE = 0.2


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


class Supervisor:
    """Runs the application as a child and passes on the signals that this process gets.

    Signals are held back inside its `with` block. It has to begin in the main thread, before
    libraries are imported that start threads: those would get the signals instead.
    """

    def __init__(self) -> None:
        self._signals = {signal.SIGCHLD, *_numbers(_PASSED_ON)}

    def __enter__(self) -> Self:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._reaper = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGCHLD, self._reaper)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    def run(self, command: Sequence[str], variables: Mapping[str, str], *, stdout: int = 1) -> int:
        """Run the application.

        Args:
            command: The program and its arguments.
            variables: Its environment.
            stdout: The file descriptor that is its stdout.

        Returns:
            Its exit code; 128 and the number of the signal where one ended it.

        Raises:
            UsageError: There is no such program, or it cannot be run.
        """
        try:
            child = os.posix_spawnp(
                command[0], list(command), dict(variables),
                file_actions=[(os.POSIX_SPAWN_DUP2, stdout, 1)] if stdout != 1 else [],
                setsigmask=self._before, setsigdef=_numbers(_RESET),
            )  # fmt: skip
        except OSError as error:
            raise _not_run(command[0], error) from error
        try:
            code = os.waitstatus_to_exitcode(self._status(child))
        except BaseException:  # a signal that another thread got
            os.kill(child, signal.SIGTERM)
            raise
        return code if code >= 0 else _SIGNAL_CODE - code

    def _status(self, child: int) -> int:
        """The status of the child when it has ended."""
        while True:
            # A thread that was there before may have got the signal of the child's end.
            seen = signal.sigtimedwait(self._signals, _PATIENCE)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            if seen is not None and seen.si_signo != signal.SIGCHLD and seen.si_code != _SI_KERNEL:
                os.kill(child, seen.si_signo)


def _numbers(names: Sequence[str]) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _not_run(program: str, error: OSError) -> UsageError:
    hint = "the command stands after --, as in: -- python app.py"
    return UsageError(f"cannot run {program}: {error.strerror}", hint=hint)
