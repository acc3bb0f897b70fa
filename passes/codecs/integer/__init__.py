"""The codec int: integers of 4 or 8 bits for ONNX Runtime's own operators."""
