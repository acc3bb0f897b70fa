"""A model of the nodes that a codec emits for one use of a weight, and a way to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.weight import DOMAIN, Array, Kind, WeightSite

EmittedModel = Callable[..., onnx.ModelProto]
RunModel = Callable[..., Array]

_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}


class _ProtoBuilder:
    """The builder of the codec protocol over plain protobuf messages."""

    def __init__(self, opset: int, payload: Payload) -> None:
        self.opset = opset
        self.payload = payload
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Array] = {}

    def tensor(self, key: str) -> str:
        self.initializers[key] = {**self.payload.tensors, **self.payload.shared}[key]
        return key

    def constant(self, key: str, array: Array) -> str:
        known = self.initializers.setdefault(key, array)
        assert np.array_equal(known, array), f"{key} names two constants"
        return key

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> str:
        output = f"y{len(self.nodes)}"
        made = helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes or {})
        self.nodes.append(made)
        return output

    def outputs(self, op_type: str, inputs: Sequence[str], count: int) -> list[str]:
        names = [f"y{len(self.nodes)}.{number}" for number in range(count)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names))
        return names


def _emitted(
    codec: Codec, site: WeightSite, payload: Payload, kind: Kind, opset: int, x: Array | None
) -> onnx.ModelProto:
    builder = _ProtoBuilder(opset, payload)
    value = codec.emit(builder, site, payload, kind, None if x is None else "x")
    y = builder.node("Identity", [value])
    dims: list[int | str] = [f"n{axis}" for axis in range(0 if x is None else x.ndim)]
    given = ("d", TensorProto.FLOAT, [1]) if x is None else ("x", _TYPES[x.dtype.name], dims)
    shape = [site.rows, site.length] if x is None else [*dims, site.length]
    shape = [*dims[:-1], site.rows] if kind == "matmul" else shape
    graph = helper.make_graph(
        builder.nodes,
        "g",
        [helper.make_tensor_value_info(*given)],
        [helper.make_tensor_value_info(y, _TYPES[site.dtype], shape)],
        [numpy_helper.from_array(value, name) for name, value in builder.initializers.items()],
    )
    domains = dict.fromkeys(node.domain for node in builder.nodes if node.domain)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    functions = list(codec.functions(opset)) if DOMAIN in domains else []
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


def _run_feed(model: onnx.ModelProto, feed: Mapping[str, Array], *, optimize: bool = True) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, dict(feed))[0])


def _run(model: onnx.ModelProto, x: Array | None, *, optimize: bool = True) -> Array:
    feed = {"d": np.zeros(1, np.float32)} if x is None else {"x": x}
    return _run_feed(model, feed, optimize=optimize)


@pytest.fixture(scope="session")
def emitted_model() -> EmittedModel:
    """emitted_model(codec, site, payload, kind, opset, x): an input `d` stands in for no `x`."""
    return _emitted


@pytest.fixture(scope="session")
def run_model() -> RunModel:
    """run_model(model, x, optimize=True): output in this ONNX Runtime, without the library."""
    return _run


def _two_inputs(
    emit: Callable[[Any], str],
    payload: Payload,
    opset: int,
    feed: Mapping[str, Array],
    dtype: str,
    functions: Sequence[onnx.FunctionProto],
) -> onnx.ModelProto:
    builder = _ProtoBuilder(opset, payload)
    y = builder.node("Identity", [emit(builder)])
    inputs = [
        helper.make_tensor_value_info(
            name, _TYPES[array.dtype.name], [f"{name}{axis}" for axis in range(array.ndim)]
        )
        for name, array in feed.items()
    ]
    rank = max(feed["x"].ndim, feed["i"].ndim + min(feed["x"].ndim, 2))
    shape = [f"y{axis}" for axis in range(rank)]
    graph = helper.make_graph(
        builder.nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(y, _TYPES[dtype], shape)],
        [numpy_helper.from_array(value, name) for name, value in builder.initializers.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


@pytest.fixture(scope="session")
def two_input_model() -> EmittedModel:
    """two_input_model(emit, payload, opset, feed, dtype, functions): of inputs `x` and `i`."""
    return _two_inputs


@pytest.fixture(scope="session")
def run_feed() -> RunModel:
    """run_feed(model, feed, optimize=True): output in this ONNX Runtime, without the library."""
    return _run_feed
