"""Progress: a bar on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from onnxcomp.cli.terminal import Terminal, bytes_text
from onnxcomp.runtime.activity import shown_by

if TYPE_CHECKING:
    from onnxcomp.passes.config.options import Progress

__all__ = ["progress"]

# Seconds between lines where nobody can watch a bar.
_PAUSE = 5.0

# After so many pauses a line is said again though nothing has changed.
_REPEAT = 12


@contextlib.contextmanager
def progress(terminal: Terminal, title: str, unit: str = "") -> Iterator[Progress | None]:
    """Give a callback that shows progress; None when the command is quiet.

    What the code itself says it is at (`runtime.activity`) is shown as well.

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
        with _lines(title, unit) as show:
            yield show


@contextlib.contextmanager
def _lines(title: str, unit: str) -> Iterator[Progress]:
    """Say every few seconds what is being done; a thread does, so that long steps are seen too."""
    text = [""]
    ended = threading.Event()

    def show(done: int, total: int, site: str) -> None:
        amounts = f"{done} of {total} {unit}"
        if not unit:
            amounts = f"{bytes_text(done)} of {bytes_text(total)}"
        text[0] = f"{title}: {amounts}, {site}" if done < total else ""

    def note(what: str, done: int, total: int, item: str) -> None:
        text[0] = f"now: {activity_text(what, done, total, item)}"

    def repeat() -> None:
        """Say what is going on when it changes, and now and then when it does not."""
        said, silent = "", 0
        while not ended.wait(_PAUSE):
            silent += 1
            if text[0] and (text[0] != said or silent > _REPEAT):
                said, silent = text[0], 0
                click.echo(said, err=True)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        with shown_by(note):
            yield show
    finally:
        ended.set()
        thread.join()


def activity_text(what: str, done: int, total: int, item: str) -> str:
    """What is being done, on one line."""
    parts = [part for part in (f"{done} of {total}" if total else "", item) if part]
    return f"{what}: {', '.join(parts)}" if parts else what


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

        def note(what: str, done: int, total: int, item: str) -> None:
            memory = f"peak {bytes_text(peak_rss())}"
            bar.update(task, memory=memory, tensor=activity_text(what, done, total, item))

        with shown_by(note):
            yield show
