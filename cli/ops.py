"""`onnxcomp ops`: the operator library, for scripts and for people."""

from __future__ import annotations

from typing import Any

import click

from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

__all__ = ["command"]

# Any opset will do: names and signatures of the operators do not depend on it.
_OPSET = 18

# By the naming rule of the domain; functions with other names are parts of bodies.
_KINDS = ("MatMul", "Gather", "Decode", "Weight")


# A lone backspace keeps click from joining the lines of a paragraph.
HELP = """Find the operator library for ONNX Runtime.

\b
In Python:   session_options.register_custom_ops_library(path)
In C, C++:   RegisterCustomOpsLibrary_V2(options, path)
"""


@click.group("ops", help=HELP)
def command() -> None:
    """Group of the three commands below."""


@command.command("path")
@with_terminal
def path(terminal: Terminal) -> None:
    """Print the path of the library, alone on a line."""
    from onnxcomp.ops import library_path

    terminal.finish({"path": str(library_path())}, str(library_path()))


@command.command("list")
@with_terminal
def list_(terminal: Terminal) -> None:
    """List the operators, their inputs, and what runs them."""
    entries = operators()
    rows = [(entry["name"], entry["runs"], ", ".join(entry["inputs"])) for entry in entries]
    terminal.table(("operator", "runs as", "inputs"), rows, left=3)
    terminal.finish({"operators": entries}, f"{len(entries)} operators in the domain com.onnxcomp")


@command.command("info")
@with_terminal
def info(terminal: Terminal) -> None:
    """Load the library into ONNX Runtime and say what was found."""
    import onnxruntime

    from onnxcomp import __version__
    from onnxcomp.ops import cuda_architectures, cuda_kernels, library_path, register
    from onnxcomp.runtime.machine import look

    register(onnxruntime.SessionOptions())
    machine = look()
    facts = {
        "path": str(library_path()),
        "bytes": library_path().stat().st_size,
        "onnxcomp": __version__,
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "operators": [entry["name"] for entry in operators()],
        "cuda_architectures": list(cuda_architectures()),
        "cuda_kernels": cuda_kernels(),
        "cuda_driver": machine.cuda,
        "gpus": list(machine.gpus),
    }
    shown = {
        **facts,
        "bytes": bytes_text(library_path().stat().st_size),
        "cuda_architectures": list(cuda_architectures()) or "no CUDA kernels",
        "cuda_kernels": facts["cuda_kernels"] or "none",
        "cuda_driver": machine.cuda or "none",
        "gpus": list(machine.gpus) or "none",
    }
    rows = [
        (key, value if isinstance(value, str) else ", ".join(value)) for key, value in shown.items()
    ]
    terminal.table(("", ""), rows, left=2)
    terminal.finish(facts, "the library loads")


def operators() -> list[dict[str, Any]]:
    """Names and inputs of the operators in compressed models, from the codecs' portable bodies."""
    from onnxcomp.passes.codecs import CODECS

    # Codecs may share operators.
    bodies = {body.name: body for codec in CODECS.values() for body in codec.functions(_OPSET)}
    return [
        {
            "name": body.name,
            "inputs": list(body.input),
            "attributes": list(body.attribute),
            # What ends in Weight never has a kernel: the session folds it.
            "runs": "constant at load" if body.name.endswith("Weight") else "kernel or body",
        }
        for body in bodies.values()
        if body.name.endswith(_KINDS)
    ]
