"""Reverse-mode differentiation of ONNX models, as ONNX models."""
