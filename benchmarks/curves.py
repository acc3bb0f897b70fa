"""Pictures of accuracy against kept parameters, as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

__all__ = ["Line", "Panel", "draw"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 300, 260, 48, 20, 44, 44
LABEL = 36  # least distance of two labels
ENTRY, ROW = 88, 18  # least width of an entry of the legend, and height of a row of it


@dataclasses.dataclass(frozen=True)
class Line:
    """Accuracies of one method.

    Attributes:
        points: Share of the parameters that is kept, and accuracy.
        colour: Of the line.
        dash: Its pattern; empty for none.
    """

    points: Sequence[tuple[float, float]]
    colour: str
    dash: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Lines of one network."""

    title: str
    lines: Sequence[Line]


def _scale(lines: Sequence[Line]) -> tuple[float, float]:
    """Lowest and highest accuracy of a panel, in steps of ten per cent."""
    seen = [accuracy for line in lines for _, accuracy in line.points]
    return math.floor(min(seen) * 10) / 10, math.ceil(max(seen) * 10) / 10


def _percent(kept: float) -> str:
    return f"{kept:.0%}" if kept >= 0.1 else f"{100 * kept:.2g}%"


def _panel(panel: Panel, shares: Sequence[float], left: float) -> list[str]:
    low, high = _scale(panel.lines)

    def x(kept: float) -> float:
        """Place of a share of parameters: logarithmic, all of them on the right."""
        return LEFT + (WIDTH - LEFT - RIGHT) * (1 - math.log(kept) / math.log(shares[-1]))

    def y(accuracy: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - accuracy) / (high - low)

    parts = [f'<g transform="translate({left:.0f} 0)">']
    parts.append(f'<text x="{LEFT}" y="{TOP - 14}" class="t">{panel.title}</text>')
    steps = round((high - low) * 10)
    for step in range(0, steps + 1, max(1, steps // 5)):
        value = low + step / 10
        parts.append(f'<path class="g" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" class="e">{value:.0%}</text>')
    last = math.inf
    for kept in shares:
        if last - x(kept) < LABEL:
            continue
        last = x(kept)
        place = f'x="{x(kept):.1f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {place} class="m">{_percent(kept)}</text>')
    for line in panel.lines:
        points = " ".join(f"{x(kept):.1f},{y(accuracy):.1f}" for kept, accuracy in line.points)
        style = f'stroke="{line.colour}" stroke-dasharray="{line.dash}"'
        parts.append(f'<polyline points="{points}" {style} class="l"/>')
    return [*parts, "</g>"]


def _rows(entries: Mapping[str, tuple[str, str]], width: float) -> int:
    """Rows of a legend."""
    return -(-len(entries) // int((width - LEFT) // ENTRY))


def _legend(entries: Mapping[str, tuple[str, str]], width: float) -> list[str]:
    columns = -(-len(entries) // _rows(entries, width))
    parts = []
    for number, (text, (colour, dash)) in enumerate(entries.items()):
        x = LEFT + number % columns * (width - LEFT) / columns
        y = HEIGHT + number // columns * ROW
        line = f'<path d="M{x:.0f} {y - 6}h24" stroke="{colour}" stroke-dasharray="{dash}"'
        parts.append(f'{line} class="l"/><text x="{x + 30:.0f}" y="{y - 2}">{text}</text>')
    return parts


def draw(
    title: str,
    panels: Sequence[Panel],
    shares: Sequence[float],
    legend: Mapping[str, tuple[str, str]],
) -> str:
    """An SVG with one panel for each network.

    Args:
        title: Above all panels.
        panels: From left to right.
        shares: Kept parameters, labelled below: 1 first, the least last.
        legend: Colour and dash of each entry.
    """
    width = WIDTH * len(panels)
    height = HEIGHT + ROW * (_rows(legend, width) - 1)
    style = (
        "text{font:12px sans-serif;fill:#222}.t{font-weight:bold}.e{text-anchor:end}"
        ".m{text-anchor:middle}.g{stroke:#ddd}.l{fill:none;stroke-width:2}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">',
        f"<title>{title.capitalize()}</title>",
        f"<style>{style}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="16">{title}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, shares, number * WIDTH)
    return "\n".join([*parts, *_legend(legend, width), "</svg>"]) + "\n"
