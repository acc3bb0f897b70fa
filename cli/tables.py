"""Rows about weights, as `plan`, `optimize` and `inspect` show them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.cli.terminal import Terminal, bytes_text

if TYPE_CHECKING:
    from onnxcomp.passes.planning.candidates import Choice
    from onnxcomp.passes.report.report import SiteReport

__all__ = ["shape_text", "show_reasons", "show_sites", "stored_text", "uses_text"]

COLUMNS = (
    *("tensor", "shape", "use", "stored as", "mode", "before", "after", "ratio"),
    *("error", "output error", "time"),
)

# Columns that are left away where nothing is known.
_OPTIONAL = ("output error", "time")


def show_sites(
    terminal: Terminal, sites: Iterable[SiteReport], planned: Mapping[str, Choice]
) -> None:
    """Print one line for each compressed weight, and the others in groups by reason.

    Args:
        terminal: Where to print; with its `verbose`, every tensor has its own line.
        sites: What became, or would become, of each weight.
        planned: Decisions by name, with what was expected of weights that were not measured.
    """
    rows: list[SiteReport] = []
    kept: list[SiteReport] = []
    for site in sites:
        shown = terminal.verbose or site.compressed
        (rows if shown else kept).append(site)
    if rows:
        cells = [_cells(site, planned.get(site.name)) for site in rows]
        columns = [number for number, name in enumerate(COLUMNS) if _told(name, number, cells)]
        terminal.table(
            [COLUMNS[number] for number in columns],
            [[row[number] for number in columns] for row in cells],
            left=5,
            spare=[
                name
                for name in ("ratio", "mode", "shape", "use", "time")
                if COLUMNS.index(name) in columns
            ],
        )
    for site in rows:
        if _has_rival(site.method) and site.note:
            terminal.say(f"{site.name}: {site.note}")
    reasons: dict[str, list[int]] = collections.defaultdict(list)
    for site in kept:
        reasons[site.reason].append(site.bytes_before)
    show_reasons(terminal, "as they are", reasons)


def show_reasons(terminal: Terminal, what: str, reasons: Mapping[str, Sequence[int]]) -> None:
    """Print one line for each reason, most bytes first.

    Args:
        terminal: Where to print.
        what: What these tensors are.
        reasons: Bytes of the tensors by reason.
    """
    for reason, sizes in sorted(reasons.items(), key=lambda item: -sum(item[1])):
        noun = "tensor" if len(sizes) == 1 else "tensors"
        terminal.say(f"{what}: {len(sizes)} {noun}, {bytes_text(sum(sizes))}: {reason}")


def _told(name: str, number: int, cells: Sequence[Sequence[str]]) -> bool:
    return name not in _OPTIONAL or any(row[number] != "-" for row in cells)


def _cells(site: SiteReport, planned: Choice | None) -> tuple[str, ...]:
    expected = (None, None) if planned is None else (planned.error, planned.output_error)
    time = planned.time if planned is not None and site.compressed else None
    return (
        site.name,
        shape_text(site.shape),
        uses_text(site.uses),
        stored_text(site.method, site.params) if site.compressed else site.reason,
        site.mode or "-",
        bytes_text(site.bytes_before),
        bytes_text(site.bytes_after),
        f"{site.bytes_before / max(1, site.bytes_after):.2f}x",
        _error_text(site.weight_error, expected[0]) if site.compressed else "-",
        _error_text(site.output_error, expected[1]) if site.compressed else "-",
        "-" if time is None else f"{1e3 * time:+.3g} ms",
    )


def _has_rival(codec: str) -> bool:
    """Whether a codec is compared with another one, weight by weight."""
    from onnxcomp.passes.codecs import CODECS

    return codec in CODECS and CODECS[codec].fallback is not None


def _error_text(measured: float | None, expected: float | None) -> str:
    """An error in percent, with a tilde in front where it is expected only."""
    error, mark = (expected, "~") if measured is None else (measured, "")
    return "-" if error is None else f"{mark}{100 * error:.2f} %"


def shape_text(shape: Iterable[int]) -> str:
    """A shape for people: ``384x1536``."""
    return "x".join(str(dim) for dim in shape) or "scalar"


def uses_text(uses: Iterable[str]) -> str:
    """Operators with their number: ``Gather, MatMul x2``."""
    counts = collections.Counter(uses)
    parts = [name if count == 1 else f"{name} x{count}" for name, count in counts.items()]
    return ", ".join(parts) or "-"


def stored_text(codec: str, params: Mapping[str, Any]) -> str:
    """Codec and parameters, the first one and those that are not the default: ``hyper bits=4``."""
    from onnxcomp.passes.codecs import CODECS

    usual = CODECS[codec].params_type().to_json() if codec in CODECS else {}
    first = next(iter(params), None)
    shown = [f"{k}={v}" for k, v in params.items() if k == first or usual.get(k) != v]
    return " ".join([codec, *shown])
