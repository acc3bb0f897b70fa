"""The table about archives."""

from __future__ import annotations

from collections.abc import Iterator

from page_parts import markdown, read

__all__ = ["archives"]


def archives() -> Iterator[str]:
    """Sizes of archives beside the files that they hold."""
    results = read("archive")
    yield (
        "Archives of dense models, and of models compressed without data: bytes of the archive,\n"
        "over those of the model's files, the same by xz for the files as they are, and processor\n"
        "time to write and to restore. What comes back is compared byte by byte\n"
        f"(`benchmarks/bench_archive.py`, {results['processor']}).\n"
    )
    rows = [
        (
            row["model"],
            "dense" if row["bits"] is None else f"{row['bits']} bits",
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['archive'] / 1e6:.2f} MB",
            *(f"{100 * row[key] / row['bytes']:.1f} %" for key in ("archive", "xz")),
            *(f"{row[key]:.1f} s" for key in ("write_seconds", "restore_seconds")),
        )
        for row in results["runs"]
    ]
    columns = ("model", "form", "files", "archive", "of the files", "by xz", "write", "restore")
    yield markdown(columns, rows)
