"""The picture of the README: size against loss of a language model, ours and other methods.

python benchmarks/readme_tables.py --write draws it anew from ``benchmarks/results``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from page_parts import ROOT, read

__all__ = ["PICTURE", "draw"]

PICTURE = ROOT / "docs" / "size_loss.svg"

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 34, 62, 54
SIZES = (1.25, 3.55)  # megabytes at both ends of the axis
LOSSES = (0.002, 1.0)  # nats at both ends of the axis, logarithmic
LOSS_TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# Colours of light and dark pages; the picture has a background of its own, so that it can be read
# on a page of either kind.
STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.title{font-size:15px;font-weight:600}.dim{fill:#59636e}.end{text-anchor:end}.mid{text-anchor:middle}
.card{fill:#ffffff;stroke:#d1d9e0}.grid{stroke:#e4e8ec}.line{fill:none;stroke-width:2.2}
.calibrated{stroke:#0a66c2;fill:#0a66c2}.plain{stroke:#4a9de0;fill:#4a9de0}
.gptq{stroke:#c2570a;fill:#c2570a}.rtn{stroke:#6e7781;fill:#6e7781}
.hqq{stroke:#8250df;fill:#8250df}.kquant{stroke:#1a7f37;fill:#1a7f37}
path.line,.ring{fill:none}.ring{stroke-width:2}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.dim{fill:#9198a1}.card{fill:#0d1117;stroke:#3d444d}.grid{stroke:#262c34}
.calibrated{stroke:#58a6ff;fill:#58a6ff}.plain{stroke:#9ecbff;fill:#9ecbff}
.gptq{stroke:#f0883e;fill:#f0883e}.rtn{stroke:#9198a1;fill:#9198a1}
.hqq{stroke:#bc8cff;fill:#bc8cff}.kquant{stroke:#56d364;fill:#56d364}
path.line,.ring{fill:none}}
"""


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one method.

    Attributes:
        label: Its name in the legend.
        style: Class of its line and its marks.
        rows: Names of rows in the result file, from small files to large ones.
        notes: What is written beside each point; empty for nothing.
        ring: Whether points are rings, which stay visible around the point of another method.
    """

    label: str
    style: str
    rows: Sequence[str]
    notes: Sequence[str] = ()
    ring: bool = False

    def mark(self, x: float, y: float) -> str:
        """One point."""
        shape = f'{self.style} ring" r="7' if self.ring else f'{self.style}" r="4.5'
        return f'<circle class="{shape}" cx="{x:.1f}" cy="{y:.1f}"/>'


SERIES = (
    Series(
        "onnxcomp, calibrated",
        "calibrated",
        ("hyper 2, calibrated", "hyper 3, calibrated", "hyper 4, calibrated"),
        ("2 bits", "3 bits", "4 bits"),
    ),
    Series("onnxcomp", "plain", ("hyper 2", "hyper 3", "hyper 4")),
    Series(
        "GPTQ, calibrated",
        "gptq",
        ("GPTQ int2 (numpy), asymmetric", "GPTQ int4 (numpy), asymmetric"),
        ("int2", "int4"),
    ),
    Series("round to nearest", "rtn", ("RTN int2, asymmetric", "RTN int4, asymmetric")),
    Series("HQQ", "hqq", ("HQQ int4",)),
    Series("k-quant", "kquant", ("k-quant int4",), ring=True),
)


def _x(megabytes: float) -> float:
    low, high = SIZES
    return LEFT + (WIDTH - LEFT - RIGHT) * (megabytes - low) / (high - low)


def _y(loss: float) -> float:
    low, high = (math.log(end) for end in LOSSES)
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log(loss)) / (high - low)


def _axes() -> Iterator[str]:
    for loss in LOSS_TICKS:
        yield f'<path class="grid" d="M{LEFT} {_y(loss):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 8}" y="{_y(loss) + 4:.1f}" class="dim end">{loss:g}</text>'
    for half in range(3, 8):
        place = f'x="{_x(half / 2):.1f}" y="{HEIGHT - BOTTOM + 20}"'
        yield f'<text {place} class="dim mid">{half / 2:g} MB</text>'
    yield f'<text x="{LEFT}" y="{TOP - 14}" class="dim">KL divergence in nats, logarithmic</text>'
    place = f'x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 14}"'
    yield f'<text {place} class="dim mid">size of the model file: left and down is better</text>'


def _series(series: Series, found: dict[str, tuple[float, float]]) -> Iterator[str]:
    points = [(_x(size), _y(loss)) for size, loss in (found[row] for row in series.rows)]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    yield f'<path class="line {series.style}" d="M{line}"/>'
    for x, y in points:
        yield series.mark(x, y)
    for (x, y), note in zip(points, series.notes, strict=False):
        yield f'<text x="{x:.1f}" y="{y + 21:.1f}" class="dim mid">{note}</text>'


def _legend() -> Iterator[str]:
    x, y = WIDTH - RIGHT - 182, TOP + 22
    for number, series in enumerate(SERIES):
        at = y + 21 * number
        yield f'<path class="line {series.style}" d="M{x} {at}h26"/>'
        yield series.mark(x + 13, at)
        yield f'<text x="{x + 36}" y="{at + 4}">{series.label}</text>'


def draw() -> str:
    """The picture as SVG."""
    results = read("hyper_models")["language_model"]["rows"]
    found = {row["name"]: (row["bytes"] / 1e6, row["kl"]) for row in results}
    dense = found["dense"][0]
    title = f"A language model of {dense:.1f} MB, compressed: size against loss"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        f'<text x="{LEFT}" y="28" class="title">{title}</text>',
        *_axes(),
    ]
    for series in reversed(SERIES):
        parts += _series(series, found)
    return "\n".join([*parts, *_legend(), "</svg>"]) + "\n"


if __name__ == "__main__":
    print(draw(), end="")
