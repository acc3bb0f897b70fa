"""Small graphs with the structures that pruning must understand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Draft:
    """A graph in the making; every call adds a node and returns its output.

    Weights depend on the seed and on the calls before, on nothing else.
    """

    def __init__(self, opset: int = 18, seed: int = 0, **domains: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.opsets = [helper.make_opsetid("", opset)]
        self.opsets += [helper.make_opsetid(name, version) for name, version in domains.items()]

    def weight(self, *shape: int, scale: float = 0.5) -> str:
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, array: Any) -> str:
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def add(
        self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attrs: Any
    ) -> Any:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(
            op_type, inputs, names, name=f"n{len(self.nodes)}", domain=domain, **attrs
        )
        self.nodes.append(node)
        return names[0] if outputs == 1 else names

    def linear(self, x: str, inner: int, outer: int, bias: bool = True) -> str:
        y = self.add("MatMul", x, self.weight(inner, outer, scale=inner**-0.5))
        return self.add("Add", y, self.weight(outer)) if bias else str(y)

    def model(
        self, inputs: dict[str, Sequence[Any]], outputs: dict[str, Sequence[Any]], ir: int = 8
    ) -> onnx.ModelProto:
        def infos(values: dict[str, Sequence[Any]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in values.items()
            ]

        graph = helper.make_graph(self.nodes, "g", infos(inputs), infos(outputs), self.initializers)
        return helper.make_model(graph, opset_imports=self.opsets, ir_version=ir)


def mlp() -> onnx.ModelProto:
    """Gemm and MatMul with every way to write a bias; the last layer is an output."""
    d = Draft()
    h = d.add("Gemm", "x", d.weight(12, 8), d.weight(12), transB=1)
    h = d.add("Sigmoid", h)
    h = d.add("Relu", d.linear(h, 12, 10))
    y = d.add("Gemm", h, d.weight(10, 4), d.weight(1, 4))
    return d.model({"x": ["n", 8]}, {y: ["n", 4]})


def gated() -> onnx.ModelProto:
    """A gated MLP with a residual and a norm that keeps the outer size."""
    d = Draft()
    h = d.add("LayerNormalization", "x", d.weight(8), d.weight(8), axis=-1)
    up = d.linear(h, 8, 16, bias=False)
    gate = d.linear(h, 8, 16, bias=False)
    gate = d.add("Mul", gate, d.add("Sigmoid", gate))
    y = d.linear(d.add("Mul", up, gate), 16, 8)
    return d.model({"x": ["b", "t", 8]}, {d.add("Add", "x", y): ["b", "t", 8]})


def convolutions() -> onnx.ModelProto:
    """Residuals, depthwise and transposed convolutions, norms, Concat, Split, Pad, PRelu."""
    d = Draft()
    a = d.add("Conv", "x", d.weight(8, 3, 3, 3), d.weight(8), pads=[1, 1, 1, 1])
    positive = d.constant(np.abs(d.rng.standard_normal(8)).astype(np.float32) + 0.5)
    a = d.add("BatchNormalization", a, d.weight(8), d.weight(8), d.weight(8), positive)
    a = d.add("PRelu", a, d.weight(8, 1, 1))
    b = d.add("Conv", a, d.weight(8, 1, 3, 3), pads=[1, 1, 1, 1], group=8)
    b = d.add("InstanceNormalization", b, d.weight(8), d.weight(8))
    a = d.add("Add", a, b)
    c = d.add("Conv", a, d.weight(6, 8, 1, 1), d.weight(6))
    joined = d.add("Concat", a, c, axis=1)
    left, right = d.add("Split", joined, d.ints(8, 6), outputs=2, axis=1)
    left = d.add("ConvTranspose", left, d.weight(8, 5, 2, 2), d.weight(5), strides=[2, 2])
    left = d.add("MaxPool", left, kernel_shape=[2, 2], strides=[2, 2])
    right = d.add("Pad", right, d.ints(0, 2, 0, 0, 0, 1, 0, 0))
    right = d.add("Conv", right, d.weight(5, 9, 1, 1))
    y = d.add("GlobalAveragePool", d.add("Relu", d.add("Add", left, right)))
    y = d.add("Gemm", d.add("Flatten", y), d.weight(5, 4), d.weight(4))
    return d.model({"x": ["n", 3, 8, 8]}, {y: ["n", 4]})


def flattened() -> onnx.ModelProto:
    """Channels that become positions of a flat vector, and a squeeze-and-excite branch."""
    d = Draft()
    a = d.add("Relu", d.add("Conv", "x", d.weight(6, 3, 3, 3), d.weight(6)))
    s = d.add("ReduceMean", a, d.ints(2, 3), keepdims=1)
    s = d.add("Relu", d.add("Conv", s, d.weight(4, 6, 1, 1), d.weight(4)))
    s = d.add("HardSigmoid", d.add("Conv", s, d.weight(6, 4, 1, 1), d.weight(6)))
    a = d.add("Mul", a, s)
    flat = d.add("Reshape", a, d.ints(0, -1))
    h = d.add("Relu", d.add("Gemm", flat, d.weight(6 * 36, 9), d.weight(9)))
    return d.model({"x": ["n", 3, 8, 8]}, {d.linear(h, 9, 2): ["n", 2]})


def shuffled() -> onnx.ModelProto:
    """Grouped convolutions with a channel shuffle between, and channels picked by number."""
    d = Draft()
    a = d.add("Relu", d.add("Conv", "x", d.weight(8, 4, 1, 1), d.weight(8)))
    a = d.add("Conv", a, d.weight(12, 4, 3, 3), d.weight(12), group=2, pads=[1, 1, 1, 1])
    a = d.add("Reshape", a, d.ints(0, 2, 6, 5, 5))
    a = d.add("Reshape", d.add("Transpose", a, perm=[0, 2, 1, 3, 4]), d.ints(0, 12, 5, 5))
    a = d.add("Gather", a, d.constant(d.rng.permutation(12)), axis=1)
    first = d.add("Slice", a, d.ints(0), d.ints(5), d.ints(1))
    second = d.add("Slice", a, d.ints(5), d.ints(2**31), d.ints(1))
    y = d.add("Conv", first, d.weight(3, 5, 1, 1))
    y = d.add("Add", y, d.add("Conv", second, d.weight(3, 7, 1, 1)))
    return d.model({"x": ["n", 4, 5, 5]}, {y: ["n", 3, 5, 5]})


def grouped_output() -> onnx.ModelProto:
    """A grouped convolution whose groups are outputs of the model: none of them may go."""
    d = Draft()
    a = d.add("Relu", d.add("Conv", "x", d.weight(12, 4, 1, 1), d.weight(12)))
    y = d.add("Conv", a, d.weight(6, 4, 1, 1), d.weight(6), group=3)
    return d.model({"x": ["n", 4, 5, 5]}, {y: ["n", 6, 5, 5]})


def one_channel() -> onnx.ModelProto:
    """A convolution with one channel, whose axis is taken out."""
    d = Draft()
    a = d.add("Relu", d.add("Conv", "x", d.weight(12, 4, 1, 1), d.weight(12)))
    y = d.add("Squeeze", d.add("Conv", a, d.weight(1, 12, 1, 1), d.weight(1)), d.ints(1))
    return d.model({"x": ["n", 4, 5, 5]}, {d.add("Tanh", y): ["n", 5, 5]})


def _heads(d: Draft, x: str, count: int, size: int) -> str:
    """``(b, t, count * size) -> (b, count, t, size)``; the batch and steps are computed."""
    shape = d.add("Shape", x)
    free = d.add("Slice", shape, d.ints(0), d.ints(2))
    whole = d.add("Concat", free, d.ints(count, size), axis=0)
    return str(d.add("Transpose", d.add("Reshape", x, whole), perm=[0, 2, 1, 3]))


def attention(
    heads: int = 4, shared: int = 4, size: int = 6, cache: bool = False
) -> onnx.ModelProto:
    """Decomposed attention whose scale is computed from the size of a head."""
    d = Draft()
    width = 10
    norm = d.add("LayerNormalization", "x", d.weight(width), axis=-1)
    q = _heads(d, d.linear(norm, width, heads * size), heads, size)
    k = _heads(d, d.linear(norm, width, shared * size), shared, size)
    v = _heads(d, d.linear(norm, width, shared * size), shared, size)
    outputs: dict[str, Sequence[Any]] = {}
    inputs: dict[str, Sequence[Any]] = {"x": ["b", "t", width]}
    if cache:
        for name in ("past_key", "past_value"):
            inputs[name] = ["b", shared, "p", size]
        k, v = d.add("Concat", "past_key", k, axis=2), d.add("Concat", "past_value", v, axis=2)
        outputs = {k: ["b", shared, "s", size], v: ["b", shared, "s", size]}
    if shared != heads:
        k, v = (_repeat(d, part, heads // shared, heads, size) for part in (k, v))
    last = d.add("Gather", d.add("Shape", q), d.constant(np.array(3, np.int64)), axis=0)
    scale = d.add("Sqrt", d.add("Cast", last, to=TensorProto.FLOAT))
    scores = d.add("MatMul", q, d.add("Transpose", k, perm=[0, 1, 3, 2]))
    probs = d.add("Softmax", d.add("Div", scores, scale), axis=-1)
    mixed = d.add("Transpose", d.add("MatMul", probs, v), perm=[0, 2, 1, 3])
    flat = d.add("Reshape", mixed, d.ints(0, 0, heads * size))
    y = d.add("Add", "x", d.linear(flat, heads * size, width))
    return d.model(inputs, {y: ["b", "t", width], **outputs})


def _repeat(d: Draft, x: str, times: int, heads: int, size: int) -> str:
    wide = d.add("Unsqueeze", x, d.ints(2))
    wide = d.add("Expand", wide, d.ints(1, 1, times, 1, 1))
    steps = d.add("Slice", d.add("Shape", x), d.ints(2), d.ints(3))
    batch = d.add("Slice", d.add("Shape", x), d.ints(0), d.ints(1))
    whole = d.add("Concat", batch, d.ints(heads), steps, d.ints(size), axis=0)
    return str(d.add("Reshape", wide, whole))


def fused(op_type: str) -> onnx.ModelProto:
    """Attention as one operator of com.microsoft, or of ai.onnx from opset 23 on."""
    standard = op_type == "Attention23"
    d = Draft(23 if standard else 18, **({} if standard else {"com.microsoft": 1}))
    heads, shared, size, width = 4, 4 if op_type == "MultiHeadAttention" else 2, 8, 10
    q, k, v = (d.linear("x", width, n * size) for n in (heads, shared, shared))
    if standard:
        y = d.add("Attention", q, k, v, q_num_heads=heads, kv_num_heads=shared)
    elif op_type == "MultiHeadAttention":
        bias = d.weight(3 * heads * size)
        y = d.add(op_type, q, k, v, bias, num_heads=heads, domain="com.microsoft")
    else:
        y = d.add("Attention", q, k, v, num_heads=heads, domain="com.microsoft")
    y = d.linear(y, heads * size, width)
    return d.model({"x": ["b", "t", width]}, {y: ["b", "t", width]}, ir=11 if standard else 8)


def packed() -> onnx.ModelProto:
    """com.microsoft.Attention: one weight for queries, keys and values."""
    d = Draft(18, **{"com.microsoft": 1})
    y = d.add(
        "Attention",
        "x",
        d.weight(10, 3 * 24),
        d.weight(3 * 24),
        num_heads=4,
        domain="com.microsoft",
    )
    return d.model({"x": ["b", "t", 10]}, {d.linear(y, 24, 10): ["b", "t", 10]})


def grouped_query(cache: bool = False) -> onnx.ModelProto:
    """com.microsoft.GroupQueryAttention, for one sample of 3 steps."""
    d = Draft(18, **{"com.microsoft": 1})
    heads, shared, size, width, steps = 6, 3, 8, 10, 3
    q, k, v = (d.linear("x", width, n * size) for n in (heads, shared, shared))
    past = 2 if cache else 0
    lengths = d.constant(np.array([past + steps - 1], np.int32))
    total = d.constant(np.array(past + steps, np.int32))
    inputs: dict[str, Sequence[Any]] = {"x": [1, steps, width]}
    caches = [""] * 2
    if cache:
        caches = ["past_key", "past_value"]
        inputs |= {name: [1, shared, past, size] for name in caches}
    y, key, value = d.add(
        "GroupQueryAttention", q, k, v, *caches, lengths, total, outputs=3, num_heads=heads,
        kv_num_heads=shared, domain="com.microsoft",
    )  # fmt: skip
    outputs: dict[str, Sequence[Any]] = {d.linear(y, heads * size, width): [1, steps, width]}
    if cache:
        outputs |= {name: [1, shared, past + steps, size] for name in (key, value)}
    return d.model(inputs, outputs)


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "gated": gated,
    "convolutions": convolutions,
    "flattened": flattened,
    "shuffled": shuffled,
    "groups as an output": grouped_output,
    "one channel": one_channel,
    "attention": attention,
    "attention with shared keys": lambda: attention(4, 2),
    "attention with one key": lambda: attention(4, 1),
    "attention with a cache": lambda: attention(4, 2, cache=True),
    "MultiHeadAttention": lambda: fused("MultiHeadAttention"),
    "Attention of opset 23": lambda: fused("Attention23"),
    "packed Attention": packed,
    "GroupQueryAttention": grouped_query,
    "GroupQueryAttention with a cache": lambda: grouped_query(cache=True),
}
