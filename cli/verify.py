"""`onnxcomp verify`: compare a compressed model with its original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, OUTPUT, input_options, option_of
from onnxcomp.cli.terminal import Terminal, percent_text, with_terminal

__all__ = ["command", "show_verification"]

# Relative L2 difference of an output from which on a result is hardly of use: -6 dB of noise.
_FAR = 0.5


@click.command("verify")
@click.argument("reference", type=FILE)
@click.argument("compressed", type=FILE)
@input_options
@click.option(
    "--samples", type=click.IntRange(1), default=4, show_default=True, help="Inputs made."
)
@option_of("seed", help="Seed of made-up inputs.")
@option_of("tolerance")
@click.option(
    "--bisect", is_flag=True,
    help="Where --tolerance is exceeded, find the weights that cause the error.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=OUTPUT, help="With --bisect: write the model with these weights dense."
)
@with_terminal
def command(
    terminal: Terminal,
    reference: Path,
    compressed: Path,
    data: tuple[str, ...],
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    tolerance: float | None,
    bisect: bool,
    output: Path | None,
    **settings: Any,
) -> None:
    """Run REFERENCE and COMPRESSED on the same inputs and compare their outputs.

    COMPRESSED runs twice: with the operator library, and without it as any ONNX Runtime would run
    it. Both must load, run, agree with each other, and give finite numbers; otherwise, or when an
    output differs more than --tolerance, the exit code is 4. The loss is reported, not judged,
    unless --tolerance asks for it.
    """
    import onnxcomp

    if tolerance is not None:
        settings["tolerance"] = tolerance
    settings |= {"data": data or None, "shapes": dict(shapes)}
    if bisect:
        if tolerance is None:
            raise click.UsageError("--bisect needs --tolerance")
        mended = onnxcomp.mend(reference, compressed, output, **settings)
        result, document = mended.verification, mended.to_json()
    else:
        result = onnxcomp.verify(reference, compressed, **settings)
        document = result.to_json()
    show_verification(terminal, document, made_up=not data)
    for name in document.get("bisect", {}).get("blamed", ()):
        terminal.say(f"causes the error: {name}")
    terminal.finish(document, verdict(document))
    if not result.passed:
        raise click.exceptions.Exit(onnxcomp.errors.VerifyError.exit_code)


def verdict(document: Mapping[str, Any]) -> str:
    """One line: whether it passed, and how close the worst output is to the original."""
    if not document["passed"]:
        return "FAILED"
    differences = [metrics["rel_l2"] for metrics in document["outputs"].values()]
    known = [value for value in differences if value is not None]
    worst = f", relative difference to the original at most {max(known):.3g}" if known else ""
    samples = document["samples"]
    return f"passed on {samples} {'input' if samples == 1 else 'inputs'}{worst}"


def show_verification(terminal: Terminal, document: Mapping[str, Any], *, made_up: bool) -> None:
    """Print the differences of every output, with the library and without.

    Args:
        terminal: Where to print.
        document: JSON of the verification.
        made_up: Whether its inputs were made up; then it says that real ones tell more.
    """
    forms = (("library", document), ("portable", document["portable"]))
    rows = [row for form, part in forms for row in _rows(form, part.get("outputs", {}))]
    columns = ["form", "output", "relative L2", "SNR", "cosine", "max abs", "same class"]
    if rows and all(row[-1] == "-" for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if rows:
        terminal.table(columns, rows, left=2)
    if rows and made_up:
        terminal.say("inputs were made up: give real ones with --data to know the real loss")
    known = [row["rel_l2"] for row in document["outputs"].values() if row["rel_l2"] is not None]
    if max(known, default=0.0) > _FAR:
        terminal.say(
            f"warning: an output differs by {100 * max(known):.0f} % from the original's: "
            "use more bits, a smaller ratio or --data"
        )
    for failure in document["failures"]:
        terminal.say(f"FAILED: {failure}")


def _rows(
    form: str, outputs: Mapping[str, Mapping[str, float | None]]
) -> Iterable[tuple[str, ...]]:
    for name, metrics in outputs.items():
        yield (
            form,
            name,
            _number(metrics["rel_l2"], ".3g"),
            snr_text(metrics["snr_db"]),
            _number(metrics["cosine"], ".6f"),
            _number(metrics["max_abs"], ".3g"),
            percent_text(metrics.get("label_agreement")),
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def snr_text(value: float | None) -> str:
    """Decibels; equal outputs have no noise to speak of."""
    return "exact" if value is None or value == float("inf") else f"{value:.1f} dB"
