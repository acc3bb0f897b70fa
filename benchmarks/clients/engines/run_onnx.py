"""The reference evaluator of onnx."""

from __future__ import annotations

from harness import measure
from onnx.reference import ReferenceEvaluator

if __name__ == "__main__":
    measure(ReferenceEvaluator, lambda session, feeds: session.run(None, feeds)[0])
