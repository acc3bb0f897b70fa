"""Progress: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from onnxcomp.cli.terminal import Terminal, bytes_text

if TYPE_CHECKING:
    from onnxcomp.passes.config.options import Progress

__all__ = ["progress"]

# Seconds between lines where nobody can watch a bar.
_PAUSE = 5.0


@contextlib.contextmanager
def progress(terminal: Terminal, title: str, unit: str = "") -> Iterator[Progress | None]:
    """Give a callback that shows progress; None when the command is quiet.

    Args:
        terminal: How the command talks.
        title: What is being done.
        unit: What the callback counts, such as "windows"; empty for bytes.
    """
    if terminal.quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(title, unit) as show:
            yield show
    else:
        yield _lines(title, unit)


def _lines(title: str, unit: str) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int, site: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PAUSE and done < total:
            last = now
            amounts = f"{done} of {total} {unit}"
            if not unit:
                amounts = f"{bytes_text(done)} of {bytes_text(total)}"
            click.echo(f"{title}: {amounts}, {site}", err=True)

    return show


@contextlib.contextmanager
def _bar(title: str, unit: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as ProgressBar

    from onnxcomp.runtime.memory import peak_rss

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn() if unit else DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}  {task.fields[tensor]}", table_column=None),
    )
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, memory="", tensor="")

        def show(done: int, total: int, site: str) -> None:
            memory = f"peak {bytes_text(peak_rss())}"
            bar.update(task, completed=done, total=total, memory=memory, tensor=site)

        yield show
