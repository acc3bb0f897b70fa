"""ONNX Runtime as applications use it: sessions that know the operators, and what they are fed."""
