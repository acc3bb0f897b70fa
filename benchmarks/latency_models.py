"""Encoders with the shapes of well-known models and random weights, for figures of speed alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["vision_encoder", "whisper_encoder"]

OPSET = 17


class Net:
    """A graph that grows node by node; weights are random, of the usual size."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: list[onnx.TensorProto] = []

    def constant(self, array: np.ndarray) -> str:
        """An initializer."""
        name = f"c{len(self._tensors)}"
        self._tensors.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        """Normal values with the deviation 1 / sqrt(fan-in)."""
        fan_in = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        values = self._rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(fan_in))
        return self.constant(values)

    def zeros(self, *shape: int) -> str:
        """A bias."""
        return self.constant(np.zeros(shape, np.float32))

    def node(self, op_type: str, *inputs: str, **attributes: object) -> str:
        """A node with one output."""
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def save(self, shape: Sequence[int | str], output: str, path: Path) -> None:
        """Write the model of what was added."""
        source = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self._nodes, "encoder", [source], [result], self._tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def linear(net: Net, x: str, inputs: int, outputs: int) -> str:
    """``x W + b``."""
    product = net.node("MatMul", x, net.weight(inputs, outputs))
    return net.node("Add", product, net.zeros(outputs))


def norm(net: Net, x: str, width: int) -> str:
    """Layer normalisation over the last axis."""
    ones = net.constant(np.ones(width, np.float32))
    return net.node("LayerNormalization", x, ones, net.zeros(width), axis=-1)


def gelu(net: Net, x: str) -> str:
    """As exporters write it, by Erf."""
    root, one = (net.constant(np.array(v, np.float32)) for v in (np.sqrt(2.0), 1.0))
    erf = net.node("Erf", net.node("Div", x, root))
    half = net.constant(np.array(0.5, np.float32))
    return net.node("Mul", net.node("Mul", x, net.node("Add", erf, one)), half)


def attention(net: Net, x: str, width: int, heads: int) -> str:
    """Softmax attention; q, k and v are products of their own."""
    shape = net.constant(np.array([0, 0, heads, width // heads], np.int64))
    back = net.constant(np.array([0, 0, width], np.int64))
    parts = [net.node("Reshape", linear(net, x, width, width), shape) for _ in range(3)]
    q = net.node("Transpose", parts[0], perm=[0, 2, 1, 3])
    k = net.node("Transpose", parts[1], perm=[0, 2, 3, 1])
    v = net.node("Transpose", parts[2], perm=[0, 2, 1, 3])
    scale = net.constant(np.array((width // heads) ** -0.5, np.float32))
    scores = net.node("Softmax", net.node("Mul", net.node("MatMul", q, k), scale), axis=-1)
    mixed = net.node("Transpose", net.node("MatMul", scores, v), perm=[0, 2, 1, 3])
    return linear(net, net.node("Reshape", mixed, back), width, width)


def layers(net: Net, x: str, count: int, width: int, heads: int) -> str:
    """Transformer layers that normalise first."""
    for _ in range(count):
        x = net.node("Add", x, attention(net, norm(net, x, width), width, heads))
        inner = gelu(net, linear(net, norm(net, x, width), width, 4 * width))
        x = net.node("Add", x, linear(net, inner, 4 * width, width))
    return norm(net, x, width)


def tokens_of(net: Net, x: str, width: int) -> str:
    """``(batch, width, ...)`` as ``(batch, tokens, width)``."""
    flat = net.node("Reshape", x, net.constant(np.array([0, width, -1], np.int64)))
    return net.node("Transpose", flat, perm=[0, 2, 1])


def vision_encoder(path: Path, *, width: int = 384, heads: int = 6, count: int = 12) -> None:
    """ViT-S/16: 22 million weights, 196 tokens of a 224 x 224 image."""
    net = Net(0)
    kernel = [16, 16]
    patches = net.node(
        "Conv", "x", net.weight(width, 3, *kernel), net.zeros(width), strides=kernel,
        kernel_shape=kernel,
    )  # fmt: skip
    x = net.node("Add", tokens_of(net, patches, width), net.weight(196, width))
    net.save(["batch", 3, 224, 224], layers(net, x, count, width, heads), path)


def whisper_encoder(path: Path, *, width: int = 512, heads: int = 8, count: int = 6) -> None:
    """The encoder of Whisper base: 20 million weights, 1500 tokens of 30 seconds."""
    net = Net(1)
    x = "x"
    for channels, stride in ((80, 1), (width, 2)):
        weight = net.weight(width, channels, 3)
        x = gelu(net, net.node(
            "Conv", x, weight, net.zeros(width), strides=[stride], pads=[1, 1], kernel_shape=[3]
        ))  # fmt: skip
    x = net.node("Add", tokens_of(net, x, width), net.weight(1500, width))
    net.save(["batch", 80, 3000], layers(net, x, count, width, heads), path)
