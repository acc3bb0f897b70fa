"""Pictures made of characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["scatter"]


def scatter(
    points: Sequence[tuple[float, float, str]],
    *,
    width: int = 64,
    height: int = 16,
    labels: tuple[str, str] = ("", ""),
) -> list[str]:
    """Points on logarithmic axes.

    Args:
        points: Horizontal and vertical position, both positive, and the character to draw. Later
            points cover earlier ones.
        width: Columns of the picture.
        height: Its lines.
        labels: What the ends of the horizontal axis are called.

    Returns:
        Lines of text; none where there are fewer than two points.
    """
    shown = [(math.log(x), math.log(y), mark) for x, y, mark in points if x > 0 and y > 0]
    if len(shown) < 2:
        return []
    left, right = min(x for x, _, _ in shown), max(x for x, _, _ in shown)
    low, high = min(y for _, y, _ in shown), max(y for _, y, _ in shown)
    cells = [[" "] * width for _ in range(height)]
    for x, y, mark in shown:
        column = round((x - left) / max(right - left, 1e-9) * (width - 1))
        line = round((high - y) / max(high - low, 1e-9) * (height - 1))
        cells[line][column] = mark
    ends = {0: f"{100 * math.exp(high):.3g} %", height - 1: f"{100 * math.exp(low):.3g} %"}
    margin = max(map(len, ends.values()))
    lines = [
        f"{ends.get(number, '').rjust(margin)} |{''.join(row)}".rstrip()
        for number, row in enumerate(cells)
    ]
    foot = labels[0] + labels[1].rjust(width - len(labels[0]))
    return [*lines, " " * margin + " +" + "-" * width, " " * (margin + 2) + foot]
