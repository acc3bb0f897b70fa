"""`onnxcomp demo`: the whole way once, on a model that ships with the package."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcomp.cli.progress import progress
from onnxcomp.cli.terminal import Terminal, bytes_text, percent_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.passes.driver.api import Result

__all__ = ["command"]

# The form a user sees, by the form that `bench` measures.
FORMS = {
    "standard": "original",
    "library": "compressed, with the operator library",
    "portable": "compressed, any ONNX Runtime",
}


@click.command("demo")
@click.option(
    "--bits", type=click.IntRange(1, 6), default=4, show_default=True, help="Bits per weight."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the two models in this folder; else nothing stays.",
)
@with_terminal
def command(terminal: Terminal, bits: int, output: Path | None) -> None:
    """Compress, verify and measure a small real model that ships with onnxcomp.

    The model reads the name of a Unicode character and says which general category the character
    has. It was trained for this demo by models/character_kinds/train.py. Accuracy is measured on
    4,007 characters that were held out from training.
    """
    import onnxcomp
    from onnxcomp.cli.optimize import show_result
    from onnxcomp.models.character_kinds import model_path

    with workplace(output) as folder:
        dense, small = folder / "model.onnx", folder / "small.onnx"
        shutil.copyfile(model_path(), dense)
        terminal.say(f"optimize: {bits} bits per weight; then both forms run and are compared\n")
        with progress(terminal, "encoding") as show:
            result = onnxcomp.optimize(dense, small, bits=bits, progress=show)
        show_result(terminal, result)
        forms = measure(dense, small)
    terminal.say("\nbench: accuracy on characters the model never saw, speed and memory\n")
    show_forms(terminal, forms)
    terminal.say("\n" + next_steps(bits, output))
    document = {
        "folder": None if output is None else str(output),
        "bits": bits,
        "ratio": result.report.ratio,
        "forms": forms,
        "verify": result.verify.to_json() if result.verify else None,
    }
    terminal.finish(document, verdict(result, forms))


@contextlib.contextmanager
def workplace(output: Path | None) -> Iterator[Path]:
    """The given folder, made if needed, or a temporary one that is removed."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="onnxcomp-demo-") as name:
        yield Path(name)


def measure(dense: Path, small: Path) -> list[dict[str, Any]]:
    """Size, speed, memory and accuracy of the original and of both forms of the compressed one."""
    from onnxcomp.runtime.bench import bench

    document = bench([dense, small], portable=True, shapes={"pairs": (1, 64)}, seconds=0.5)
    rows: list[dict[str, Any]] = document["models"]
    for row in rows:
        row["accuracy"] = accuracy(row["path"], library=row["form"] != "portable")
    return rows


def accuracy(path: str, *, library: bool) -> float:
    """Share of held-out characters whose category the model gets right."""
    import numpy as np

    from onnxcomp.models.character_kinds import held_out
    from onnxcomp.runtime.evaluate import iterate_model

    answers = held_out()
    feeds = ({"pairs": answers.pairs[start : start + 256]} for start in range(0, len(answers), 256))
    guesses = [
        outputs["logits"].argmax(1) for outputs in iterate_model(path, feeds, library=library)
    ]
    return float((np.concatenate(guesses) == answers.categories).mean())


def show_forms(terminal: Terminal, forms: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    columns = ("", "file", "ratio", "accuracy", "load", "one name", "memory")
    before = forms[0]["file_bytes"]
    rows = [
        (
            FORMS[form["form"]],
            bytes_text(form["file_bytes"]),
            f"{before / form['file_bytes']:.2f}x",
            percent_text(form["accuracy"]),
            f"{form['load_ms']:.0f} ms",
            f"{form['median_ms']:.2f} ms",
            bytes_text(form["rss_bytes"]),
        )
        for form in forms
    ]
    terminal.table(columns, rows)


def next_steps(bits: int, output: Path | None) -> str:
    """Commands to try next."""
    steps = [
        ("your model, 4 bits", "onnxcomp optimize model.onnx -o small.onnx"),
        ("to a size", "onnxcomp optimize model.onnx -o small.onnx --ratio 8"),
        ("what is in it", "onnxcomp inspect model.onnx"),
        ("run it", 'onnxcomp.InferenceSession("small.onnx") in Python'),
    ]
    if bits > 2:
        steps.append(("this model smaller", f"onnxcomp demo --bits {bits - 1}"))
    if output is None:
        steps.append(("keep the files", "onnxcomp demo -o FOLDER"))
    width = max(len(what) for what, _ in steps)
    return "\n".join(["next:", *(f"  {what.ljust(width)}  {how}" for what, how in steps)]) + "\n"


def verdict(result: Result, forms: Sequence[Mapping[str, Any]]) -> str:
    """One line: size and accuracy before and after."""
    report = result.report
    return (
        f"{bytes_text(report.input.bytes)} -> {bytes_text(report.output.bytes)}"
        f" ({report.ratio:.2f}x), accuracy {percent_text(forms[0]['accuracy'])}"
        f" -> {percent_text(forms[1]['accuracy'])}, verified"
    )
