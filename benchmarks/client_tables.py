"""The table of docs/clients.md, from ``results/clients.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from page_parts import markdown, read, share

__all__ = ["clients", "hub"]


def clients() -> Iterator[str]:
    """Packages, each run by its own pipeline with the compressed file in its place."""
    rows = [row for client in read("clients")["rows"] for row in _rows(client)]
    yield (
        "Answers are those on inputs that were not recorded; boxes count as the same with the\n"
        "same class and an overlap of half or more (F1). Load is CPU time to open the pipeline,\n"
        "memory what the process grows by then, and at most: `benchmarks/bench_clients.py`.\n"
    )
    columns = (
        "package", "setting", "form", "models", "same answers", "right", "load", "memory", "peak",
    )  # fmt: skip
    yield markdown(columns, rows)


def hub() -> Iterator[str]:
    """Libraries around the Hugging Face hub."""
    yield (
        "MiniLM at 4 bits, packaged by `package hf`, through the snippets of its README. The\n"
        "difference is 1 - cosine from vectors of a session with the library, which rounds\n"
        "activations to int8; the definitions inside the file do not: `benchmarks/bench_hub.py`.\n"
    )
    columns = ("package", "version", "form", "result")
    names = {"portable": "portable", "with_library": "library, by `onnxcomp exec`"}
    rows = [
        (entry["library"], entry["version"], name, _outcome(entry[form]))
        for entry in read("hub")["rows"]
        for form, name in names.items()
        if form in entry
    ]
    yield markdown(columns, rows)


def _outcome(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return f"difference {max(0.0, result['difference']):.0e}"


def _rows(client: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    settings = client["settings"]
    first = next(iter(settings.values()))["compiled"]
    name = f"{client['client']} {client['versions'][client['client']]}"
    what = f"{client['count']} {client['answers']}"
    before = sum(entry.get("bytes_before", 0) for entry in first)
    yield (f"{name}: {what}", "dense", "", f"{before / 1e6:.2f} MB", *_cells(client["dense"]))
    for setting, results in sorted(settings.items()):
        size = sum(entry.get("bytes", 0) for entry in results["compiled"])
        for form in ("library", "portable"):
            yield ("", setting, form, f"{size / 1e6:.2f} MB", *_cells(results[form]))


def _cells(result: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in result:
        return ("failed", "", "", "", "")
    return (
        share(result["same"]),
        share(result["right"]) if "right" in result else "",
        f"{result['load_s']:.2f} s",
        f"{result['load_bytes'] / 1e6:.0f} MB",
        f"{result['load_peak_bytes'] / 1e6:.0f} MB",
    )
