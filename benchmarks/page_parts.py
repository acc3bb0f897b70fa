"""What the tables of all pages are made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "ROOT", "decibels", "markdown", "read", "share", "show_or_write"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """One result file."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]]) + "\n"


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; without noise there is none."""
    return "exact" if value is None else f"{value:.1f} dB"


def share(value: float | None) -> str:
    """A share in percent; empty where there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def show_or_write(tables: str, page: Path, put_into: Callable[[str], str]) -> None:
    """What a script of one page does: print its tables, or put them there with ``--write``."""
    if "--write" in sys.argv[1:]:
        page.write_text(put_into(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables)
