"""The compiler: passes over ONNX models and the codecs that store their weights."""
