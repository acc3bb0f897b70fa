"""The picture of bench_lorita.py: accuracy against kept parameters, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["draw"]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 260, 48, 44, 44
COLOURS = {1: "#7a7a7a", 2: "#1f77b4", 3: "#d95f02"}
DASHES = {"local": "2 3", "global": "", "iterative": "7 3"}
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)


def _x(kept: float) -> float:
    """Place of a share of parameters: logarithmic, all of them on the right."""
    return LEFT + (WIDTH - LEFT - 12) * (1 - math.log(kept) / math.log(SHARES[-1]))


def _scale(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Lowest and highest accuracy of a panel, in steps of ten per cent."""
    seen = [row["accuracy"] for row in rows]
    seen += [cut["accuracy"] for row in rows for cut in row["truncated"]]
    return math.floor(min(seen) * 10) / 10, math.ceil(max(seen) * 10) / 10


def _panel(name: str, rows: Sequence[Mapping[str, Any]], left: float) -> list[str]:
    low, high = _scale(rows)

    def y(accuracy: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - accuracy) / (high - low)

    parts = [f'<g transform="translate({left:.0f} 0)">']
    parts.append(f'<text x="{LEFT}" y="{TOP - 14}" class="t">{name}</text>')
    steps = round((high - low) * 10)
    for step in range(0, steps + 1, max(1, steps // 5)):
        value = low + step / 10
        parts.append(f'<path class="g" d="M{LEFT} {y(value):.1f}H{WIDTH - 12}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" class="e">{value:.0%}</text>')
    for kept in SHARES:
        place = f'x="{_x(kept):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {place} class="m">{kept:.0%}</text>')
    for row in rows:
        for mode, dash in DASHES.items():
            cuts = [cut for cut in row["truncated"] if cut["mode"] == mode]
            points = [(1.0, row["accuracy"]), *((c["kept"], c["accuracy"]) for c in cuts)]
            line = " ".join(f"{_x(k):.1f},{y(a):.1f}" for k, a in points)
            style = f'stroke="{COLOURS[row["factors"]]}" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{line}" {style} class="l"/>')
    return [*parts, "</g>"]


def _legend(width: float) -> list[str]:
    entries = [(f"N = {n}", colour, "") for n, colour in COLOURS.items()]
    entries += [(mode, "#444", dash) for mode, dash in DASHES.items()]
    parts = []
    for number, (text, colour, dash) in enumerate(entries):
        x = LEFT + number * (width - LEFT) / len(entries)
        line = f'<path d="M{x:.0f} {HEIGHT - 6}h24" stroke="{colour}" stroke-dasharray="{dash}"'
        parts.append(f'{line} class="l"/><text x="{x + 30:.0f}" y="{HEIGHT - 2}">{text}</text>')
    return parts


def draw(results: Sequence[Mapping[str, Any]]) -> str:
    """An SVG with one panel for each network.

    Args:
        results: What bench_lorita.py records.
    """
    names = list(dict.fromkeys(row["network"] for row in results))
    width = WIDTH * len(names)
    style = (
        "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.e{text-anchor:end}"
        ".m{text-anchor:middle}.g{stroke:#ddd}.l{fill:none;stroke-width:2}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}">',
        "<title>Test accuracy against kept parameters of linear layers</title>",
        f"<style>{style}</style>",
        f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16">test accuracy against kept parameters of linear layers</text>',
    ]
    for number, name in enumerate(names):
        rows = [row for row in results if row["network"] == name]
        parts += _panel(name, rows, number * WIDTH)
    return "\n".join([*parts, *_legend(width), "</svg>"]) + "\n"
