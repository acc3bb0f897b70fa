"""Chains of linear maps are folded where that is exact and pays, and left alone elsewhere."""

import numpy as np
import onnx
import pytest

from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.fold_linear_chains import LinearChains, fold_linear_chains
from onnxcomp.passes.transforms.pass_manager import Context, run_passes
from onnxcomp.passes.transforms.registry import GRAPH_PASSES

IMAGE = "float[N, 12, 11, 11] x"


def fold(proto, **options):
    model = load(proto)
    canonicalize(model)
    return model, fold_linear_chains(model, **options)


def check(tools, proto, feeds, folded, operators):
    """Fold, compare outputs, and compare the operators that are left."""
    model, change = fold(proto)
    written = tools.proto_of(model)
    assert change.count == folded
    assert [node.op_type for node in written.graph.node] == operators
    onnx.checker.check_model(written, full_check=True)
    assert [o.name for o in written.graph.output] == [o.name for o in proto.graph.output]
    for first, second in zip(tools.run(load(proto), feeds), tools.run(model, feeds), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=2e-5)
    return written


def weights_of(tools, **shapes):
    return {n: tools.weight(*s, seed=i) / 4 for i, (n, s) in enumerate(shapes.items())}


PRODUCTS = {
    "two": ("h = MatMul(x, a) y = MatMul(h, b)", 1),
    "three": ("h = MatMul(x, a) i = MatMul(h, a2) y = MatMul(i, b)", 2),
    "inner bias": ("h = MatMul(x, a) i = Add(h, c) y = MatMul(i, b)", 1),
    "both biases": ("h = MatMul(x, a) i = Add(c, h) j = MatMul(i, b) y = Add(j, d)", 1),
    "scalar bias": ("h = MatMul(x, a) i = Add(h, s) y = MatMul(i, b)", 1),
    "bias with an axis more": ("h = MatMul(x, a) i = Add(h, c1) y = MatMul(i, b)", 0),
    "bias of each row": ("h = MatMul(x, a) i = Add(h, f) y = MatMul(i, b)", 0),
    "two Gemm": (
        "h = Gemm<alpha=3.0, beta=0.5>(x, a, c) y = Gemm<alpha=0.5, beta=2.0, transB=1>(h, bt, d)",
        1,
    ),
    "Gemm and product": ("h = Gemm<transB=1>(x, a, c1) y = MatMul(h, b)", 1),
    "product and Gemm": ("h = MatMul(x, a) y = Gemm(h, b)", 1),
    "input transposed": ("t = Transpose<perm=[1,0]>(x) h = Gemm<transA=1>(t, a) y = Gemm(h, b)", 1),
    "middle transposed": ("h = Gemm(x, a) y = Gemm<transA=1>(h, e)", 0),
    "weight transposed": ("t = Transpose(bt) h = MatMul(x, a) y = MatMul(h, t)", 1),
    "something in between": ("h = MatMul(x, a) i = Relu(h) y = MatMul(i, b)", 0),
    "used twice": ("h = MatMul(x, a) i = MatMul(h, b) j = MatMul(h, b2) y = Add(i, j)", 0),
    "thin": ("h = MatMul(x, thin) y = MatMul(h, wide)", 0),
    "weight on the left": ("h = MatMul(x, a) y = MatMul(b5, h)", 0),
}
LEFT = {
    "inner bias": ["MatMul", "Add"],
    "both biases": ["MatMul", "Add", "Add"],
    "scalar bias": ["MatMul", "Add"],
    "two Gemm": ["Gemm"],
    "Gemm and product": ["Gemm"],
    "product and Gemm": ["Gemm"],
    "input transposed": ["Transpose", "Gemm"],
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_a_row(tools, name):
    body, folded = PRODUCTS[name]
    shapes = {
        "a": (20, 20), "a2": (20, 20), "b": (20, 9), "b2": (20, 9), "bt": (9, 20), "c": (20,),
        "c1": (1, 20), "d": (9,), "s": (), "e": (5, 3), "f": (5, 20), "thin": (20, 3),
        "wide": (3, 20), "b5": (4, 5),
    }  # fmt: skip
    used = {n: s for n, s in shapes.items() if n in words(body)}
    graph = f"g (float[5, 20] x) => (float[r, m] y) {{ {body} }}"
    proto = tools.build(graph, weights_of(tools, **used))
    left = LEFT.get(name, ["MatMul"]) if folded else [node.op_type for node in proto.graph.node]
    written = check(tools, proto, {"x": tools.weight(5, 20, seed=9)}, folded, left)
    if folded:
        sizes = [sum(np.prod(t.dims) for t in p.graph.initializer) for p in (written, proto)]
        assert sizes[0] < sizes[1]


def words(text):
    return "".join(c if c.isalnum() else " " for c in text).split()


CONVOLUTIONS = {
    "points behind": (
        "h = Conv<pads=[1,1,1,1], strides=[2,1], dilations=[1,2]>(x, a, c) y = Conv(h, p, d)",
        1,
    ),
    "points with a stride behind": (
        "h = Conv<pads=[2,1,1,1], strides=[2,1]>(x, a, c) y = Conv<strides=[1,3]>(h, p)",
        1,
    ),
    "points behind automatic pads": (
        'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, a) y = Conv(h, p, d)',
        1,
    ),
    "a stride behind automatic pads": (
        'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, a) y = Conv<strides=[2,2]>(h, p)',
        0,
    ),
    "padded points behind": ("h = Conv(x, a, c) y = Conv<pads=[1,1,1,1]>(h, p, d)", 0),
    "points before": ("h = Conv(x, q, e) y = Conv<strides=[2,2]>(h, a, c)", 1),
    "points before a padded window": ("h = Conv(x, q) y = Conv<pads=[1,1,1,1]>(h, a, c)", 1),
    "points with a bias before a padded window": (
        "h = Conv(x, q, e) y = Conv<pads=[1,1,1,1]>(h, a, c)",
        0,
    ),
    "points with a stride before": ("h = Conv<strides=[2,2]>(x, q) y = Conv(h, a, c)", 0),
    "padded points, then points": ("h = Conv<pads=[1,0,0,1]>(x, q, e) y = Conv(h, q2, f)", 1),
    "groups": ("h = Conv<group=2>(x, g) y = Conv(h, p, d)", 0),
    "two windows": ("h = Conv(x, a) y = Conv(h, w)", 0),
    "three": ("h = Conv<pads=[1,1,1,1]>(x, a) i = Conv(h, r) y = Conv(i, p, d)", 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_a_row(tools, name):
    body, folded = CONVOLUTIONS[name]
    shapes = {
        "a": (12, 12, 3, 3), "p": (7, 12, 1, 1), "q": (12, 12, 1, 1), "q2": (12, 12, 1, 1),
        "c": (12,), "d": (7,), "e": (12,), "f": (12,), "g": (12, 6, 3, 3), "w": (4, 12, 3, 3),
        "r": (12, 12, 1, 1),
    }  # fmt: skip
    graph = f"g ({IMAGE}) => (float[N, m, h0, w0] y) {{ {body} }}"
    used = {n: s for n, s in shapes.items() if n in words(body)}
    proto = tools.build(graph, weights_of(tools, **used))
    feeds = {"x": tools.weight(2, 12, 11, 11, seed=9)}
    check(tools, proto, feeds, folded, ["Conv"] * (body.count("Conv") - folded))


def chain(tools, **options):
    graph = """g (float[N, 20] x) => (float[N, 9] y) {
        [first] h = MatMul (x, a)  [second] y = MatMul (h, b) }"""
    return tools.build(graph, weights_of(tools, a=(20, 20), b=(20, 9)), **options)


def test_what_is_excluded_not_included_or_small_is_left_alone(tools):
    for options in (
        {"exclude": ("^a$",)},
        {"exclude": ("second",)},
        {"include": ("^b$",)},
        {"min_size": 20000},
    ):
        assert fold(chain(tools), **options)[1].count == 0, options
    assert fold(chain(tools), include=("^a$", "second"), min_size=2000)[1].count == 1


def test_weights_that_can_be_overridden_are_left_alone(tools):
    listed = chain(tools, listed=True)
    assert fold(listed)[1].count == 0
    assert fold(listed, freeze_inputs=True)[1].count == 1
    assert fold(chain(tools, listed=True, ir_version=3))[1].count == 1


def test_values_that_are_returned_stay(tools):
    proto = tools.build(
        """g (float[N, 20] x) => (float[N, 20] h, float[N, 9] y) {
        h = MatMul(x, a) y = MatMul(h, b) }""",
        weights_of(tools, a=(20, 20), b=(20, 9)),
    )
    assert fold(proto)[1].count == 0


def test_half_precision_products_that_overflow_are_left_alone(tools):
    weights = {n: np.full((20, 20), 300.0, np.float16) for n in ("a", "b")}
    graph = "g (float16[N, 20] x) => (float16[N, 20] y) { h = MatMul(x, a) y = MatMul(h, b) }"
    assert fold(tools.build(graph, weights))[1].count == 0
    smaller = {n: w / np.float16(300) for n, w in weights.items()}
    model, change = fold(tools.build(graph, smaller))
    assert change.count == 1
    [weight] = tools.proto_of(model).graph.initializer
    assert weight.data_type == onnx.TensorProto.FLOAT16


def test_a_weight_that_others_read_is_folded_only_where_it_still_pays(tools):
    graph = """g (float[N, 20] x) => (float[N, 9] y, float[N, 20] z) {
        h = MatMul (x, a)  y = MatMul (h, b)  z = MatMul(x, a) }"""
    proto = tools.build(graph, weights_of(tools, a=(20, 20), b=(20, 9)))
    feeds = {"x": tools.weight(5, 20, seed=9)}
    check(tools, proto, feeds, 1, ["MatMul", "MatMul"])  # 20 x 9 in the place of 20 x 9
    proto = tools.build(graph.replace("b)", "b2)").replace("9]", "20]"),
                        weights_of(tools, a=(20, 20), b2=(20, 20)))  # fmt: skip
    check(tools, proto, feeds, 1, ["MatMul", "MatMul"])


def test_chains_in_subgraphs_are_folded(tools):
    graph = """g (float[N, 20] x, bool go) => (float[N, 9] y) {
        y = If (go) <
            then_branch = yes () => (float[N, 9] p) { h = MatMul (x, a)  p = MatMul (h, b) },
            else_branch = no () => (float[N, 9] q) { q = MatMul (x, b) }
        > }"""
    proto = tools.build(graph, weights_of(tools, a=(20, 20), b=(20, 9)))
    model, change = fold(proto)
    assert change.count == 1
    feeds = {"x": tools.weight(5, 20, seed=9), "go": np.array(True)}
    for first, second in zip(tools.run(load(proto), feeds), tools.run(model, feeds), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=2e-5)


def test_the_pass_runs_where_values_may_change(tools):
    for method, count in ((("auto",), 1), (("dense",), 0), (("dense", "fp16"), 0)):
        model = load(chain(tools))
        context = Context(Settings(method=method, min_size=0))
        done = run_passes(model, context, GRAPH_PASSES)
        assert LinearChains.name in done or not count
