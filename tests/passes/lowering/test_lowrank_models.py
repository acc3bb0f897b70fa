"""Models with factors in the place of weights: standard operators, equal to their dense form."""

import numpy as np
import onnx
import pytest

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs.lowrank.codec import LowRankCodec, LowRankParams, break_even
from onnxcomp.passes.codecs.lowrank.hyper_lowrank import HyperLowRankCodec, HyperLowRankParams
from onnxcomp.passes.codecs.lowrank.lowrank_hyper import LowRankHyperCodec, LowRankHyperParams
from onnxcomp.passes.codecs.lowrank.lowrank_int import LowRankIntCodec, LowRankIntParams
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize

CODEC = LowRankCodec()
CODED = LowRankHyperCodec()
COMPOSED = {
    "lowrank+int": (LowRankIntCodec(), LowRankIntParams(32, 8)),
    "lowrank+hyper": (CODED, LowRankHyperParams(32, 4)),
    "hyper+lowrank": (HyperLowRankCodec(), HyperLowRankParams(2, 32)),
}
X2D = "float[N, 24, 12, 12] x"


def compressed(proto, rank=8, mode="auto"):
    model = load(proto)
    canonicalize(model)
    found = find_sites(model, min_size=0).sites
    sites = [s for s in found if CODEC.refuse(s) is None]
    placements = []
    for site in sites:
        params = LowRankParams(min(rank, break_even(site.rows, site.length)))
        payload = CODEC.encode(site, read_weight(model, site), params)
        placements.append(Placement(site, CODEC, payload, mode, params))
    rewrite(model, placements)
    return model


def thin(*shape, rank=5, seed=0, split=1):
    """A weight of low rank, read as a matrix whose rows are the first axes up to `split`."""
    rows, length = int(np.prod(shape[:split])), int(np.prod(shape[split:]))
    rng = np.random.default_rng([seed, *shape])
    product = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, length))
    return (product / np.sqrt(rank * length)).astype(np.float32).reshape(shape)


def operators(proto):
    return [node.op_type for node in proto.graph.node]


