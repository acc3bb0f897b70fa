"""`onnxcomp inspect`: what is in a model."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxcomp.cli.options import FILE, option_of
from onnxcomp.cli.prune import groups_verdict, show_groups
from onnxcomp.cli.terminal import Terminal, bytes_text, with_terminal

if TYPE_CHECKING:
    from onnxcomp.passes.report.inspect import CompressedWeight, Difference, Inspection, Interface

__all__ = ["command"]

# Operators shown without --verbose.
_MOST_COMMON = 12


@click.command("inspect")
@click.argument("model", type=FILE)
@click.option("--diff", "other", type=FILE, help="Show what is different in this other model.")
@option_of("min_size", help="Smallest tensor that counts as compressible.")
@click.option("--groups", is_flag=True, help="Show what pruning could take out, and why other "
              "channels stay. Runs the model on made-up inputs.")  # fmt: skip
@with_terminal
def command(
    terminal: Terminal, model: Path, other: Path | None, min_size: int, groups: bool
) -> None:
    """Show what is in a model: interface, operators, and every tensor with its uses and bytes.

    For a compressed model also how each weight is stored. Tensors that cannot be compressed are
    listed with the reason, with -v one by one.
    """
    from onnxcomp.passes.report.inspect import diff, inspect_model

    if groups:
        listed = show_groups(terminal, model)
        terminal.finish(listed, groups_verdict(listed))
        return
    found = inspect_model(model, min_size=min_size)
    if other is None:
        show_inspection(terminal, found)
        terminal.finish(found.to_json(), verdict(found))
        return
    difference = diff(found, inspect_model(other, min_size=min_size))
    show_difference(terminal, difference)
    before, after = difference.bytes
    ratio = f"{before / max(after, 1):.2f}x"
    same = "differs" if difference.interface else "is the same"
    text = f"{bytes_text(before)} -> {bytes_text(after)} ({ratio}); the interface {same}"
    terminal.finish(difference.to_json(), text)


def show_inspection(terminal: Terminal, found: Inspection) -> None:
    """Print a model's interface, its operators and its tensors."""
    opsets = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in found.opsets.items())
    terminal.say(f"opsets: {opsets}; IR {found.ir_version}; written by {found.producer or '?'}")
    terminal.say(f"inputs: {interface_text(found.inputs)}")
    terminal.say(f"outputs: {interface_text(found.outputs)}")
    terminal.say(f"operators: {operators_text(found.operators, all_of_them=terminal.verbose)}")
    for note in found.notes:
        terminal.say(f"note: {note}")
    show_tensors(terminal, found)


def _stored(weight: CompressedWeight) -> str:
    """How a weight is stored, with the kind of its codes where the settings do not say it."""
    from onnxcomp.cli.tables import stored_text

    text = stored_text(weight.codec, weight.params)
    return text if weight.kind in ("", *weight.params.values()) else f"{text}, {weight.kind}"


def interface_text(values: Iterable[Interface]) -> str:
    """Inputs or outputs: ``ids int64 [batch, 128]``."""
    parts = []
    for value in values:
        dims = "?" if value.shape is None else ", ".join(str(dim) for dim in value.shape)
        parts.append(f"{value.name} {value.dtype or '?'} [{dims}]")
    return "; ".join(parts) or "none"


def operators_text(operators: Mapping[str, int], *, all_of_them: bool) -> str:
    """Operators with their number, the most common first."""
    shown = list(operators.items())[: None if all_of_them else _MOST_COMMON]
    more = len(operators) - len(shown)
    parts = [f"{name} {count}" for name, count in shown] + ([f"{more} others"] if more else [])
    return ", ".join(parts) or "none"


def show_tensors(terminal: Terminal, found: Inspection) -> None:
    """Print weights, compressed or not, and what cannot be compressed."""
    from onnxcomp.cli.tables import shape_text, show_reasons, uses_text

    if found.compressed:
        stored = [
            (
                weight.name,
                f"{weight.dtype} {shape_text(weight.shape)}",
                uses_text(weight.operators),
                _stored(weight),
                bytes_text(weight.bytes_before),
                bytes_text(weight.bytes_after),
            )
            for weight in found.compressed
        ]
        columns = ("compressed", "was", "use", "stored as", "before", "after")
        terminal.table(columns, stored, left=4, spare=("use", "was"))
        terminal.say(f"shared by them: {bytes_text(found.shared_bytes)}")
    if found.sites:
        dense = [
            (
                site.name,
                f"{site.dtype} {shape_text(site.shape)}",
                uses_text(use.op_type for use in site.uses),
                bytes_text(site.nbytes),
            )
            for site in found.sites
        ]
        terminal.table(("weight", "type", "use", "bytes"), dense, left=3)
    if terminal.verbose and found.skipped:
        others = [(t.name, t.dtype, t.reason, bytes_text(t.bytes)) for t in found.skipped]
        terminal.table(("other tensor", "type", "reason", "bytes"), others, left=3)
        return
    reasons = collections.defaultdict(list)
    for tensor in found.skipped:
        reasons[tensor.reason].append(tensor.bytes)
    show_reasons(terminal, "not compressible", reasons)


def show_difference(terminal: Terminal, difference: Difference) -> None:
    """Print what differs between two models."""
    for line in difference.interface:
        terminal.say(f"interface: {line}")
    changes = [("opset", key or "ai.onnx", pair) for key, pair in difference.opsets.items()]
    counts = [("operator", key, pair) for key, pair in difference.operators.items()]
    stored = [("weight", key, pair) for key, pair in difference.weights.items()]
    rows = [
        (kind, name, *("-" if value is None else str(value) for value in pair))
        for kind, name, pair in (*changes, *counts, *stored)
    ]
    if rows:
        terminal.table(("what", "name", "first", "second"), rows, left=4)


def verdict(found: Inspection) -> str:
    """One line: how much there is, and how much of it can be compressed."""
    count = len(found.sites)
    noun = "weight" if count == 1 else "weights"
    text = f"{bytes_text(found.bytes)}, {count} {noun} of {bytes_text(found.site_bytes)}"
    text += " can be compressed"
    if found.compressed:
        before = sum(weight.bytes_before for weight in found.compressed)
        after = sum(weight.bytes_after for weight in found.compressed)
        verb = "is" if len(found.compressed) == 1 else "are"
        text += f"; {len(found.compressed)} {verb}: {bytes_text(before)} -> {bytes_text(after)}"
    return text
