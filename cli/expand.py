"""`onnxcomp expand`: back to dense ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, OUTPUT, option_of
from onnxcomp.cli.progress import progress
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

__all__ = ["command"]


@click.command("expand")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The dense model.")
@option_of("external_data")
@click.option("--keep-codes", is_flag=True, help="Leave weights compressed, and write the "
              "definitions of their operators into the graph.")  # fmt: skip
@with_terminal
def command(
    terminal: Terminal, model: Path, output: Path, external_data: Any, keep_codes: bool
) -> None:
    """Turn a compressed model back into plain dense ONNX.

    The weights are the decoded ones: the result computes what the compressed model computes, and
    needs neither the operator library nor model-local functions. With --keep-codes the file stays
    small, and engines without such functions run it; the operator library cannot speed it up.
    """
    import onnxcomp
    from onnxcomp.passes.report.form import INLINED

    with progress(terminal, "expanding"):
        saved = onnxcomp.expand(model, output, external_data=external_data, keep_codes=keep_codes)
    files = [str(path) for path in saved.files]
    document = {"output": {"path": files[0], "bytes": saved.bytes, "files": files}}
    kind = f"operators of ONNX only; {INLINED}" if keep_codes else "plain ONNX"
    terminal.finish(document, f"{output}: {bytes_text(saved.bytes)}, {kind}")
