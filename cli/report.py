"""`onnxcomp report`: the result of a run as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, OUTPUT
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

__all__ = ["command"]


@click.command("report")
@click.argument("result", type=FILE)
@click.option("--html", "output", type=OUTPUT, required=True, help="The page to write.")
@click.option("--bench", type=FILE, help="Output of bench --json, the original model first.")
@click.option("--frontier", type=FILE, help="Output of plan --frontier --json.")
@with_terminal
def command(
    terminal: Terminal, result: Path, output: Path, bench: Path | None, frontier: Path | None
) -> None:
    """Make a page of RESULT, the JSON that optimize --json printed.

    The page is one file that works offline: sizes, errors, every tensor with the reason for how
    it is stored.
    """
    from onnxcomp.passes.report.page import write_page

    points = _list(frontier, "frontier")
    write_page(_json(result), output, bench=_list(bench, "models"), frontier=points)
    size = output.stat().st_size
    terminal.finish({"path": str(output), "bytes": size}, f"{output} ({bytes_text(size)})")


def _json(path: Path) -> Any:
    from onnxcomp.errors import UsageError

    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON: {error}", hint="name a file that --json wrote"
        ) from error


def _list(path: Path | None, key: str) -> list[Any]:
    from onnxcomp.errors import UsageError

    if path is None:
        return []
    document = _json(path)
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise UsageError(f"{path} has no list {key!r}", hint="see onnxcomp report --help")
    return found
