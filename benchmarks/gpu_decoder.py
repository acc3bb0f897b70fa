"""A decoder of the shape of a 7B model in ONNX Runtime's CUDA execution provider.

Twelve layers with activations between all products, so that nothing is folded: dense float16,
ONNX Runtime's own MatMulNBits with 4 bits and blocks of 128, and codes of 4 and 2 bits. Layers
share their weights, which together are larger than every cache; so each model is small enough to be
made here. Sessions run as CUDA graphs with inputs and outputs on the GPU.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs.hyper import format as hyper_format

__all__ = ["FORMS", "SHAPE", "DecoderRow", "Shape", "make_decoder", "time_decoders"]

Array = np.ndarray[Any, Any]
FORMS = ("dense float16", "MatMulNBits 4 bits", "hyper k=4", "hyper k=2")
BATCHES = (1, 16, 256)
_BLOCK = 128
_STATES = 7
_RUNS = 20


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    inner: int
    layers: int

    def products(self) -> dict[str, tuple[int, int]]:
        """(rows, length) of each weight of a layer."""
        square = (self.hidden, self.hidden)
        up, down = (self.inner, self.hidden), (self.hidden, self.inner)
        return {"q": square, "k": square, "v": square, "o": square, "g": up, "u": up, "d": down}


SHAPE = Shape(4096, 11008, 12)


@dataclasses.dataclass(frozen=True)
class DecoderRow:
    """One form of the decoder.

    Attributes:
        form: One of FORMS.
        batch: Tokens of a run.
        us: Median time of a run.
        tokens_per_second: Of all tokens.
        ratio: To the dense form.
    """

    form: str
    batch: int
    us: float
    tokens_per_second: float
    ratio: float


class _Weights:
    """Initializers and nodes of products, in one form."""

    def __init__(self, form: str, shape: Shape) -> None:
        self.form = form
        self._shape = shape
        self.tensors: dict[str, Array] = {}
        self._rng = np.random.default_rng(0)
        for name, (rows, length) in shape.products().items():
            self._add(name, rows, length)

    def _add(self, name: str, rows: int, length: int) -> None:
        if self.form.startswith("dense"):
            weight = self._rng.standard_normal((length, rows), np.float32) / np.sqrt(length)
            self.tensors[name] = weight.astype(np.float16)
        elif self.form.startswith("MatMulNBits"):
            blocks = length // _BLOCK
            shape = (rows, blocks, _BLOCK // 2)
            self.tensors[f"{name}.codes"] = self._rng.integers(0, 256, shape, np.uint8)
            scale = np.full(rows * blocks, 0.2 / np.sqrt(length), np.float16)
            self.tensors[f"{name}.scales"] = scale
        else:
            self._add_hyper(name, rows, length, int(self.form[-1]))

    def _add_hyper(self, name: str, rows: int, length: int, bits: int) -> None:
        geometry = hyper_format.GroupLayout(bits, _STATES, _BLOCK, rows, length)
        shared = hyper_format.shared_tensors(bits, _STATES, _BLOCK, rows, length)
        made = dict(zip(hyper_format.NODE_INPUTS[2:], shared.values(), strict=True))
        # A weight is the sum of a group's table values, times scale * 2^-12.
        spread = float(made["table"].astype(np.float64).std()) * _BLOCK**0.5
        scale = 4096.0 / spread / length**0.5
        codes = self._rng.integers(0, 256, geometry.codes_shape, np.uint8)
        scales = np.full(geometry.scales_shape, scale, np.float16)
        for key, tensor in {"codes": codes, "scales": scales, **made}.items():
            self.tensors[f"{name}.{key}"] = tensor

    def node(self, name: str, x: str, y: str) -> onnx.NodeProto:
        """The product y = x W^T."""
        rows, length = self._shape.products()[name]
        if self.form.startswith("dense"):
            return helper.make_node("MatMul", [x, name], [y])
        if self.form.startswith("MatMulNBits"):
            inputs = [x, f"{name}.codes", f"{name}.scales"]
            sizes: dict[str, Any] = {"K": length, "N": rows, "bits": 4, "block_size": _BLOCK}
            return helper.make_node("MatMulNBits", inputs, [y], domain="com.microsoft", **sizes)
        inputs = [x, *(f"{name}.{key}" for key in hyper_format.NODE_INPUTS)]
        return helper.make_node(
            "HyperMatMul", inputs, [y], domain="com.onnxcomp",
            extent=[rows, length], group=_BLOCK, dtype=TensorProto.FLOAT16,
        )  # fmt: skip


def _layer(weights: _Weights, x: str, index: int) -> tuple[list[onnx.NodeProto], str]:
    """Nodes of one layer, and its output: gates where a model has attention."""
    nodes: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], output: str) -> str:
        name = f"{output}{index}"
        if kind == "product":
            nodes.append(weights.node(output, inputs[0], name))
        else:
            extra: dict[str, Any] = {"axis": -1} if kind == "LayerNormalization" else {}
            nodes.append(helper.make_node(kind, inputs, [name], **extra))
        return name

    first = add("LayerNormalization", [x, "ones"], "n")
    q, k, v = (add("product", [first], name) for name in "qkv")
    attended = add("Add", [add("Mul", [q, add("Sigmoid", [k], "ks")], "qk"), v], "a")
    middle = add("Add", [x, add("product", [attended], "o")], "x")
    second = add("LayerNormalization", [middle, "ones"], "m")
    gate, up = add("product", [second], "g"), add("product", [second], "u")
    inner = add("Mul", [add("Mul", [gate, add("Sigmoid", [gate], "gs")], "gg"), up], "i")
    return nodes, add("Add", [middle, add("product", [inner], "d")], "y")


def make_decoder(form: str, shape: Shape = SHAPE) -> onnx.ModelProto:
    """The decoder in one of FORMS, (batch, hidden) float16 to the same."""
    weights = _Weights(form, shape)
    nodes, x = [], "input"
    for index in range(shape.layers):
        more, x = _layer(weights, x, index)
        nodes += more
    tensors = {**weights.tensors, "ones": np.ones(shape.hidden, np.float16)}
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT16, ["batch", shape.hidden])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT16, ["batch", shape.hidden])],
        [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()],
    )
    domains = (("", 17), ("com.microsoft", 1), ("com.onnxcomp", 1))
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _time(model: bytes, library: Path, batch: int, hidden: int) -> float:
    """Median microseconds of a run as a CUDA graph."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    session = ort.InferenceSession(model, options, providers=[provider, "CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((batch, hidden), np.float32).astype(np.float16)
    binding = session.io_binding()
    fed = ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0)
    binding.bind_ortvalue_input("input", fed)
    made = ort.OrtValue.ortvalue_from_shape_and_type([batch, hidden], np.float16, "cuda", 0)
    binding.bind_ortvalue_output(session.get_outputs()[0].name, made)
    times = []
    for run in range(_RUNS + 3):  # the first ones allocate and capture
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if run >= 3:
            times.append(time.perf_counter() - start)
    if not np.isfinite(made.numpy().astype(np.float32)).all():
        raise AssertionError(f"a decoder of {batch} rows gives what is not finite")
    return statistics.median(times) * 1e6


def time_decoders(library: Path, deadline: float, shape: Shape = SHAPE) -> list[DecoderRow]:
    """All forms, as far as they are done before `deadline` (time.monotonic)."""
    found: list[DecoderRow] = []
    for form in FORMS:
        if time.monotonic() > deadline:
            print(f"decoder: no time left for {form}")
            continue
        model = make_decoder(form, shape).SerializeToString()
        for batch in BATCHES:
            try:
                us = _time(model, library, batch, shape.hidden)
            except Exception as error:  # of ONNX Runtime, which has a type for each: say it, go on
                print(f"decoder, {form}, {batch} rows: {str(error).splitlines()[0]}")
                continue
            dense = [row.us for row in found if row.form == FORMS[0] and row.batch == batch]
            ratio = dense[0] / us if dense else 1.0
            found.append(DecoderRow(form, batch, us, batch / us * 1e6, ratio))
    return found
