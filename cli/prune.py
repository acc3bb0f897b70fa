"""Pruning on the command line: tables of what can go and what went."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.cli.terminal import bytes_text, percent_text

if TYPE_CHECKING:
    from onnxcomp.cli.terminal import Terminal

__all__ = [
    "groups_verdict",
    "prune_text",
    "show_division",
    "show_groups",
    "show_pruned",
]


def show_pruned(terminal: Terminal, pruned: Mapping[str, Any]) -> None:
    """Print what was taken out where, and what that saves."""
    rows = [
        (group["name"], group["kind"], str(group["before"]), str(group["after"]))
        for group in pruned["groups"]
    ]
    if rows:
        terminal.table(("made by", "kind", "before", "after"), rows, left=2)
    before, after = pruned["before"], pruned["after"]
    labels = {"parameters": "parameters", "flops": "FLOPs", "cache_bytes": "cache bytes a position"}
    parts = [
        f"{label} {before[key]:,} -> {after[key]:,}" for key, label in labels.items() if before[key]
    ]
    terminal.say("; ".join(parts))
    for change in pruned["inputs"]:
        terminal.say(f"{change['name']} changes from {change['before']} to {change['after']}")
    if pruned["calibrated"]:
        fitted = [fit for fit in pruned["fits"] if fit["used"] != "mask"]
        text = f"{len(fitted)} of {len(pruned['fits'])} products were fitted to the data"
        if pruned["norms"]:
            moved = [norm for norm in pruned["norms"] if norm["used"] != "stored"]
            text += f", statistics of {len(moved)} of {len(pruned['norms'])} normalisations too"
        terminal.say(text)
        searched = pruned.get("searched")
        if searched is not None:
            terminal.say(
                f"{searched['tried']} other divisions between layers were tried: loss of the "
                f"outputs {searched['before']:.3g} -> {searched['after']:.3g}"
            )
        tuned = pruned.get("tuned")
        if tuned is not None and tuned["passes"]:
            terminal.say(
                f"all weights were tuned together: loss on samples set aside "
                f"{tuned['before']:.3g} -> {tuned['after']:.3g}"
            )
    else:
        terminal.say("no --data: norms of weights decided what to prune, and nothing was fitted")


def show_division(terminal: Terminal, division: Sequence[Mapping[str, Any]]) -> None:
    """Print which shares of pruning were tried for a size, and what is expected of each."""
    rows = [
        (
            "taken" if trial is division[0] else "",
            f"{100 * trial['share']:.3g} %",
            bytes_text(trial["bytes"]) + ("" if trial["met"] else ", too many"),
            percent_text(trial["pruning"]),
            percent_text(trial["codes"]),
        )
        for trial in division
    ]
    columns = ("", "pruned", "bytes", "error of pruning", "expected of codes")
    if rows:
        terminal.table(columns, rows, left=1)
        if division[0]["share"] == 0.0:
            terminal.say("nothing is pruned: at this size the codecs alone lose less")


def prune_text(pruned: Mapping[str, Any] | None) -> list[str]:
    """How much was pruned, for the verdict; nothing where there was no pruning."""
    if pruned is None:
        return []
    what = "parameters" if pruned["unit"] == "parameters" else "FLOPs"
    met = "" if pruned["met"] else f" of {100 * pruned['asked']:.1f} % asked for"
    said = [f"{100 * pruned['reached']:.1f} % of {what} pruned{met}"]
    unit = "parameters" if pruned["unit"] == "parameters" else "flops"
    before, after = (pruned.get(when, {}).get(unit) for when in ("before", "after"))
    if before and after is not None:
        said.append(f"{100 * (1 - after / before):.1f} % of all {what} of the model")
    return said


def show_groups(terminal: Terminal, model: Path) -> dict[str, Any]:
    """Print what pruning could take out of a model; the same as plain values."""
    from onnxcomp.passes.transforms.prune.listing import list_groups

    found = list_groups(model)
    rows = [
        (group["name"], group["kind"], str(group["size"]), f"{group['parameters']:,}")
        for group in found["groups"]
    ]
    if rows:
        terminal.table(("made by", "kind", "size", "parameters of one"), rows, left=2)
    _show_kept(terminal, found["kept"])
    return found


def groups_verdict(found: Mapping[str, Any]) -> str:
    """One line: how much of the model can shrink."""
    if not found["groups"]:
        return "nothing in this model can be pruned"
    share = found["parameters"] / max(1, found["cost"]["parameters"])
    return (
        f"{len(found['groups'])} groups; layers with {found['parameters']:,} parameters "
        f"({100 * share:.0f} %) can shrink"
    )


def _show_kept(terminal: Terminal, kept: Sequence[Mapping[str, str]]) -> None:
    if terminal.verbose:
        rows = [(item["name"], item["reason"]) for item in kept]
        if rows:
            terminal.table(("keeps its channels", "reason"), rows, left=2)
        return
    for reason, count in collections.Counter(item["reason"] for item in kept).most_common():
        terminal.say(f"{count} {'keeps' if count == 1 else 'keep'} all channels: {reason}")
