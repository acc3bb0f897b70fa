"""`onnxcomp bench`: load time, latency, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, input_options
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

__all__ = ["command", "show_bench"]


@click.command("bench")
@click.argument("models", type=FILE, nargs=-1, required=True)
@input_options
@click.option("--threads", type=click.IntRange(1), help="Threads of a session.")
@with_terminal
def command(
    terminal: Terminal,
    models: tuple[Path, ...],
    data: tuple[str, ...],
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    **settings: Any,
) -> None:
    """Measure one or more models on the same inputs, taking turns, each in a process of its own."""
    from onnxcomp.runtime.bench import bench

    document = bench(models, data=data or None, shapes=dict(shapes), **settings)
    show_bench(terminal, document["models"])


def show_bench(terminal: Terminal, models: Sequence[Mapping[str, Any]]) -> None:
    """Print one line for each model, relative to the first."""
