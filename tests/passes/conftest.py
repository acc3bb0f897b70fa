"""Small models with everything in them, a codec to place, and ways to compare."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, Payload, TensorLayout
from onnxcomp.passes.ir.serializer import model_proto
from onnxcomp.passes.weight import DOMAIN, Array, Kind, WeightSite

Weights = Mapping[str, Array]


def build(
    graph: str,
    weights: Weights | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
    listed: bool = False,
    inner: Mapping[str, Weights] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model from the text form of its graph; `inner` holds initializers of subgraphs by name."""
    proto = onnx.parser.parse_graph(graph)
    for name, array in (weights or {}).items():
        proto.initializer.append(numpy_helper.from_array(array, name))
        if listed:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            proto.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    for node in proto.node:
        for attribute in node.attribute:
            for name, array in (inner or {}).get(attribute.g.name, {}).items():
                attribute.g.initializer.append(numpy_helper.from_array(array, name))
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in {f.domain for f in functions}]
    return helper.make_model(
        proto, opset_imports=imports, ir_version=ir_version, functions=list(functions)
    )


def weight(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Normal random values that are exact in float16 and bfloat16."""
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return values.astype(ml_dtypes.bfloat16).astype(dtype)


EVERYTHING = """
everything (int64[N] ids, bool go) => (float[1, 100] logits, float[N, 48] side) {
    x = Gather <axis = 0> (emb, ids)
    h = MatMul (x, fc1)
    r = Relu (h)
    d = MatMul (r, fc2)
    q = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (d, fc3, bias)
    side = If (go) <
        then_branch = yes () => (float[N, 48] a) { a = MatMul (x, outer) },
        else_branch = no () => (float[N, 48] b) { b = MatMul (x, own) }
    >
    axis = Constant <value_ints = [1]> ()
    s = Unsqueeze (q, axis)
    y, last, cell = LSTM <hidden_size = 64> (s, lstm_w, lstm_r)
    zero = Constant <value_ints = [0]> ()
    z = Squeeze (last, zero)
    turned = Transpose <perm = [1, 0]> (emb)
    logits = MatMul (z, turned)
}
"""


def everything(seed: int = 0) -> onnx.ModelProto:
    """Gather, MatMul, Gemm, If with captured and owned weights, LSTM, tied head."""
    shapes = {
        "emb": (100, 64), "fc1": (64, 128), "fc2": (128, 64), "fc3": (64, 64), "bias": (64,),
        "outer": (64, 48), "lstm_w": (1, 256, 64), "lstm_r": (1, 256, 64),
    }  # fmt: skip
    weights = {
        name: weight(*shape, seed=seed + 10 * index) / 8
        for index, (name, shape) in enumerate(shapes.items())
    }
    own = {"no": {"own": weight(64, 48, seed=seed + 1) / 8}}
    model = build(EVERYTHING, weights, inner=own)
    model.doc_string = "a model with everything in it"
    model.metadata_props.add(key="author", value="tests")
    model.graph.doc_string = "the graph"
    model.graph.node[1].doc_string = "the first product"
    model.graph.value_info.append(helper.make_tensor_value_info("h", 1, ["N", 128]))
    model.graph.value_info.append(helper.make_tensor_value_info("fc1", 1, [64, 128]))
    return model


def everything_feeds(count: int = 5) -> dict[str, Array]:
    ids = np.random.default_rng(1).integers(0, 100, count)
    return {"ids": ids, "go": np.array(True)}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two messages say different things; a field set to its default counts as unset."""
    if isinstance(first, onnx.TensorProto) and isinstance(second, onnx.TensorProto):
        return _tensor_differences(first, second, path)
    found = []
    for field in first.DESCRIPTOR.fields:
        one, two = getattr(first, field.name), getattr(second, field.name)
        here = f"{path}.{field.name}"
        if field.name == "metadata_props":
            one, two = sorted((e.key, e.value) for e in one), sorted((e.key, e.value) for e in two)
            found += [] if one == two else [here]
        elif field.is_repeated:
            found += _repeated_differences(one, two, here, bool(field.message_type))
        elif field.message_type:
            told = first.HasField(field.name) or second.HasField(field.name)
            found += differences(one, two, here) if told else []
        elif one != two:
            found.append(f"{here}: {one!r} became {two!r}")
    return found


def _repeated_differences(one: Any, two: Any, path: str, messages: bool) -> list[str]:
    if len(one) != len(two):
        return [f"{path}: {len(one)} became {len(two)}"]
    if not messages:
        return [] if list(one) == list(two) else [f"{path}: {list(one)} became {list(two)}"]
    names = [getattr(item, "name", None) for item in one]
    if path.endswith("value_info") and all(names):
        one, two = (sorted(items, key=lambda item: item.name) for items in (one, two))
    pairs = enumerate(zip(one, two, strict=True))
    return [text for i, (a, b) in pairs for text in differences(a, b, f"{path}[{i}]")]


def _tensor_differences(one: onnx.TensorProto, two: onnx.TensorProto, path: str) -> list[str]:
    first, second = ir.from_proto(one), ir.from_proto(two)
    if (one.name, one.data_type, list(one.dims)) != (two.name, two.data_type, list(two.dims)):
        return [f"{path}: {first} became {second}"]
    if one.data_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
        return [] if one.string_data == two.string_data else [path]
    return [] if first.tobytes() == second.tobytes() else [f"{path}: other values"]


def proto_of(model: ir.Model) -> onnx.ModelProto:
    return model_proto(model)


def run(model: Any, feeds: Mapping[str, Array]) -> list[Any]:
    """Run a model (a message, an IR model or a path) in plain ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if isinstance(model, ir.Model):
        model = proto_of(model)
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


@dataclasses.dataclass(frozen=True, slots=True)
class HalfParams(Params):
    strength: int = 1


class HalfCodec(Codec):
    """Stores half of a weight and doubles it again: exact, with operators of its own."""

    name: ClassVar[str] = "half"
    summary: ClassVar[str] = "half of the weight"
    params_type: ClassVar[type[Params]] = HalfParams

    def refuse(self, site: WeightSite) -> str | None:
        return None

    def candidates(self, site: WeightSite) -> Sequence[Params]:
        return [HalfParams()]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        return {"half": TensorLayout((site.rows, site.length), np.dtype(np.float32))}

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        return {"half.factor": np.array([2.0], np.float32)}

    def predict(self, site: WeightSite, params: Params) -> float:
        return 0.0

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        half = np.ascontiguousarray(weight) / np.float32(2)
        return Payload({"half": half}, self.shared(site, params), {"group": 4})

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        return payload.tensors["half"] * payload.shared["half.factor"]

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        return frozenset({"matmul", "gather", "weight", "decode"})

    def emit(
        self, builder: Builder[Any], site: WeightSite, payload: Payload, kind: Kind, x: Any
    ) -> Any:
        name = {"matmul": "HalfMatMul", "gather": "HalfGather", "weight": "HalfWeight"}
        stored = [builder.tensor("half"), builder.tensor("half.factor")]
        inputs = stored if x is None else [x, *stored]
        codes = {"float32": 1, "float16": 10, "bfloat16": 16}
        attributes: dict[str, Any] = {"group": 4}
        if kind == "matmul":
            attributes["dtype"] = codes[site.dtype]
        made = builder.node(name.get(kind, "HalfDecode"), inputs, attributes, domain=DOMAIN)
        if kind == "matmul" or site.dtype == "float32":
            return made
        return builder.node("Cast", [made], {"to": codes[site.dtype]})

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        return [_function(name, text, opset) for name, text in _BODIES.items()]


_BODIES = {
    "HalfWeight": "(half, factor) => (w) { w = Mul (half, factor) }",
    "HalfDecode": "(half, factor) => (w) { w = com.onnxcomp.HalfWeight (half, factor) }",
    "HalfGather": "(i, half, factor) => (y) { w = Mul (half, factor) y = Gather (w, i) }",
    "HalfMatMul": (
        "(x, half, factor) => (y) { w = Mul (half, factor) t = Transpose <perm = [1, 0]> (w) "
        "c = Cast <to: int = @dtype> (t) y = MatMul (x, c) }"
    ),
}


def _function(name: str, text: str, opset: int) -> onnx.FunctionProto:
    attributes = "<group, dtype>" if name == "HalfMatMul" else "<group>"
    header = f'<opset_import: ["" : {opset}, "{DOMAIN}" : 1], domain: "{DOMAIN}">'
    return onnx.parser.parse_function(f"{header} {name} {attributes} {text}")


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> HalfCodec:
    """A codec with operators of its own whose results are exact; known to the registry."""
    from onnxcomp.passes.codecs import CODECS

    codec = HalfCodec()
    monkeypatch.setitem(CODECS, codec.name, codec)
    return codec


@pytest.fixture(scope="session")
def tools() -> Any:
    """The functions of this file."""
    return Tools


class Tools:
    """Builders and comparisons, for tests that cannot import this file."""

    build: Callable[..., onnx.ModelProto] = staticmethod(build)
    weight: Callable[..., Array] = staticmethod(weight)
    everything: Callable[..., onnx.ModelProto] = staticmethod(everything)
    everything_feeds: Callable[..., dict[str, Array]] = staticmethod(everything_feeds)
    differences: Callable[..., list[str]] = staticmethod(differences)
    proto_of: Callable[..., onnx.ModelProto] = staticmethod(proto_of)
    run: Callable[..., list[Any]] = staticmethod(run)

    @staticmethod
    def flat(outputs: Iterable[Any]) -> list[Array]:
        """All arrays in the outputs of a session, whatever they are nested in."""
        found: list[Array] = []
        for output in outputs:
            if isinstance(output, (list, tuple)):
                found += Tools.flat(output)
            elif isinstance(output, dict):
                found.append(np.array(list(output.values())))
            else:
                found.append(np.asarray(output))
        return found
