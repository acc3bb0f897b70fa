"""rapidocr-onnxruntime: detector, classifier and recogniser of lines of text."""

from __future__ import annotations

from typing import Any

from harness import measure, rendered


def load() -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR()


def work(engine: Any, part: str) -> dict[str, Any]:
    """Words found on rendered pages."""
    answers, found, total = [], 0, 0
    for page, words in rendered(part, 8 if part == "calibration" else 24, height=15):
        lines, _ = engine(page)
        read = "".join(line[1] for line in lines or []).replace(" ", "")  # it may drop blanks
        answers += [word if word in read else "" for word in words]
        found += sum(word in read for word in words)
        total += len(words)
    return {"answers": answers, "right": found / total}


if __name__ == "__main__":
    measure(load, work)
