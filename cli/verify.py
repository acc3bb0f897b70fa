"""`onnxcomp verify`: compare a compressed model with its original."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from onnxcomp.cli.options import FILE, OUTPUT, input_options, option_of
from onnxcomp.cli.progress import progress
from onnxcomp.cli.terminal import Terminal, bytes_text, percent_text, with_terminal
from onnxcomp.cli.verdicts import detections_text, judged_text, slice_text, warnings_of

__all__ = ["command", "show_verification"]

# Columns of the table that are there whatever is known.
_ALWAYS = 6


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
    if bisect and tolerance is None:
        raise click.UsageError("--bisect needs --tolerance")
    with progress(terminal, "verifying"):
        if bisect:
            mended = onnxcomp.mend(reference, compressed, output, **settings)
            result, document = mended.verification, mended.to_json()
        else:
            result = onnxcomp.verify(reference, compressed, **settings)
            document = result.to_json()
    show_verification(terminal, document, made_up=not data)
    for name in document.get("bisect", {}).get("blamed", ()):
        terminal.say(f"causes the error: {name}")
    terminal.finish(document, "\n".join([verdict(document, made_up=not data), *_last(document)]))
    if not result.passed:
        raise click.exceptions.Exit(onnxcomp.errors.VerifyError.exit_code)


def _last(document: Mapping[str, Any]) -> list[str]:
    """What is said last: warnings, and the model that was written."""
    found = document.get("bisect", {})
    if found.get("path") is None:
        return warnings_of(document)
    count = len(found["blamed"])
    what = f"{count} {'weight' if count == 1 else 'weights'} dense again"
    return [*warnings_of(document), f"wrote {found['path']}: {bytes_text(found['bytes'])}, {what}"]


def verdict(document: Mapping[str, Any], *, made_up: bool = False) -> str:
    """One line: what was judged, and how close the worst output is to the original."""
    if not document["passed"]:
        return "FAILED"
    differences = [metrics["rel_l2"] for metrics in document["outputs"].values()]
    known = [value for value in differences if value is not None]
    worst = f", relative difference to the original at most {max(known):.3g}" if known else ""
    samples = document["samples"]
    on = f"{samples} {'input' if samples == 1 else 'inputs'}{worst}"
    return f"{judged_text(document, made_up=made_up)}: {on}"


def show_verification(terminal: Terminal, document: Mapping[str, Any], *, made_up: bool) -> None:
    """Print the differences of every output, with the library and without.

    Args:
        terminal: Where to print.
        document: JSON of the verification.
        made_up: Whether its inputs were made up; then it says that real ones tell more.
    """
    forms = (("library", document), ("portable", document["portable"]))
    rows = [row for form, part in forms for row in _rows(form, part.get("outputs", {}))]
    inner = (("before a decision", part.get("before_decisions", {})) for _, part in forms[:1])
    rows += [row for form, part in inner for row in _rows(form, part)]
    added = document.get("int8", {}).get("outputs", {})
    rows += _rows("int8 alone", added)
    columns = [*("form", "output", "relative L2", "SNR", "cosine", "max abs")]
    columns += ["worst slice", "at", "same class"]
    told = [i for i in range(len(columns)) if i < _ALWAYS or any(row[i] != "-" for row in rows)]
    columns, rows = [columns[i] for i in told], [tuple(row[i] for i in told) for row in rows]
    if rows:
        terminal.table(columns, rows, left=2)
    if rows and made_up:
        terminal.say("inputs were made up: give real ones with --data to know the real loss")
    for name, found in document["outputs"].items():
        if found.get("resized"):
            terminal.say(f"loss: output {name!r} has {found['resized']}")
    if detections := detections_text(document.get("detections")):
        terminal.say(detections)
    for failure in document["failures"]:
        terminal.say(f"FAILED: {failure}")


def _rows(form: str, outputs: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    for name, metrics in outputs.items():
        yield (
            form,
            name,
            _number(metrics["rel_l2"], ".3g"),
            snr_text(metrics["snr_db"]),
            _number(metrics["cosine"], ".6f"),
            _number(metrics["max_abs"], ".3g"),
            _number((metrics.get("worst_slice") or {}).get("rel_l2"), ".3g"),
            slice_text(metrics.get("worst_slice")),
            percent_text(metrics.get("label_agreement")),
        )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def snr_text(value: float | None) -> str:
    """Decibels; equal outputs have no noise to speak of."""
    return "exact" if value is None or value == float("inf") else f"{value:.1f} dB"
