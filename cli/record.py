"""`onnxcomp record`: what an application feeds its sessions."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcomp.cli.terminal import Terminal, bytes_text, json_text, with_terminal
from onnxcomp.errors import UsageError

if TYPE_CHECKING:
    from onnxcomp.runtime.clients.recording import Recorded

__all__ = ["command"]

_REASONS = {
    "unsupported": "of a type that .npz files do not hold, or on a device",
    "large": "larger than --max-bytes leaves room for",
}


@click.command("record", context_settings={"allow_interspersed_args": False})
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="The file of inputs, for --data; with several models, OUT-MODEL.npz for each.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(1), default=64, show_default=True,
    help="How many inputs are kept of each model; every run is as likely to be one.",
)  # fmt: skip
@click.option(
    "--max-bytes", metavar="SIZE", default="512MB", show_default=True,
    help="Bytes of all inputs together; the model with most gives up some.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which are kept.")
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@with_terminal
def command(
    terminal: Terminal,
    cmd: tuple[str, ...],
    output: Path,
    samples: int,
    max_bytes: str,
    seed: int,
) -> None:
    """Run CMD and keep what its Python processes feed their ONNX Runtime sessions.

    CMD's environment needs ONNX Runtime, not onnxcomp. However CMD ends, what was seen until then
    is written. The exit code is that of CMD. The file holds inputs as they are, private ones too.
    """
    from onnxcomp.passes.config.values import parse_size
    from onnxcomp.runtime.clients.launch import Supervisor, environment

    begun = time.monotonic()
    with Supervisor() as supervisor:
        # Imports numpy, whose threads must not get the signals.
        from onnxcomp.runtime.clients.recording import collected, spool

        limit = parse_size(max_bytes)
        with spool(output) as folder:
            settings = {
                "folder": str(folder), "samples": samples, "max_bytes": limit, "seed": seed,
            }  # fmt: skip
            variables = environment(require_library=False, record=settings)
            # The one JSON object is all that stdout has: CMD's own output would spoil it.
            stdout = sys.stderr.fileno() if terminal.json else 1
            code = supervisor.run(cmd, variables, stdout=stdout)
            models = collected(folder, output, samples=samples, max_bytes=limit, seed=seed)
    if code == 0 and not any(model.samples for model in models):
        raise _nothing(models)
    show(terminal, models, code, time.monotonic() - begun)
    click.get_current_context().exit(code)


def show(terminal: Terminal, models: Sequence[Recorded], code: int, seconds: float) -> None:
    """Say what was recorded: on stderr, because stdout is CMD's."""
    aside = dataclasses.replace(terminal, json=True)
    columns = ("model", "runs", "samples", "bytes", "inputs", "file")
    rows = [
        (
            os.path.basename(model.model), str(model.runs), str(model.samples),
            bytes_text(model.nbytes), shapes_text(model), str(model.path) if model.samples else "-",
        )
        for model in models
    ]  # fmt: skip
    if rows:
        aside.table(columns, rows)
    for model in models:
        for reason, count in model.left_out.items():
            aside.say(f"note: {model.model}: {count} left out: {_REASONS[reason]}")
    if terminal.json:
        document = {
            "models": [model.to_json() for model in models],
            "exit_code": code,
            "seconds": round(seconds, 3),
        }
        click.echo(json_text(document))
    ended = "" if code == 0 else f"; {_ended(code)}"
    files = [str(model.path) for model in models if model.samples]
    if files:
        aside.say(f"recorded for --data: {', '.join(files)}{ended}")
    elif code:
        aside.say(f"nothing was recorded{ended}")


def shapes_text(model: Recorded) -> str:
    """Names and sizes of inputs: ``ids 1x3..17``."""
    parts = []
    for name, axes in model.shapes.items():
        if axes is None:
            shown = "of several ranks"
        else:
            shown = "x".join(str(a) if a == b else f"{a}..{b}" for a, b in axes) or "scalar"
        parts.append(f"{name} {shown}")
    return ", ".join(parts) or "-"


def _ended(code: int) -> str:
    return f"the command ended with {code}" if code <= 128 else f"signal {code - 128} ended it"


def _nothing(models: Sequence[Recorded]) -> UsageError:
    if models:
        reasons = sorted({_REASONS[reason] for model in models for reason in model.left_out})
        return UsageError(f"no inputs were recorded: they are {' or '.join(reasons)}")
    return UsageError(
        "the command ran no session of ONNX Runtime in Python",
        hint="Python must not be started with -I, -E or -S, and PYTHONPATH must reach it",
    )
