"""`onnxcomp retarget`: codes for another class of machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.options import FILE, OUTPUT, option_of
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.passes.driver.retarget import Retargeted

__all__ = ["command"]


@click.command("retarget")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The new model.")
@option_of("target")
@click.option("--original", type=FILE, help="The dense model; else the decoded weights are taken.")
@option_of("jobs")
@with_terminal
def command(
    terminal: Terminal,
    model: Path,
    output: Path,
    target: Any,
    original: Path | None,
    jobs: int | None,
) -> None:
    """Encode a compressed model for another class of machines, as far as that changes anything.

    Weights whose codes suit it keep them, bit by bit. New codes are made by values: where the
    old ones were calibrated, run optimize with --target and --data instead.
    """
    import onnxcomp

    found = onnxcomp.retarget(model, output, target=target, original=original, jobs=jobs)
    show_recoded(terminal, found)
    terminal.finish(found.to_json(), verdict(found))


def show_recoded(terminal: Terminal, found: Retargeted) -> None:
    """Print one line for each weight that got other codes."""
    from onnxcomp.cli.tables import stored_text

    rows = [
        (
            weight.name,
            stored_text("hyper", weight.before),
            stored_text("hyper", weight.after),
            "?" if weight.error_before is None else f"{100 * weight.error_before:.2f} %",
            f"{100 * weight.error:.2f} %",
        )
        for weight in found.recoded
    ]
    if rows:
        terminal.table(("weight", "was", "is", "error before", "error"), rows, left=3)


def verdict(found: Retargeted) -> str:
    """How many weights changed, and what that costs."""
    if not found.recoded:
        return f"{found.path}: all {len(found.kept)} weights suit {found.target} as they are"
    text = f"{found.path}: {bytes_text(found.bytes)}, {len(found.recoded)} weights encoded again"
    text += f", {len(found.kept)} kept"
    if found.recoded[0].error_before is None:
        worst = max(weight.error for weight in found.recoded)
        text += (
            f"; new codes add up to {100 * worst:.2f} % to the error of the old ones, in squares"
        )
    return text
