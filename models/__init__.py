"""The torch side of onnxcomp, and the small trained model that `onnxcomp demo` uses.

Importing this package does not import torch; the training recipes inside it do.
"""
