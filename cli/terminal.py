"""Where output goes: one JSON object on stdout, or tables and a verdict; progress on stderr."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Concatenate, ParamSpec

import click

__all__ = ["Terminal", "bytes_text", "json_text", "percent_text", "with_terminal"]

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True, slots=True)
class Terminal:
    """How one command talks.

    Tables and the verdict are the result of a command, so they go to stdout; with `json` the
    object is the result and they go to stderr.

    Attributes:
        json: Print one JSON object on stdout and nothing else there.
        quiet: No tables, no progress; errors only.
        verbose: Longer tables and the log.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    @property
    def stream(self) -> IO[str]:
        """Where tables go."""
        return sys.stderr if self.json else sys.stdout

    def say(self, text: str = "") -> None:
        """Print one line for people."""
        if not self.quiet:
            click.echo(text, file=self.stream)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 1,
        title: str = "",
    ) -> None:
        """Print a table; the first `left` columns are left-aligned, the others right-aligned."""
        if self.quiet:
            return
        if self.stream.isatty():
            print_rich(self.stream, columns, rows, left, title)
        else:
            for line in plain_lines(columns, rows, left, title):
                click.echo(line, file=self.stream)

    def finish(self, document: Mapping[str, Any], verdict: str) -> None:
        """Print the result: the JSON object, and the verdict as the last line for people."""
        if self.json:
            click.echo(json_text(document))
        self.say(verdict)


def json_text(document: Mapping[str, Any]) -> str:
    """JSON that strict parsers accept: infinities and NaN become null."""
    return json.dumps(finite(document), indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with non-finite floats replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def plain_lines(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: int, title: str
) -> list[str]:
    """A table as aligned text, two spaces between columns."""
    cells = [tuple(columns), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = [title] if title else []
    for row in cells:
        padded = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def print_rich(
    stream: IO[str], columns: Sequence[str], rows: Sequence[Sequence[str]], left: int, title: str
) -> None:
    """A table on a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        first = index == 0
        table.add_column(
            column, justify="left" if index < left else "right", overflow="fold" if first else None
        )
    for row in rows:
        table.add_row(*(Text(text) for text in row))
    Console(file=stream, highlight=False).print(table)


def bytes_text(count: float) -> str:
    """Bytes for people, in decimal units: ``89.6 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= size:
            return (
                f"{count / size:.2f} {unit}"
                if abs(count) < 10 * size
                else f"{count / size:.1f} {unit}"
            )
    return f"{count:.0f} B"


def percent_text(share: float | None) -> str:
    """A share in percent; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.2f} %"


def with_terminal(
    function: Callable[Concatenate[Terminal, P], None],
) -> Callable[..., None]:
    """Give a command the output options and a `Terminal` as its first argument."""

    @functools.wraps(function)
    def command(
        *args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **kw: Any
    ) -> None:
        if verbose or debug:
            show_log(logging.DEBUG if debug else logging.INFO)
        function(Terminal(as_json, quiet, verbose), *args, **kw)

    options = (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No tables, no progress."),
        click.option("-v", "--verbose", is_flag=True, help="Every row, and the log."),
        click.option("--debug", is_flag=True, help="The full log, and tracebacks of errors."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def show_log(level: int) -> None:
    """Send the log of the package to stderr."""
    logger = logging.getLogger("onnxcomp")
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
