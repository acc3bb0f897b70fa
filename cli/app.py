"""The command group: lazy commands, suggestions, exit codes."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import click

from onnxcomp import __version__, light_imports
from onnxcomp.cli.streams import prepare_streams
from onnxcomp.errors import CompressionError

__all__ = ["COMMANDS", "App", "main"]

# Name -> the line in `onnxcomp --help`. The command itself is `onnxcomp.cli.<name>:command`.
COMMANDS = {
    "optimize": "Write a smaller model with the same inputs and outputs.",
    "plan": "Show what optimize would do, with exact bytes, without doing it.",
    "inspect": "Show what is in a model: weights, uses, bytes, reasons.",
    "verify": "Compare a compressed model with its original.",
    "eval": "Judge a language model: divergence from its original, perplexity.",
    "bench": "Measure load time, latency and memory.",
    "retarget": "Encode a compressed model for another class of machines.",
    "expand": "Turn a compressed model back into plain dense ONNX.",
    "package": "Bundle a model: a plain folder, for Triton, or for onnxruntime-genai.",
    "exec": "Run an application whose ONNX Runtime sessions know the operators.",
    "record": "Run an application and keep what it feeds its sessions, for --data.",
    "ops": "Find the operator library for ONNX Runtime.",
    "doctor": "Check this machine and its packages, and whether a model runs here.",
    "codecs": "List the ways to store a weight, with their parameters.",
    "report": "Make a page of a result that optimize --json printed.",
    "config": "Write, check and describe configuration files.",
    "demo": "Compress, verify and measure a small real model that ships with onnxcomp.",
}
INTERRUPTED = 130

# Exit code of a command that a signal ended, less the number of the signal.
SIGNAL_CODE = 128

# The signal that ends a program whose reader has gone away; not every system has its name.
_SIGPIPE = 13

# What the system says of files, stdout among them, that cannot be written where they were wanted.
_UNWRITABLE = (errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOSPC, errno.EROFS)

# Seconds after a signal in which further ones are ignored, so that cleaning up can end.
_GRACE = 5.0

# Seconds until a signal comes again that was lost.
_AGAIN = 0.02


class Interruption(BaseException):
    """A signal that ends the command; files it has begun are removed on the way out.

    Attributes:
        number: Of the signal.
        what: What happened, in a word.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.what = "interrupted" if number == signal.SIGINT else "terminated"


@contextlib.contextmanager
def interruptions() -> Iterator[list[Interruption]]:
    """Raise `Interruption` on SIGINT and SIGTERM while the block runs.

    Gives a list of those raised: native code may turn one into an error of its own. One that cuts
    in where Python drops all errors, as in callbacks of the garbage collector, comes again.
    """
    raised: list[Interruption] = []
    if threading.current_thread() is not threading.main_thread():
        yield raised
        return
    last = -_GRACE

    def interrupt(number: int, _: object) -> None:
        nonlocal last
        if time.monotonic() - last >= _GRACE:
            last = time.monotonic()
            raised.append(Interruption(number))
            raise raised[-1]

    def dropped(lost: Any) -> None:
        """Raise a signal once more that cut in where errors are dropped."""
        nonlocal last
        if not isinstance(lost.exc_value, Interruption):
            hook(lost)
            return
        last = -_GRACE
        again = threading.Timer(_AGAIN, signal.raise_signal, (lost.exc_value.number,))
        again.daemon = True
        again.start()

    # What a shell's background job or nohup ignores stays ignored, for programs we start, too.
    asked = (signal.SIGINT, signal.SIGTERM)
    numbers = [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, dropped
    try:
        yield raised
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


class App(click.Group):
    """A group whose commands are imported on first use and whose errors have exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"onnxcomp.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest the one that was meant."""
        if args[0] in COMMANDS or args[0].startswith("-"):
            return super().resolve_command(ctx, args)
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        meant = f" Did you mean '{close[0]}'?" if close else ""
        raise click.UsageError(f"No command '{args[0]}'.{meant}", ctx)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Run and exit with the code of the error tree."""
        words = list(sys.argv[1:] if args is None else args)
        light_imports.install()
        prepare_streams()
        stdout = sys.stdout
        # What other libraries log is no output of ours; see --debug.
        logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
        raised: list[Interruption] = []
        try:
            with warnings.catch_warnings(), interruptions() as raised:
                if "--debug" not in words:
                    warnings.simplefilter("ignore")
                code = super().main(
                    words, prog_name or "onnxcomp", **extra | {"standalone_mode": False}
                )
                sys.stdout.flush()
        except BrokenPipeError:
            # The reader of our output went away: nothing left to say, not even at exit.
            _drop_output()
            code = SIGNAL_CODE + _SIGPIPE
        except BaseException as error:
            # Click turns a broken pipe into an exit of its own, and puts a wrapper around stdout.
            gone = getattr(sys.stdout, "wrapped", None) is stdout and not raised
            code = SIGNAL_CODE + _SIGPIPE if gone else report_error(first(raised, error), words)
        sys.exit(code if isinstance(code, int) else 0)


def first(raised: Sequence[Interruption], error: BaseException) -> BaseException:
    """What ended the command: a signal, or the error that was raised."""
    return raised[0] if raised else error


def _drop_output() -> None:
    """Keep the interpreter from failing once more when it flushes stdout at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report_error(error: BaseException, words: Sequence[str]) -> int:
    """Print one error for people (stderr) and, with ``--json``, one for machines (stdout).

    Returns:
        The exit code.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    code, message, hint = describe(error)
    if "--debug" in words:
        traceback.print_exception(error)
    if isinstance(error, click.UsageError) and error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
    click.echo(f"error: {one_line(message)}", err=True)
    if hint:
        click.echo(f"hint: {one_line(hint)}", err=True)
    if "--json" in words:
        from onnxcomp.cli.terminal import json_text

        kind = type(error).__name__
        document = {"kind": kind, "message": message, "hint": hint, "exit_code": code}
        with contextlib.suppress(OSError):
            click.echo(json_text({"error": document}))
            sys.stdout.flush()
    return code


def one_line(text: str) -> str:
    """Text of models and of other libraries on one line, without control characters."""
    from onnxcomp.cli.terminal import printable

    return printable(" ".join(text.split()))


def describe(error: BaseException) -> tuple[int, str, str]:
    """Exit code, message and hint of any exception."""
    if isinstance(error, CompressionError):
        return error.exit_code, error.message, error.hint
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "onnxcomp"
        return 2, error.format_message(), f"see {command} --help"
    if isinstance(error, Interruption):
        return SIGNAL_CODE + error.number, error.what, ""
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return INTERRUPTED, "interrupted", ""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        where = f" {error.filename}" if error.filename else ""
        return 2, f"cannot write{where}: {error.strerror}", "write to a place with enough room"
    if isinstance(error, OSError) and error.filename is not None:
        return 1, f"{error.filename}: {error.strerror}", "check that it exists and may be used"
    if isinstance(error, MemoryError):
        return 1, "out of memory", "use fewer --jobs, or a machine with more memory"
    first = (str(error).splitlines() or [""])[0]
    return 1, f"{type(error).__name__}: {first}", "this is a bug; --debug shows where it happened"


# A lone backspace keeps click from joining the lines of a paragraph.
HELP = """Make trained ONNX models small and keep them runnable everywhere.

\b
Start with:  onnxcomp demo
Then:        onnxcomp optimize model.onnx -o small.onnx
"""


@click.group(
    cls=App,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(__version__, message="onnxcomp %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Print the help when no command is given."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
