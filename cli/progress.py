"""Progress over bytes: a bar on a terminal, a line now and then elsewhere; always on stderr."""

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
def progress(terminal: Terminal, title: str) -> Iterator[Progress | None]:
    """Give a callback that shows progress; None when the command is quiet."""
    if terminal.quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(title) as show:
            yield show
    else:
        yield _lines(title)


def _lines(title: str) -> Progress:
    last = time.monotonic()

    def show(done: int, total: int, site: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PAUSE and done < total:
            last = now
            click.echo(f"{title}: {bytes_text(done)} of {bytes_text(total)}, {site}", err=True)

    return show


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from onnxcomp.runtime.memory import peak_rss

    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}  {task.fields[tensor]}", table_column=None),
    )
    with ProgressBar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, memory="", tensor="")

        def show(done: int, total: int, site: str) -> None:
            memory = f"peak {bytes_text(peak_rss())}"
            bar.update(task, completed=done, total=total, memory=memory, tensor=site)

        yield show