CONVOLUTIONS = {
    "plain": (f"g ({X2D}) => (float[N, 40, 10, 10] y) {{ y = Conv (x, w) }}", (40, 24, 3, 3)),
    "bias, strides, pads and dilations": (
        f"""g ({X2D}) => (float[N, 40, h, v] y) {{
        y = Conv <strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2], kernel_shape = [3, 3]>
            (x, w, b) }}""",
        (40, 24, 3, 3),
    ),
    "automatic pads": (
        f"g ({X2D}) => (float[N, 40, h, v] y) {{ y = Conv <auto_pad = 'SAME_UPPER'> (x, w, b) }}",
        (40, 24, 5, 3),
    ),
    "1 x 1": (f"g ({X2D}) => (float[N, 40, 12, 12] y) {{ y = Conv (x, w, b) }}", (40, 24, 1, 1)),
    "one axis": (
        "g (float[N, 24, 30] x) => (float[N, 40, l] y) { y = Conv <pads = [2, 2]> (x, w, b) }",
        (40, 24, 5),
    ),
    "transposed": (
        f"""g ({X2D}) => (float[N, 40, h, v] y) {{
        y = ConvTranspose <strides = [2, 2], output_padding = [1, 0], pads = [1, 1, 0, 0]>
            (x, w, b) }}""",
        (24, 40, 3, 3),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_becomes_two(tools, name):
    graph, shape = CONVOLUTIONS[name]
    graph = graph.replace("'", '"')
    weights = {"w": thin(*shape)} | ({"b": tools.weight(40)} if "b)" in graph else {})
    proto = tools.build(graph, weights)
    small = compressed(proto)
    written = tools.proto_of(small)
    used = operators(written)
    assert [op for op in used if "Conv" in op] in (["Conv"] * 2, ["Conv", "ConvTranspose"])
    assert not written.functions
    assert all(not node.domain for node in written.graph.node)
    onnx.checker.check_model(written, full_check=True)
    size = (2, 24, 30) if "30]" in graph else (2, 24, 12, 12)
    feeds = {"x": tools.weight(*size, seed=3)}
    for first, second in zip(tools.run(load(proto), feeds), tools.run(small, feeds), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_split_convolutions_are_joined_again(tools, name):
    graph, shape = CONVOLUTIONS[name]
    graph = graph.replace("'", '"')
    weights = {"w": thin(*shape)} | ({"b": tools.weight(40)} if "b)" in graph else {})
    proto = tools.build(graph, weights)
    dense = load(tools.proto_of(compressed(proto)))
    assert expand(dense).count == 1
    back = tools.proto_of(dense)
    assert [list(n.input) for n in back.graph.node] == [list(n.input) for n in proto.graph.node]
    assert [n.attribute for n in back.graph.node] == [n.attribute for n in proto.graph.node]
    assert back.opset_import == proto.opset_import
    assert "onnxcomp" not in str(back)
    [found] = [t for t in back.graph.initializer if t.name == "w"]
    np.testing.assert_allclose(onnx.numpy_helper.to_array(found), weights["w"], atol=1e-6)


RECURRENT = {
    "LSTM": ("LSTM <hidden_size = 48>", (1, 192), (1, 192, 48)),
    "both directions": (
        'LSTM <hidden_size = 32, direction = "bidirectional">',
        (2, 128),
        (2, 128, 32),
    ),
    "GRU": ("GRU <hidden_size = 48, linear_before_reset = 1>", (1, 144), (1, 144, 48)),
    "RNN": ("RNN <hidden_size = 64>", (1, 64), (1, 64, 64)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_input_weights_of_recurrent_operators_are_split(tools, name):
    operator, gates, recurrence = RECURRENT[name]
    graph = f"g (float[7, 2, 40] x) => (float[7, d, 2, h] y) {{ y = {operator} (x, w, r) }}"
    weights = {"w": thin(*gates, 40, split=2), "r": tools.weight(*recurrence) / 16}
    proto = tools.build(graph, weights)
    model = load(proto)
    canonicalize(model)
    [site] = [s for s in find_sites(model, min_size=0).sites if s.name == "w"]
    params = LowRankParams(8)
    payload = CODEC.encode(site, read_weight(model, site), params)
    rewrite(model, [Placement(site, CODEC, payload, "auto", params)])
    written = tools.proto_of(model)
    assert "MatMul" in operators(written)
    onnx.checker.check_model(written, full_check=True)
    feeds = {"x": tools.weight(7, 2, 40, seed=3)}
    for first, second in zip(tools.run(load(proto), feeds), tools.run(model, feeds), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)
    dense = load(written)
    expand(dense)
    back = tools.proto_of(dense)
    assert [list(n.input) for n in back.graph.node] == [["x", "w", "r"]]
    for first, second in zip(tools.run(load(proto), feeds), tools.run(dense, feeds), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)


def test_convolutions_in_groups_keep_the_dense_form_which_is_folded(tools):
    graph = f"g ({X2D}) => (float[N, 40, 10, 10] y) {{ y = Conv <group = 2> (x, w) }}"
    proto = tools.build(graph, {"w": thin(40, 12, 3, 3)})
    small = compressed(proto)
    written = tools.proto_of(small)
    assert operators(written) == ["MatMul", "Reshape", "Conv"]
    feeds = {"x": tools.weight(2, 24, 12, 12, seed=3)}
    for first, second in zip(tools.run(load(proto), feeds), tools.run(small, feeds), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)


@pytest.mark.parametrize("mode", ["auto", "folded", "decode"])
def test_a_model_equals_its_expanded_form_and_uses_standard_operators(tools, mode):
    proto = tools.everything()
    small = compressed(proto, 16, mode)
    names = read_manifest(small)
    assert {"emb", "fc1", "fc2", "fc3", "lstm_w", "outer"} <= set(names)
    written = tools.proto_of(small)
    assert all(not node.domain for node in written.graph.node)
    assert not written.functions
    assert written.opset_import == proto.opset_import
    onnx.checker.check_model(written, full_check=True)
    dense = load(written)
    assert expand(dense).count == len(names)
    back = tools.proto_of(dense)
    assert "onnxcomp" not in str(back)
    onnx.checker.check_model(back, full_check=True)
    for go in (True, False):
        feeds = {**tools.everything_feeds(), "go": np.array(go)}
        for first, second in zip(tools.run(small, feeds), tools.run(dense, feeds), strict=True):
            np.testing.assert_allclose(first, second, rtol=2e-5, atol=2e-5)


def test_products_of_one_weight_in_a_row_are_told_apart(tools):
    proto = tools.build(
        "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, u) y = MatMul (a, u) }",
        {"u": thin(64, 64)},
    )
    small = compressed(proto)
    assert operators(tools.proto_of(small)) == ["MatMul"] * 4
    dense = load(tools.proto_of(small))
    expand(dense)
    back = tools.proto_of(dense)
    assert [list(n.input) for n in back.graph.node] == [["x", "u"], ["a", "u"]]


def test_a_tied_table_is_stored_once_for_look_ups_and_products(tools):
    proto = tools.build(
        """g (int64[N] ids) => (float[N, 200] y) {
        x = Gather <axis = 0> (table, ids) t = Transpose <perm = [1, 0]> (table)
        y = MatMul (x, t) }""",
        {"table": thin(200, 64)},
    )
    small = compressed(proto)
    written = tools.proto_of(small)
    assert sum(t.dims[0] * t.dims[-1] for t in written.graph.initializer) == 8 * (200 + 64)
    feeds = {"ids": np.array([3, 199, 0, 3])}
    for first, second in zip(tools.run(load(proto), feeds), tools.run(small, feeds), strict=True):
        np.testing.assert_allclose(first, second, atol=2e-5)


@pytest.mark.parametrize("mode", ["auto", "folded", "decode"])
@pytest.mark.parametrize("name", COMPOSED)
def test_codecs_of_several_equal_their_expanded_form(tools, name, mode):
    codec, params = COMPOSED[name]
    proto = tools.everything()
    model = load(proto)
    canonicalize(model)
    sites = [s for s in find_sites(model, min_size=0).sites if codec.refuse(s) is None]
    placements = [
        Placement(site, codec, codec.encode(site, read_weight(model, site), params), mode, params)
        for site in sites
    ]
    rewrite(model, placements)
    assert {"emb", "fc1", "fc2", "fc3", "lstm_w"} <= set(read_manifest(model))
    written = tools.proto_of(model)
    onnx.checker.check_model(written)
    dense = load(written)
    assert expand(dense).count == len(sites)
    back = tools.proto_of(dense)
    assert "onnxcomp" not in str(back)
    onnx.checker.check_model(back, full_check=True)
    feeds = tools.everything_feeds()
    for first, second in zip(tools.run(model, feeds), tools.run(dense, feeds), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-3, atol=1e-3)


def test_two_products_of_integers_need_no_library(tools):
    proto = tools.build(
        "g (float[N, 96] x) => (float[N, 64] y) { y = MatMul (x, w) }", {"w": thin(96, 64)}
    )
    model = load(proto)
    canonicalize(model)
    [site] = find_sites(model, min_size=0).sites
    codec, params = LowRankIntCodec(), LowRankIntParams(8, 8, 32)
    payload = codec.encode(site, read_weight(model, site), params)
    rewrite(model, [Placement(site, codec, payload, "auto", params)])
    written = tools.proto_of(model)
    assert set(operators(written)) == {"MatMulNBits", "Mul", "Add"}  # 8 bits: twice 4
    assert {opset.domain for opset in written.opset_import} == {"", "com.microsoft"}
    assert not written.functions
    # The bases of the factors, and so their rounding, differ with the LAPACK of a machine.
    stored = codec.decode(site, payload)
    assert np.linalg.norm(stored - thin(96, 64).T) < 0.03 * np.linalg.norm(stored)
    x = tools.weight(5, 96, seed=3)
    np.testing.assert_allclose(tools.run(model, {"x": x})[0], x @ stored.T, rtol=1e-4, atol=1e-4)


def test_two_coded_products_take_the_place_of_one(tools):
    proto = tools.build(
        "g (float[N, 96] x) => (float[N, 64] y) { y = MatMul (x, w) }", {"w": thin(96, 64)}
    )
    model = load(proto)
    canonicalize(model)
    [site] = find_sites(model, min_size=0).sites
    params = LowRankHyperParams(32, 6, 8)
    payload = CODED.encode(site, read_weight(model, site), params)
    rewrite(model, [Placement(site, CODED, payload, "auto", params)])
    written = tools.proto_of(model)
    assert operators(written) == ["HyperMatMul", "HyperMatMul"]
    dense = load(written)
    expand(dense)
    assert [list(n.input) for n in tools.proto_of(dense).graph.node] == [["x", "w"]]
