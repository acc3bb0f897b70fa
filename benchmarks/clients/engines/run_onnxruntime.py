"""ONNX Runtime, with the operator library where a third word says its path."""

from __future__ import annotations

import sys

import onnxruntime
from harness import measure


def load(model: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    for library in sys.argv[3:]:
        options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    measure(load, lambda session, feeds: session.run(None, feeds)[0])
