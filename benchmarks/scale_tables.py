"""The tables about large models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from page_parts import markdown, read

__all__ = ["large_models"]

_NAMES = {
    "plain": "4 bits", "ratio": "`--ratio 8`", "data": "4 bits, `--data`",
    "lowrank": "`--method lowrank --ratio 8`", "prune": "4 bits, `--prune-ratio 0.2`",
    "verify": "`verify`", "expand": "`expand`", "killed": "killed with `--data`",
}  # fmt: skip


# Length of a window of --data.
_TOKENS = 256


def large_models() -> Iterator[str]:
    """Time and memory of the compiler."""
    results = read("scale")
    rows = results["rows"]
    yield (
        "Decoders with random weights, compiled without verification, which has rows of its own:\n"
        "processor time of one thread, weights per second of it, and the peak of resident memory,\n"
        "of the whole process and of its phases, on a machine that did other things as well\n"
        f"(`benchmarks/bench_scale.py`, {results['processor']}).\n"
        "The largest tensor of the model of 1 GB takes 0.20 GB in float32, that of 4 GB 0.26 GB,\n"
        "and that of 0.9 GB, one layer of a model of 13 GB with its table and head, 0.52 GB.\n"
        "`verify` runs whole sessions where nothing else is said." + _windows(rows) + _killed(rows)
    )
    cells = [
        (
            f"{row['model_bytes'] / 1e9:.1f} GB, {row['type']}",
            _NAMES[row["command"]] + _limit(row),
            f"{row['cpu_seconds']:.0f} s",
            f"{row['weights'] / 1e6 / row['cpu_seconds']:.1f} M",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            ", ".join(
                f"{name} {phase['cpu_seconds']:.0f} s, {phase['peak_rss_bytes'] / 1e9:.2f} GB"
                for name, phase in row["phases"].items()
                if phase["cpu_seconds"] >= 1
            ),
        )
        for row in rows
        if row["command"] != "killed"
    ]
    yield markdown(("model", "what", "CPU", "weights / CPU s", "peak", "phases"), cells)
    yield (
        "Computed from these rows and not measured: processor time grows with the weights, memory\n"
        "beyond that of the process with the largest tensor. Empty is what follows another law.\n"
    )
    cells = [
        (
            row["model"],
            _NAMES[row["command"]] + (", layer by layer" if row["command"] == "verify" else ""),
            f"{row['cpu_seconds'] / 60:.0f} min",
            "" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 1e9:.1f} GB",
        )
        for row in sorted(results["expected"], key=lambda row: str(row["model"]) != "7B")
    ]
    yield markdown(("model", "what", "CPU", "peak"), cells)
    yield from _workers()


def _workers() -> Iterator[str]:
    """One process and workers of Dask."""
    results = read("scale_workers")
    rows = [row for row in results["rows"] if row.get("command", "plain") == "plain"]
    loads = [load for row in rows for load in row["load_of_each"]]
    yield (
        "One process and two workers of Dask at 4 bits, in turns, medians; the outputs are the\n"
        "same. The wall clock says little here: two cores had a load of "
        f"{min(loads):.0f} to {max(loads):.0f}, most of it other\n"
        "work. The last column is computed: what the client and the busiest worker took, one\n"
        "after the other, which is about the most that a run takes on a machine of its own\n"
        f"(`benchmarks/bench_scale.py --workers`, {results['processor']}).\n"
    )
    cells = [
        (
            f"{row['size']} GB",
            row["way"],
            f"{row['wall_seconds']:.0f} s",
            f"{row['cpu_seconds']:.1f} s",
            _busy(row),
            f"{row['path_seconds']:.1f} s" if _busy(row) else "",
        )
        for row in rows
    ]
    yield markdown(("model", "how", "wall", "CPU", "CPU of workers", "client and worker"), cells)
    yield from _calibrated_on_workers(
        [row for row in results["rows"] if row not in rows], results["processor"]
    )


def _calibrated_on_workers(rows: Sequence[Mapping[str, Any]], processor: str) -> Iterator[str]:
    """One process and workers of Dask with --data."""
    if not rows:
        return
    windows = sorted({row["windows"] for row in rows})
    yield (
        f"The same with `--data`, {' and '.join(map(str, windows))} windows of {_TOKENS} tokens: "
        "the outputs are the same, too.\nGroups of weights wait for one another, so two columns "
        "are computed: what the client and\nthe busiest worker took, and what the client took and "
        "behind it the longest calls of each\nstage, which is about what a run takes on a machine "
        f"of its own ({processor}).\n"
    )
    cells = [
        (
            f"{row['size']} GB",
            row["way"],
            f"{row['cpu_seconds']:.1f} s",
            _busy(row),
            f"{row['path_seconds']:.1f} s" if _busy(row) else "",
            f"{row['staged_path_seconds']:.1f} s" if _busy(row) else "",
        )
        for row in rows
    ]
    heads = ("model", "how", "CPU", "CPU of workers", "client and worker", "client and stages")
    yield markdown(heads, cells)


def _busy(row: Mapping[str, Any]) -> str:
    parts = [part for part in row["worker_cpu_seconds"] if part]
    return ", ".join(f"{sum(own) / len(own):.1f} s" for own in zip(*parts, strict=True))


def _windows(rows: list[dict[str, Any]]) -> str:
    found = sorted({row["windows"] for row in rows if row["command"] == "data"})
    if not found:
        return "\n"
    return f" `--data` had {' or '.join(map(str, found))} windows\nof {_TOKENS} tokens.\n"


def _killed(rows: list[dict[str, Any]]) -> str:
    """What became of runs that were killed."""
    found = [row for row in rows if row["command"] == "killed"]
    return "".join(
        f"Runs with `--data` on {row['model_bytes'] / 1e6:.0f} MB were killed at "
        f"{sum(run['code'] != 0 for run in row['runs'])} random moments:\n"
        "the last one wrote the bytes of a run that nobody disturbed, and left no other files.\n"
        for row in found
    )


def _limit(row: Mapping[str, Any]) -> str:
    if "memory" not in row:
        return ""
    return f", {row['memory'].replace('GB', ' GB')} to take: " + (
        "layer by layer" if row["layer_by_layer"] else "whole sessions"
    )
