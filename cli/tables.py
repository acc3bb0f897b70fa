"""Rows about weights, as `plan`, `optimize` and `inspect` show them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxcomp.cli.terminal import Terminal, bytes_text

if TYPE_CHECKING:
    from onnxcomp.passes.report import SiteReport

__all__ = ["shape_text", "show_reasons", "show_sites", "stored_text", "uses_text"]

COLUMNS = ("tensor", "shape", "use", "stored as", "mode", "before", "after", "ratio", "error")


def show_sites(
    terminal: Terminal, sites: Iterable[SiteReport], predicted: Mapping[str, float]
) -> None:
    """Print one line for each compressed weight, and the others in groups by reason.

    Args:
        terminal: Where to print; with its `verbose`, every tensor has its own line.
        sites: What became, or would become, of each weight.
        predicted: Expected errors by name, for weights whose error was not measured.
    """
    rows: list[SiteReport] = []
    kept: list[SiteReport] = []
    for site in sites:
        shown = terminal.verbose or not site.reason
        (rows if shown else kept).append(site)
    if rows:
        cells = [_cells(site, predicted.get(site.name)) for site in rows]
        terminal.table(COLUMNS, cells, left=5, spare=("ratio", "mode", "shape", "use"))
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


def _cells(site: SiteReport, predicted: float | None) -> tuple[str, ...]:
    error = site.weight_error
    mark = "" if error is not None else "~"
    error = predicted if error is None else error
    return (
        site.name,
        shape_text(site.shape),
        uses_text(site.uses),
        site.reason or stored_text(site.method, site.params),
        site.mode or "-",
        bytes_text(site.bytes_before),
        bytes_text(site.bytes_after),
        f"{site.bytes_before / max(1, site.bytes_after):.2f}x",
        "-" if site.reason or error is None else f"{mark}{100 * error:.2f} %",
    )


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
