"""Back to plain dense ONNX."""

import json

import numpy as np
import onnx
import pytest

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs.dense import DenseCodec
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.ir.traversal import initializers, scopes
from onnxcomp.passes.lowering.expand import decode_site, expand
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import DOMAIN

MODES = ("auto", "fused", "folded", "decode")


def compressed(proto, codec, mode="auto"):
    model = load(proto)
    canonicalize(model)
    params = codec.params_type()
    sites = find_sites(model, min_size=0).sites
    payloads = [codec.encode(site, read_weight(model, site), params) for site in sites]
    pairs = zip(sites, payloads, strict=True)
    rewrite(model, [Placement(site, codec, payload, mode, params) for site, payload in pairs])
    return model


def expanded(tools, model):
    model = load(tools.proto_of(model))
    return model, expand(model)


@pytest.mark.parametrize("mode", MODES)
def test_weights_come_back_as_they_were(tools, half, mode):
    proto = tools.everything()
    small = compressed(proto, half, mode)
    model, change = expanded(tools, small)
    assert change.count == 8 and all("half became dense" in note for note in change.notes)
    original = load(proto)
    canonicalize(original)
    before, after = initializers(original), initializers(model)
    for name in read_manifest(small):
        one, two = before[name].const_value, after[name].const_value
        assert (one.dtype, list(one.shape)) == (two.dtype, list(two.shape))
        assert one.tobytes() == two.tobytes()
    for go in (True, False):
        feeds = {**tools.everything_feeds(), "go": np.array(go)}
        for first, second in zip(tools.run(small, feeds), tools.run(model, feeds), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_ours_is_left(tools, half, mode):
    proto = tools.everything()
    result = tools.proto_of(expanded(tools, compressed(proto, half, mode))[0])
    assert DOMAIN not in str(result) and "onnxcomp" not in str(result)
    assert not result.functions and result.opset_import == proto.opset_import
    assert result.graph.input == proto.graph.input and result.graph.output == proto.graph.output
    assert list(result.metadata_props) == list(proto.metadata_props)
    onnx.checker.check_model(result, full_check=True)


def test_folded_weights_leave_the_original_graph(tools, half):
    """Every node of the original is there again, and no other."""
    proto = tools.everything()
    result = tools.proto_of(expanded(tools, compressed(proto, half, "folded"))[0])
    assert [n.op_type for n in result.graph.node] == [n.op_type for n in proto.graph.node]


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_comes_back(tools, half, mode):
    proto = tools.build(
        "g (float16[N, 16] x, int64[M] i) => (float16[N, 8] y, float16[M, 8] e, float16[N, 8] s) {"
        " t = Transpose (w) y = MatMul (x, t) e = Gather (table, i) s = Gemm (x, flat) }",
        {
            "w": tools.weight(8, 16, dtype=np.float16),
            "table": tools.weight(16, 8, seed=1, dtype=np.float16),
            "flat": tools.weight(16, 8, seed=2, dtype=np.float16),
        },
    )
    small = compressed(proto, half, mode)
    model = expanded(tools, small)[0]
    for name in ("w", "table", "flat"):
        assert model.graph.initializers[name].const_value.numpy().dtype == np.float16
    feeds = {"x": tools.weight(3, 16, dtype=np.float16), "i": np.array([0, 5])}
    for first, second in zip(tools.run(small, feeds), tools.run(model, feeds), strict=True):
        np.testing.assert_array_equal(first, second)


def test_stored_shapes_of_more_axes_come_back(tools, half):
    proto = tools.build(
        "g (float[N, 16] x) => (float[N, 8] y) { r = Reshape (w, shape) y = MatMul (x, r) }",
        {"w": tools.weight(2, 8, 8), "shape": np.array([16, 8])},
    )
    small = compressed(proto, half)
    model = expanded(tools, small)[0]
    assert list(model.graph.initializers["w"].const_value.shape) == [2, 8, 8]
    feeds = {"x": tools.weight(3, 16)}
    np.testing.assert_array_equal(tools.run(small, feeds)[0], tools.run(model, feeds)[0])


@pytest.mark.parametrize("mode", MODES)
def test_lost_metadata_of_nodes_does_no_harm(tools, half, mode):
    small = compressed(tools.everything(), half, mode)
    for scope in scopes(small):
        for node in scope.graph:
            node.metadata_props.clear()
    model = expanded(tools, small)[0]
    result = tools.proto_of(model)
    assert DOMAIN not in {node.domain for node in result.graph.node} and not result.functions
    feeds = tools.everything_feeds()
    for first, second in zip(tools.run(small, feeds), tools.run(model, feeds), strict=True):
        np.testing.assert_array_equal(first, second)


def test_weights_are_decoded_one_at_a_time_when_written(tmp_path, tools, half, monkeypatch):
    small = compressed(tools.everything(), half)
    model = load(tools.proto_of(small))
    decoded = []
    monkeypatch.setattr(
        type(half),
        "decode",
        lambda self, site, payload: decoded.append(site.name) or payload.tensors["half"] * 2,
    )
    expand(model)
    assert decoded == []
    save(model, tmp_path / "dense.onnx")
    assert sorted(decoded) == sorted(read_manifest(small))


def test_a_single_weight_can_be_decoded(tools, half):
    small = compressed(tools.everything(), half)
    record = read_manifest(small)["fc1"]
    exact = onnx.numpy_helper.to_array(tools.everything().graph.initializer[1])
    np.testing.assert_array_equal(decode_site(small, record), exact.T)


def test_plain_models_stay_as_they_are(tools):
    for proto in (tools.everything(), tools.proto_of(compressed(tools.everything(), DenseCodec()))):
        model = load(proto)
        assert expand(model).count == 0
        assert tools.differences(proto, tools.proto_of(model)) == []


def test_a_lost_record_is_an_error_with_advice(tools, half):
    model = compressed(tools.everything(), half)
    del model.metadata_props["onnxcomp"]
    with pytest.raises(ModelError, match="metadata entry") as caught:
        expand(model)
    assert "before other tools" in caught.value.hint


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"version": 1}', "damaged"),
        ('{"version": 1, "recipes": [], "sites": {"emb": [0]}}', "damaged"),
        ('{"version": 9, "recipes": [], "sites": {}}', "newer version"),
    ],
)
def test_a_damaged_record_is_one_clear_error(tools, half, entry, message):
    model = compressed(tools.everything(), half)
    model.metadata_props["onnxcomp"] = entry
    with pytest.raises(ModelError, match=message):
        expand(model)


def test_missing_parts_are_named(tools, half):
    model = compressed(tools.everything(), half)
    entry = json.loads(model.metadata_props["onnxcomp"])
    entry["recipes"][0]["codec"] = "magic"
    model.metadata_props["onnxcomp"] = json.dumps(entry)
    with pytest.raises(ModelError, match="unknown codec: magic"):
        decode_site(model, read_manifest(model)["fc1"])
    model = compressed(tools.everything(), half)
    record = read_manifest(model)["fc1"]
    weight = model.graph.initializers["fc1::half"]
    weight.replace_all_uses_with(model.graph.initializers["fc2::half"])
    del model.graph.initializers["fc1::half"]
    with pytest.raises(ModelError, match="lacks its tensor 'fc1::half'"):
        decode_site(model, record)
