"""`onnxcomp config`: configuration files of optimize and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, OUTPUT
from onnxcomp.cli.terminal import Terminal, with_terminal

__all__ = ["command"]


@click.group("config")
def command() -> None:
    """Write, check and describe configuration files for optimize --config and plan --config."""


@command.command("init")
@click.option("-o", "--output", type=OUTPUT, help="Write it here; else it is printed.")
@with_terminal
def init(terminal: Terminal, output: Path | None) -> None:
    """Write a configuration with every setting in it, explained."""
    from onnxcomp.errors import UsageError
    from onnxcomp.passes.config.template import template_text

    text = template_text()
    if output is None:
        _show(terminal, {"text": text}, text)
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{output} exists already", hint="remove it, or name another") from error
    terminal.finish(
        {"path": str(output)}, f"{output}: edit it, then onnxcomp config check {output}"
    )


@command.command("check")
@click.argument("config", type=FILE)
@with_terminal
def check(terminal: Terminal, config: Path) -> None:
    """Check a configuration and show what it stands for, its preset included."""
    from onnxcomp.passes.config.file import checked_options

    options = {name: _plain(value) for name, value in checked_options(config).items()}
    rows = [(name.rstrip("_"), json.dumps(value)) for name, value in options.items()]
    terminal.table(("setting", "value"), rows, left=2)
    terminal.finish({"options": options}, f"{config}: {len(options)} settings, all valid")


@command.command("schema")
@with_terminal
def schema(terminal: Terminal) -> None:
    """Print the JSON Schema of configuration files, for editors."""
    from onnxcomp.passes.config.schema import schema as read
    from onnxcomp.passes.config.schema import schema_text

    _show(terminal, read(), schema_text())


def _show(terminal: Terminal, document: dict[str, Any], text: str) -> None:
    """Print a text that is the whole result."""
    *lines, last = text.rstrip().splitlines()
    for line in lines:
        terminal.say(line)
    terminal.finish(document, last)


def _plain(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, tuple) else value
