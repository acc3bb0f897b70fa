"""`onnxcomp package`: bundle a model with what it needs to be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxcomp.cli.options import FILE, input_options
from onnxcomp.cli.terminal import Terminal, bytes_text, percent_text, with_terminal

__all__ = ["command"]

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group("package")
def command() -> None:
    """Bundle a model with its data, the operator library, and how to use them.

    The folder appears complete or not at all. It holds onnxcomp.json, which lists its files with
    their hashes. An archive is one file that is to be stored or sent, not to be run.
    """


def common_options(function: F) -> F:
    """Options of every kind of package."""
    options = (
        click.argument("model", type=FILE),
        click.option("-o", "--output", type=FOLDER, required=True, help="The folder to write."),
        click.option(
            "--portable", is_flag=True,
            help="Leave the operator library out; the model runs by the definitions inside it.",
        ),
        click.option("--force", is_flag=True, help="Replace an existing package."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@command.command("dir", short_help="A self-contained folder.")
@common_options
@input_options
@with_terminal
def folder(
    terminal: Terminal,
    model: Path,
    data: tuple[str, ...],
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    **settings: Any,
) -> None:
    """A self-contained folder with an example that needs ONNX Runtime and numpy only."""
    show(terminal, model, "dir", data=data or None, shapes=dict(shapes), **settings)


@command.command("triton", short_help="A model for Triton Inference Server.")
@common_options
@click.option("--name", help="Name of the model in the repository; else that of the file.")
@click.option(
    "--mount-prefix", default="/models", show_default=True,
    help="Where the server sees the repository; /mnt/models for KServe.",
)  # fmt: skip
@click.option(
    "--max-batch-size", type=click.IntRange(0), default=0, show_default=True,
    help="Most rows that requests are joined to; 0 for no batching.",
)  # fmt: skip
@click.option(
    "--model-version", type=click.IntRange(1), default=1, show_default=True, help="Its number."
)
@click.option(
    "--instances", type=click.IntRange(1), default=1, show_default=True, help="Run at once."
)
@click.option(
    "--target", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where the server runs the model.",
)  # fmt: skip
@with_terminal
def triton(terminal: Terminal, model: Path, **settings: Any) -> None:
    """A model in a repository of NVIDIA Triton Inference Server, which may hold others."""
    show(terminal, model, "triton", **settings)


@command.command("genai", short_help="A folder for onnxruntime-genai.")
@common_options
@click.option(
    "--like", type=FOLDER, help="Folder of the original, with genai_config.json; else MODEL's own."
)
@with_terminal
def genai(terminal: Terminal, model: Path, **settings: Any) -> None:
    """A folder for onnxruntime-genai: the original's files with MODEL as the decoder."""
    show(terminal, model, "genai", **settings)


@command.command("hf", short_help="A folder for the libraries around Hugging Face.")
@common_options
@click.option("--like", type=FOLDER, help="Folder of the original, with config.json and tokenizer.")
@click.option(
    "--variant", default="", metavar="NAME",
    help="What the file is called behind model_, such as q4; else it is model.onnx.",
)  # fmt: skip
@with_terminal
def hugging_face(terminal: Terminal, model: Path, **settings: Any) -> None:
    """A folder for sentence-transformers, optimum, fastembed and transformers.js.

    It has the original's tokenizer, configuration and modules, with MODEL as onnx/model.onnx.
    """
    show(terminal, model, "hf", **settings)


@command.command("archive", short_help="One file, as small as can be without loss.")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The archive to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@with_terminal
def archive(terminal: Terminal, model: Path, output: Path, force: bool) -> None:
    """One file with a model and its data, entropy-coded, to be stored or sent.

    `onnxcomp package restore` turns it back, bit for bit. Codes of weights stay as they are: they
    are as good as random.
    """
    import onnxcomp

    made = onnxcomp.archive(model, output, force=force)
    rows = [
        (name, bytes_text(own["bytes"]), bytes_text(own["stored"]))
        for name, own in made.streams.items()
    ]
    terminal.table(("numbers of", "bytes", "in the archive"), rows)
    for note in made.notes:
        terminal.say(f"note: {note}")
    sizes = f"{bytes_text(made.model_bytes)} are {bytes_text(made.bytes)}"
    verdict = f"{made.path}: {sizes}, {percent_text(made.gain)} less"
    terminal.finish(made.to_json(), verdict)


@command.command("restore", short_help="The model of an archive, bit for bit.")
@click.argument("archive", type=FILE)
@click.option("-o", "--output", type=FOLDER, required=True, help="The folder to write.")
@with_terminal
def restore(terminal: Terminal, archive: Path, output: Path) -> None:
    """Write the files of an archive into a new folder, as they were.

    The folder appears complete, with files whose SHA-256 are those of the original's, or not at
    all.
    """
    import onnxcomp

    made = onnxcomp.restore(archive, output)
    rows = [(name, bytes_text(entry["bytes"])) for name, entry in made.files.items()]
    terminal.table(("file", "size"), rows)
    terminal.finish(made.to_json(), f"{made.path / made.model}: {bytes_text(made.model_bytes)}")


SERVICES = {
    "litserve": "LitServe", "ray": "Ray Serve", "bentoml": "BentoML", "mlserver": "MLServer",
    "kserve": "KServe",
}  # fmt: skip


def add_service(kind: str, title: str) -> None:
    """Add the command of one model server of Python."""

    @command.command(
        kind, short_help=f"A service of {title}.", help=f"A folder that {title} starts as it is."
    )
    @common_options
    @click.option("--name", help="What the server calls the model; else the name of the file.")
    @click.option(
        "--max-batch-size", type=click.IntRange(1), default=8, show_default=True,
        help="Most requests that run at once.",
    )  # fmt: skip
    @with_terminal
    def service(terminal: Terminal, model: Path, **settings: Any) -> None:
        show(terminal, model, kind, **settings)


for _kind, _title in SERVICES.items():
    add_service(_kind, _title)


def show(terminal: Terminal, model: Path, kind: str, *, output: Path, **settings: Any) -> None:
    """Write the package and say what is in it."""
    import onnxcomp

    made = onnxcomp.package(model, output, kind, **settings)
    files = made.manifest["files"]
    rows = [(name, bytes_text(entry["bytes"])) for name, entry in files.items()]
    terminal.table(("file", "size"), rows)
    for note in made.notes:
        terminal.say(f"note: {note}")
    library = "with the operator library" if made.manifest["library"] else "no operator library"
    runs = "runs without it" if made.manifest["portable"] else "does not run without it"
    fallback = f" (the model {runs})" if made.manifest["library"] else ""
    verdict = f"{made.path}: {len(files)} files, {bytes_text(made.bytes)}, {library}{fallback}"
    terminal.finish(made.to_json(), verdict)
