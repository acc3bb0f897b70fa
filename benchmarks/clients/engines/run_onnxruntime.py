"""ONNX Runtime, without the operator library."""

from __future__ import annotations

import onnxruntime
from harness import measure


def load(model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    measure(load, lambda session, feeds: session.run(None, feeds)[0])
