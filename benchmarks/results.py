"""What all benchmark scripts share: running the compiler, printing a table, writing the JSON."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["compile_model", "environment", "print_table", "write_results"]

RESULTS = Path(__file__).parent / "results"


def compile_model(model: Path, output: Path, *options: str) -> dict[str, Any]:
    """Run ``onnxcomp optimize`` in a process of its own.

    Returns:
        Its JSON object with `exit_code` added.
    """
    command = [sys.executable, "-m", "onnxcomp", "optimize", str(model), "-o", str(output)]
    run = subprocess.run(
        [*command, *options, "--force", "--json", "--quiet"], capture_output=True, text=True
    )
    try:
        document: dict[str, Any] = json.loads(run.stdout)
    except json.JSONDecodeError:
        raise SystemExit(f"{' '.join(command)} printed no JSON:\n{run.stderr}") from None
    return {**document, "exit_code": run.returncode}


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    names = ("onnxcomp", "onnxruntime", "onnx", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines), flush=True)


def without_infinities(value: Any) -> Any:
    """The value with infinite floats replaced by None, as strict JSON wants it."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_infinities(item) for item in value]
    return None if value in (math.inf, -math.inf) else value


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = without_infinities({"environment": environment(), **results})
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path
