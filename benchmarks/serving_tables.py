"""The tables of docs/serving.md, from ``results/sessions.json`` and ``results/services.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from page_parts import RESULTS, markdown, read

__all__ = ["services", "sessions"]


def sessions() -> Iterator[str]:
    """Memory of several sessions."""
    found = read("sessions")["rows"]
    yield (
        f"Memory of one session and of {found[0]['count']}, each after one run. PSS is what the\n"
        "machine has less because of them, RSS counts a page for each mapping. Codes are the\n"
        "pages of the data file. What else a session takes is its graph and its activations:\n"
        "`benchmarks/bench_sessions.py`.\n"
    )
    columns = ("model", "set-up", "codes, PSS", "codes, RSS", "all, PSS", "all, RSS")
    yield markdown(columns, [_row(row) for row in found])


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    keys = ("codes_pss", "codes_rss", "pss", "rss")
    cells = (_change(row["one"][key], row["many"][key]) for key in keys)
    return (row["model"], row["setup"], *cells)


def _change(one: int, many: int) -> str:
    return f"{one / 1e6:.1f} → {many / 1e6:.1f} MB" if many else "in the heap"


def services() -> Iterator[str]:
    """Servers of Python."""
    if not (RESULTS / "services.json").is_file():
        return
    yield (
        "Each server in an environment of its own, started by its own command, with the demo's\n"
        "model, and asked when its health check answers: 16 requests one by one, then 16 at once.\n"
        "Answers are compared with those of a session: `benchmarks/bench_services.py`.\n"
    )
    columns = ("kind", "version", "runs for 32 requests", "largest batch", "largest difference")
    yield markdown(columns, [_service(row) for row in read("services")["rows"]])


def _service(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["service"], row.get("version", ""), row["failed"], "", "")
    counts = (str(row[key]) for key in ("runs", "largest_batch"))
    return (row["service"], row["version"], *counts, f"{row['largest_error']:.1g}")
