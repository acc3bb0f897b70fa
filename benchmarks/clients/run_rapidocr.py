"""rapidocr-onnxruntime: detector, classifier and recogniser of lines of text."""

from __future__ import annotations

from typing import Any

from harness import measure, rendered, words_read


def load() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR()


def work(engine: Any, part: str) -> dict[str, Any]:
    """Words found on rendered pages."""
    pages = rendered(part, 8 if part == "calibration" else 24, height=15)
    return words_read(lambda page: [line[1] for line in engine(page)[0] or []], pages)


if __name__ == "__main__":
    measure(load, work)
