"""Progress over bytes: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click

from onnxcomp.cli.terminal import Terminal, bytes_text

__all__ = ["Progress", "progress"]

# Bytes done, bytes in all, name of the tensor that is next.
Progress = Callable[[int, int, str], None]

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

    def show(done: int, total: int, name: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PAUSE and done < total:
            last = now
            click.echo(f"{title}: {bytes_text(done)} of {bytes_text(total)}, {name}", err=True)

    return show


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from onnxcomp.passes.report import peak_rss

    columns = (
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}  {task.fields[tensor]}", table_column=None),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, memory="", tensor="")

        def show(done: int, total: int, name: str) -> None:
            memory = f"peak {bytes_text(peak_rss())}"
            bar.update(task, completed=done, total=total, memory=memory, tensor=name)

        yield show
