"""Where output goes: one JSON object on stdout, or tables and a verdict; progress on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal

import click

__all__ = ["Terminal", "bytes_text", "json_text", "percent_text", "printable", "with_terminal"]


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
            for line in text.split("\n"):
                click.echo(printable(line), file=self.stream)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 1,
        spare: Sequence[str] = (),
    ) -> None:
        """Print a table.

        Args:
            columns: Headings.
            rows: Cells.
            left: How many columns, from the first, are left-aligned; the others are right-aligned.
            spare: Headings of columns that a narrow terminal does without, the least needed first.
        """
        if self.quiet:
            return
        rows = [[printable(cell) for cell in row] for row in rows]
        if self.stream.isatty():
            print_rich(self.stream, columns, rows, left, spare)
        else:
            for line in plain_lines(columns, rows, left):
                click.echo(line, file=self.stream)

    def finish(self, document: Mapping[str, Any], verdict: str) -> None:
        """Print the result: the JSON object, and the verdict as the last line for people."""
        if self.json:
            click.echo(json_text(document))
        self.say(verdict)


def printable(text: str) -> str:
    """Text with control characters spelt out: names in models must not steer the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


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


def plain_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table as aligned text, two spaces between columns."""
    cells = [tuple(columns), *rows]
    widths = natural_widths(cells)
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def natural_widths(cells: Sequence[Sequence[str]]) -> list[int]:
    """Width of each column when nothing is cut."""
    return [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]


def print_rich(
    stream: IO[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int,
    spare: Sequence[str],
) -> None:
    """A table on a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    shown = fitting_columns([tuple(columns), *rows], spare, console.width)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index in shown:
        justify: Literal["left", "right"] = "left" if index < left else "right"
        # Names may be long and fold; everything else stays on its line.
        table.add_column(columns[index], justify=justify, overflow="fold", no_wrap=index > 0)
    for row in rows:
        table.add_row(*(Text(row[index]) for index in shown))
    console.print(table)


def fitting_columns(
    cells: Sequence[Sequence[str]], spare: Sequence[str], width: int, least: int = 16
) -> list[int]:
    """Columns to show in a width, the first one given `least` at least."""
    widths = natural_widths(cells)
    widths[0] = min(widths[0], least)
    shown = list(range(len(widths)))
    for heading in spare:
        if sum(widths[index] + 2 for index in shown) - 2 <= width:
            break
        shown.remove(list(cells[0]).index(heading))
    return shown


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
    function: Callable[..., None],
) -> Callable[..., None]:
    """Give a command the output options and a `Terminal` as its first argument."""

    @functools.wraps(function)
    def command(
        *args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **kw: Any
    ) -> None:
        level = logging.DEBUG if debug else logging.INFO
        with shown_log(level) if verbose or debug else contextlib.nullcontext():
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


@contextlib.contextmanager
def shown_log(level: int) -> Iterator[None]:
    """Send the log of the package to stderr; the logger is as before afterwards."""
    logger = logging.getLogger("onnxcomp")
    before = logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
