"""OpenVINO on the processor, in float32."""

from __future__ import annotations

from typing import Any

import openvino
from harness import measure

_HINTS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}


def load(model: str) -> Any:
    core = openvino.Core()
    return core.compile_model(core.read_model(model), "CPU", _HINTS)


if __name__ == "__main__":
    measure(load, lambda model, feeds: next(iter(model(dict(feeds)).values())))
