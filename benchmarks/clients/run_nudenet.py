"""nudenet: a detector of people, on photographs."""

from __future__ import annotations

from typing import Any

from harness import data_folder, measure, part_of


def load() -> Any:
    from nudenet import NudeDetector

    return NudeDetector()


def work(detector: Any, part: str) -> dict[str, Any]:
    """Boxes with classes, as ``[class, x, y, width, height]``."""
    import numpy as np
    from PIL import Image

    paths = sorted((data_folder() / "eval" / "imagenet500").glob("*.jpg"))
    answers = []
    for path in part_of(paths[: 32 + 300], part, 32):
        image = np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]
        found = detector.detect(np.ascontiguousarray(image))
        answers.append([[entry["class"], *map(float, entry["box"])] for entry in found])
    return {"answers": answers}


if __name__ == "__main__":
    measure(load, work)
