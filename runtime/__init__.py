"""Run models in ONNX Runtime: sessions, inputs, evaluation and timing."""
