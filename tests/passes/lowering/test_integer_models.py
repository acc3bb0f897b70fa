"""Models with integer weights: stock operators only, equal to their expanded form, and back."""

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize

CODEC = IntegerCodec()


def compressed(proto, params, mode="auto"):
    model = load(proto)
    canonicalize(model)
    sites = [s for s in find_sites(model, min_size=0).sites if CODEC.refuse(s) is None]
    payloads = [CODEC.encode(site, read_weight(model, site), params) for site in sites]
    pairs = zip(sites, payloads, strict=True)
    rewrite(model, [Placement(site, CODEC, payload, mode, params) for site, payload in pairs])
    return model


def domains(proto):
    graphs, found = [proto.graph], set()
    while graphs:
        for node in graphs.pop().node:
            found.add(node.domain)
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return found


@pytest.mark.parametrize("mode", ["auto", "folded", "decode"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_equals_its_expanded_form(tools, mode, bits):
    proto = tools.everything()
    small = compressed(proto, IntegerParams(bits, 32), mode)
    names = read_manifest(small)
    assert len(names) >= 6
    written = tools.proto_of(small)
    dense = load(written)
    assert expand(dense).count == len(names)
    for go in (True, False):
        feeds = {**tools.everything_feeds(), "go": np.array(go)}
        for first, second in zip(tools.run(small, feeds), tools.run(dense, feeds), strict=True):
            np.testing.assert_allclose(first, second, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("mode", ["auto", "folded", "decode"])
def test_only_stock_operators_are_used_and_nothing_is_left_after_expanding(tools, mode):
    proto = tools.everything()
    written = tools.proto_of(compressed(proto, IntegerParams(8, 32), mode))
    assert domains(written) <= domains(proto) | {"com.microsoft"}
    assert not written.functions
    onnx.checker.check_model(written, full_check=True)
    result = load(written)
    expand(result)
    back = tools.proto_of(result)
    assert "onnxcomp" not in str(back) and back.opset_import == proto.opset_import
    assert [n.op_type for n in back.graph.node if n.op_type == "MatMul"]
    onnx.checker.check_model(back, full_check=True)


def test_products_in_a_row_are_told_apart(tools):
    proto = tools.build(
        "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, u) y = MatMul (a, v) }",
        {"u": tools.weight(64, 64), "v": tools.weight(64, 64, seed=1)},
    )
    for bits in (4, 8):
        small = compressed(proto, IntegerParams(bits))
        dense = load(tools.proto_of(small))
        expand(dense)
        back = tools.proto_of(dense)
        assert [(n.op_type, len(n.input)) for n in back.graph.node] == [("MatMul", 2)] * 2
        x = {"x": tools.weight(3, 64, seed=2)}
        for first, second in zip(tools.run(small, x), tools.run(dense, x), strict=True):
            np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-4)


def test_the_opset_of_an_old_model_stays(tools):
    proto = tools.build(
        "g (float[N, 128] x) => (float[N, 32] y) { y = MatMul (x, w) }",
        {"w": tools.weight(128, 32)},
        opset=7,
    )
    written = tools.proto_of(compressed(proto, IntegerParams(4, 32)))
    assert {i.domain: i.version for i in written.opset_import} == {"": 7, "com.microsoft": 1}
    session = onnxruntime.InferenceSession(written.SerializeToString())
    assert session.run(None, {"x": np.ones((1, 128), np.float32)})[0].shape == (1, 32)


def test_expanding_without_the_metadata_of_nodes_is_an_error(tools):
    small = compressed(tools.everything(), IntegerParams())
    for node in small.graph:
        node.metadata_props.clear()
    with pytest.raises(ModelError, match="still read"):
        expand(small)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_are_right_where_a_session_folds_nothing(tools, bits, optimized, dtype):
    # Sessions fold no nodes of float16, and MatMulNBits takes scales of a node for zeros.
    letters = {"float32": "float", "float16": "float16"}[dtype]
    weight = tools.weight(96, 64).astype(dtype)
    proto = tools.build(
        f"g ({letters}[N, 96] x) => ({letters}[N, 64] y) {{ y = MatMul (x, w) }}", {"w": weight}
    )
    written = tools.proto_of(compressed(proto, IntegerParams(bits)))
    options = onnxruntime.SessionOptions()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(written.SerializeToString(), options)
    x = tools.weight(5, 96, seed=2).astype(dtype)
    (y,) = session.run(None, {"x": x})
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    assert np.linalg.norm(y - expected) < {4: 0.12, 8: 0.01}[bits] * np.linalg.norm(expected)
