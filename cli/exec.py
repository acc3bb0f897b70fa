"""`onnxcomp exec`: run an application whose sessions know the operators."""

from __future__ import annotations

import click

from onnxcomp.cli.terminal import Terminal, with_terminal

__all__ = ["command"]


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
@with_terminal
def command(terminal: Terminal, cmd: tuple[str, ...]) -> None:
    """Run CMD; every session of ONNX Runtime that its Python processes open knows the operators.

    Nothing is installed or changed: the application's environment needs ONNX Runtime 1.18 or newer,
    not onnxcomp. The exit code is that of CMD.
    """
    from onnxcomp.runtime.clients.launch import environment, replace_process

    replace_process(cmd, environment(require_library=True))
