"""Large weights are expanded in parts, inlined, without copies: the same values, and a way back."""

import collections

import numpy as np
import onnxruntime
import pytest

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.traversal import scopes
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.lowering.row_parts import largest_part
from onnxcomp.passes.report.form import form_of
from onnxcomp.passes.transforms.canonicalize import canonicalize

CONV = (
    "g (float[1, 96, 4, 4] x) => (float[1, 90, 4, 4] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w) }"
)


def placed(proto):
    model = load(proto)
    canonicalize(model)
    codec, found = CODECS["hyper"], []
    for site in find_sites(model, min_size=0).sites:
        payload = codec.encode(site, read_weight(model, site), codec.params_type())
        found.append(Placement(site, codec, payload, "folded", codec.params_type()))
    return model, found


def operators(model):
    return collections.Counter(node.op_type for scope in scopes(model) for node in scope.graph)


def ran(tools, model, x):
    content = tools.proto_of(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("opset", [8, 13, 21])
@pytest.mark.parametrize("shape", [(200, 96, 3, 3), (200, 96, 1, 1), (100, 128, 1, 1)])
def test_parts_are_the_whole(tools, shape, opset):
    text = CONV.replace("96", str(shape[1])).replace("90", str(shape[0]))
    text = text.replace("pads = [1, 1, 1, 1]", f"pads = [{', '.join([str(shape[2] // 2)] * 4)}]")
    weight = tools.weight(shape[0], int(np.prod(shape[1:]))).reshape(shape)
    proto = tools.build(text, {"w": weight}, opset=opset)
    x = np.random.default_rng(0).standard_normal((1, shape[1], 4, 4)).astype(np.float32)
    whole, found = placed(proto)
    rewrite(whole, found)
    parts, found = placed(proto)
    rewrite(parts, found, largest=weight.nbytes // 3)
    assert operators(parts)["Concat"] == 1 and operators(parts)["HyperWeight"] >= 3
    np.testing.assert_array_equal(ran(tools, parts, x), ran(tools, whole, x))
    expand(parts)
    expand(whole)
    assert operators(parts) == operators(whole)
    np.testing.assert_array_equal(ran(tools, parts, x), ran(tools, whole, x))


def test_a_transposed_weight_is_cut_along_its_columns(tools):
    text = "g (float[2, 300] x) => (float[2, 200] y) { y = MatMul (x, w) }"
    proto = tools.build(text, {"w": tools.weight(300, 200)})
    x = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    whole, found = placed(proto)
    assert found[0].site.transposed
    rewrite(whole, found)
    parts, found = placed(proto)
    rewrite(parts, found, largest=64 * 300 * 4)
    assert operators(parts)["HyperWeight"] == 4
    np.testing.assert_array_equal(ran(tools, parts, x), ran(tools, whole, x))


def test_small_weights_stay_whole(tools):
    proto = tools.build(CONV, {"w": tools.weight(90, 864).reshape(90, 96, 3, 3)})
    model, found = placed(proto)
    lower(model, found)
    assert operators(model)["Slice"] == 1 and operators(model)["Conv"] == 1  # of one weight
    assert largest_part([found[0].site]) > 4 * found[0].site.size


def test_what_expands_a_weight_is_inlined_without_copies(tools):
    proto = tools.build(CONV, {"w": tools.weight(90, 864).reshape(90, 96, 3, 3)})
    x = np.random.default_rng(0).standard_normal((1, 96, 4, 4)).astype(np.float32)
    called, found = placed(proto)
    rewrite(called, found)
    model, found = placed(proto)
    lower(model, found)
    assert not model.functions and operators(model)["HyperWeight"] == 0
    # 90 rows are cut from 96, 864 columns from 896: the Slice has to stay.
    assert operators(model)["Slice"] == 1
    np.testing.assert_array_equal(ran(tools, model, x), ran(tools, called, x))
    expand(model)
    assert operators(model) == {"Conv": 1}
    even = tools.build(CONV.replace("90", "64"), {"w": tools.weight(64, 864).reshape(64, 96, 3, 3)})
    model, found = placed(even)
    assert found[0].payload.attributes["extent"] != (64, 864)  # stored flat
    lower(model, found)
    counts = operators(model)
    # Codes, scales, the weights of each byte, a table, and the shape of the weight.
    assert (counts["Slice"], counts["Reshape"]) == (0, 5) and counts["Flatten"] <= 5


def test_products_stay_calls(tools):
    text = "g (float[N, 256] x) => (float[N, 256] y) { y = MatMul (x, w) }"
    model, found = placed(tools.build(text, {"w": tools.weight(256, 256)}))
    found = [Placement(p.site, p.codec, p.payload, "auto", p.params) for p in found]
    lower(model, found)
    assert operators(model)["HyperMatMul"] == 1 and form_of(model).name == "functions"
