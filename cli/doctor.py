"""`onnxcomp doctor`: what is installed, what the machine offers, and whether a model runs here."""

from __future__ import annotations

from pathlib import Path

import click

from onnxcomp.cli.options import FILE
from onnxcomp.cli.terminal import Terminal, with_terminal

__all__ = ["command"]

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


@click.command("doctor")
@click.argument("model", type=FILE, required=False)
@with_terminal
def command(terminal: Terminal, model: Path | None) -> None:
    """Check this machine and its packages; with MODEL, whether and how it runs here.

    Exits 6 when something that is needed is missing or does not fit, with what to do about it.
    """
    import onnxcomp

    found = onnxcomp.doctor(model)
    for finding in found.findings:
        terminal.say(f"{_MARKS[finding.status]:<8}{finding.name}: {finding.text}")
        if finding.hint:
            terminal.say(f"{'':<8}-> {finding.hint}")
    problems = sum(finding.status == "problem" for finding in found.findings)
    notes = sum(finding.status == "note" for finding in found.findings)
    verdict = f"{_counted(problems, 'problem')}, {_counted(notes, 'note')}"
    terminal.finish(found.to_json(), verdict if problems or notes else "all is well")
    if not found.ok:
        raise click.exceptions.Exit(onnxcomp.errors.RuntimeMissingError.exit_code)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
