"""Finding weights: uses, orientation, reasons."""

import dataclasses

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize


def found_in(proto, **options):
    model = load(proto)
    canonicalize(model)
    return model, find_sites(model, **{"min_size": 0, **options})


def only_site(proto, **options):
    model, found = found_in(proto, **options)
    assert len(found.sites) == 1, found
    return model, found.sites[0]


def needs(site):
    return [(use.op_type, use.input_index, use.need) for use in site.uses]


def reasons(proto, **options):
    return {tensor.name: tensor.reason for tensor in found_in(proto, **options)[1].skipped}


def test_every_weight_of_a_model_is_found_with_all_its_uses(tools):
    found = found_in(tools.everything())[1]
    uses = {site.name: needs(site) for site in found.sites}
    product = [("MatMul", 1, "matmul")]
    assert uses == {
        "emb": [("Gather", 0, "gather"), *product],
        "fc1": product,
        "fc2": product,
        "fc3": [("Gemm", 1, "matmul")],
        "outer": product,
        "lstm_w": [("LSTM", 1, "dense")],
        "lstm_r": [("LSTM", 2, "dense")],
        "own": product,
    }
    scopes = {site.name: site.scope for site in found.sites if site.scope}
    assert scopes == {"own": "If.else_branch"}
    tied = found.sites[0]
    assert tied.uses[1].path == ("Transpose",) and not tied.transposed
    assert {tensor.name: tensor.reason for tensor in found.skipped} == {
        "bias": "vector or scalar: at most one dimension is greater than 1"
    }


CASES = {
    "MatMul": ("y = MatMul (x, w)", (16, 8), (8, 16, True), "matmul"),
    "Gemm": ("y = Gemm (x, w)", (16, 8), (8, 16, True), "matmul"),
    "Gemm transB": ("y = Gemm <transB = 1> (x, w)", (8, 16), (8, 16, False), "matmul"),
    "Transpose": (
        "t = Transpose (w) y = MatMul (x, t)",
        (8, 16), (8, 16, False), "matmul",
    ),
    "two Transposes": (
        "t = Transpose (w) u = Transpose <perm = [1, 0]> (t) y = MatMul (x, u)",
        (16, 8), (8, 16, True), "matmul",
    ),
    "Identity": ("i = Identity (w) y = MatMul (x, i)", (16, 8), (8, 16, True), "matmul"),
    "Cast": ("c = Cast <to = 1> (w) y = MatMul (x, c)", (16, 8), (8, 16, True), "matmul"),
    "Flatten": ("f = Flatten <axis = 2> (w) y = MatMul (x, f)", (4, 4, 8), (8, 16, True), "matmul"),
    "Squeeze": ("f = Squeeze (w, zero) y = MatMul (x, f)", (1, 16, 8), (8, 16, True), "matmul"),
    "Reshape": ("r = Reshape (w, shape) y = MatMul (x, r)", (2, 8, 8), (8, 16, True), "matmul"),
    "Reshape of a Transpose": (
        "t = Transpose (w) r = Reshape (t, shape) y = MatMul (x, r)",
        (4, 32), (4, 32, False), "dense",
    ),
    "Cast to an integer": (
        "c = Cast <to = 7> (w) d = Cast <to = 1> (c) y = MatMul (x, d)",
        (16, 8), (16, 8, False), "dense",
    ),
    "product from the left": ("y = MatMul (w, x)", (8, 4), (8, 4, False), "dense"),
    "Gemm from the left": ("y = Gemm (w, x)", (8, 4), (8, 4, False), "dense"),
    "table addition": ("y = Add (x, w)", (4, 16), (4, 16, False), "dense"),
    "Conv": ("y = Conv (x, w)", (6, 5, 3, 3), (6, 45, False), "dense"),
    "ConvTranspose": ("y = ConvTranspose (x, w)", (6, 5, 3, 3), (6, 45, False), "dense"),
    "batched product": ("y = MatMul (x, w)", (3, 16, 8), (24, 16, True), "batch"),
    "foreign operator": ("y = com.microsoft.Attention (x, w)", (16, 8), (16, 8, False), "dense"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_canonical_matrix_suits_the_use(tools, case):
    nodes, shape, expected, need = CASES[case]
    constants = {"zero": np.array([0]), "shape": np.array([16, -1])}
    used = {name: value for name, value in constants.items() if name in nodes}
    proto = tools.build(
        f"g (float[4, 16] x) => (float[4, 8] y) {{ {nodes} }}",
        {"w": tools.weight(*shape), **used},
    )
    model, site = only_site(proto)
    assert (site.rows, site.length, site.transposed) == expected
    assert site.shape == shape and site.uses[-1].need == need
    stored = numpy_helper.to_array(proto.graph.initializer[0])
    rows, length, transposed = expected
    if need == "batch":  # each matrix by itself
        stored, transposed = stored.swapaxes(1, 2), False
    matrix = stored.reshape(length, rows).T if transposed else stored.reshape(rows, length)
    np.testing.assert_array_equal(read_weight(model, site), matrix)


@pytest.mark.parametrize(
    ("axis", "need"), [(0, "gather"), (-2, "gather"), (1, "dense"), (-1, "dense")]
)
def test_only_whole_rows_are_looked_up(tools, axis, need):
    proto = tools.build(
        f"g (int64[3] i) => (float[a, b] y) {{ y = Gather <axis = {axis}> (w, i) }}",
        {"w": tools.weight(16, 8)},
    )
    site = only_site(proto)[1]
    assert (site.rows, site.length, site.transposed) == (16, 8, False)
    assert needs(site) == [("Gather", 0, need)]


def test_uses_along_the_other_axis_are_dense(tools):
    proto = tools.build(
        """
        g (float[N, 16] x, float[N, 8] z, int64[M] i) => (float a, float b, float c, float d) {
            a = MatMul (x, w)
            t = Transpose (w)
            b = MatMul (z, t)
            c = Gather (w, i)
            d = Gemm <transB = 1> (x, t)
        }
        """,
        {"w": tools.weight(16, 8)},
    )
    site = only_site(proto)[1]
    assert (site.rows, site.length, site.transposed) == (8, 16, True)
    assert needs(site) == [
        ("MatMul", 1, "matmul"),
        ("MatMul", 1, "dense"),
        ("Gather", 0, "dense"),
        ("Gemm", 1, "matmul"),
    ]


def test_a_node_that_reads_a_weight_twice_needs_it_dense(tools):
    proto = tools.build(
        "g (float[2] x) => (float[16, 16] y) { y = MatMul (w, w) }", {"w": tools.weight(16, 16)}
    )
    assert needs(only_site(proto)[1]) == [("MatMul", 0, "dense"), ("MatMul", 1, "dense")]


def test_a_way_that_is_also_an_output_ends_there(tools):
    proto = tools.build(
        "g (float[N, 8] x) => (float[N, 16] y, float[8, 16] t) "
        "{ t = Transpose (w) y = MatMul (x, t) }",
        {"w": tools.weight(16, 8)},
    )
    assert needs(only_site(proto)[1]) == [("Transpose", 0, "dense")]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_of_three_types_are_read_as_float32(tools, dtype):
    values = tools.weight(16, 8, dtype=dtype)
    kind = {2: "float16" if dtype is np.float16 else "bfloat16", 4: "float"}[values.itemsize]
    proto = tools.build(f"g ({kind}[N, 16] x) => ({kind}[N, 8] y) {{ y = MatMul (x, w) }}")
    proto.graph.initializer.append(numpy_helper.from_array(values, "w"))
    model, site = only_site(proto)
    weight = read_weight(model, site)
    assert weight.dtype == np.float32 and weight.shape == (8, 16)
    np.testing.assert_array_equal(weight, values.T.astype(np.float32))
    assert site.dtype == np.dtype(dtype).name and site.nbytes == values.nbytes


def test_an_aligned_weight_is_not_copied(tmp_path, tools):
    from onnxcomp.passes.ir.model import save

    proto = tools.build(
        "g (float[N, 64] x) => (float[N, 64] y) { y = Gemm <transB = 1> (x, w) }",
        {"w": tools.weight(64, 64)},
    )
    save(load(proto), tmp_path / "m.onnx", external_data="always")
    model, site = only_site(tmp_path / "m.onnx")
    weight = read_weight(model, site)
    assert not weight.flags.owndata and not weight.flags.writeable and weight.flags.aligned


def product(tools, values, **options):
    graph = "g (float[N, 16] x) => (float[N, 8] y) { y = MatMul (x, w) }"
    return tools.build(graph, {"w": values}, **options)


def test_patterns_choose_by_tensor_or_node(tools):
    names = {site.name for site in found_in(tools.everything())[1].sites}
    chosen = found_in(tools.everything(), include=["^fc"], exclude=["^Gemm$"])[1]
    assert {site.name for site in chosen.sites} == {"fc1", "fc2"}
    why = {tensor.name: tensor.reason for tensor in chosen.skipped}
    assert why["fc3"] == "excluded by '^Gemm$'" and why["emb"] == "matches no --include pattern"
    assert set(why) == names - {"fc1", "fc2"} | {"bias"}
    with pytest.raises(UsageError, match="not a regular expression"):
        found_in(tools.everything(), include=["("])


def test_small_tensors_say_how_small(tools):
    why = reasons(product(tools, tools.weight(16, 8)), min_size=513)
    assert why == {"w": "smaller than the minimum size (513 bytes)"}
    assert reasons(product(tools, tools.weight(16, 8)), min_size=512) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(tools, bad, dtype):
    values = tools.weight(16, 8, dtype=dtype)
    values[7, 3] = bad
    proto = product(tools, tools.weight(16, 8))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
    assert reasons(proto) == {"w": "contains NaN or infinite values"}


def test_the_outside_keeps_its_say(tools):
    listed = product(tools, tools.weight(16, 8), listed=True)
    assert "overridable graph input" in reasons(listed)["w"]
    assert len(found_in(listed, freeze_inputs=True)[1].sites) == 1
    old = product(tools, tools.weight(16, 8), listed=True, ir_version=3, opset=8)
    assert len(found_in(old)[1].sites) == 1
    returned = product(tools, tools.weight(16, 8))
    returned.graph.output.append(helper.make_tensor_value_info("w", 1, [16, 8]))
    assert reasons(returned) == {"w": "graph output"}
    unused = tools.build(
        "g (float[N] x) => (float[N] y) { y = Relu (x) }", {"w": tools.weight(4, 4)}
    )
    assert reasons(unused) == {"w": "not used by any node"}


def test_models_of_old_operator_sets_are_left_alone(tools):
    assert "older than 7" in reasons(product(tools, tools.weight(16, 8), opset=6))["w"]
    foreign = product(tools, tools.weight(16, 8))
    foreign.opset_import[0].domain = "com.example"
    assert "no standard operator set" in reasons(foreign)["w"]
    named = product(tools, tools.weight(16, 8))
    named.opset_import[0].domain = "ai.onnx"
    assert len(found_in(named)[1].sites) == 1


def test_every_other_tensor_has_its_reason(tools):
    proto = tools.build(
        """
        g (float[N, 16] x) => (float[N, 8] y, double[16, 8] d, float[N, 8] q) {
            w8 = DequantizeLinear (codes, scale)
            q = MatMul (x, w8)
            d = Relu (wide)
            s = Reshape (x, target)
            y = MatMul (s, w)
        }
        """,
        {
            "codes": np.zeros((16, 8), np.int8),
            "scale": np.array(0.5, np.float32),
            "wide": np.zeros((16, 8)),
            "target": np.array([-1, 16]),
            "w": tools.weight(16, 8),
            "numbers": np.zeros((16, 8), np.int64),
        },
    )
    why = reasons(proto)
    assert why == {
        "codes": "quantised already (DequantizeLinear)",
        "scale": "quantised already (DequantizeLinear)",
        "target": "integers int64, which no codec stores",
        "numbers": "integers int64, which no codec stores",
    }
    # Small integers, such as shapes, are not worth a line.
    assert set(reasons(proto, min_size=64)) == {"codes", "scale", "numbers"}


def test_float64_weights_are_read_as_float32_and_told_apart(tools):
    proto = tools.build(
        "g (double[N, 16] x) => (double[N, 8] y) { y = MatMul (x, w) }",
        {"w": np.random.default_rng(0).standard_normal((16, 8))},
    )
    model, found = found_in(proto)
    (site,) = found.sites
    assert (site.dtype, site.stored_dtype, site.nbytes) == ("float32", "float64", 16 * 8 * 8)
    assert [use.need for use in site.uses] == ["dense"]
    assert read_weight(model, site).dtype == np.float32


def test_a_weight_given_to_a_function_is_a_site(tools):
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 17], domain: "test"> Linear (x, w) => (y) { y = MatMul (x, w) }'
    )
    proto = tools.build(
        "g (float[N, 16] x) => (float[N, 8] y) { y = test.Linear (x, w) }",
        {"w": tools.weight(16, 8)},
        functions=[body],
    )
    assert needs(only_site(proto)[1]) == [("test::Linear", 1, "dense")]


def test_sparse_initializers_have_a_reason():
    graph = onnx.parser.parse_graph("g (float[2, 4] x) => (float[2, 4] y) { y = Add (x, s) }")
    values = numpy_helper.from_array(np.array([3.0], np.float32), "s")
    indices = numpy_helper.from_array(np.array([1], np.int64))
    graph.sparse_initializer.add(values=values, indices=indices, dims=[2, 4])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert reasons(proto) == {"s": "sparse initializer"}


def test_inner_names_hide_outer_ones(tools):
    """The branch has its own w: the outer one is used by the main graph alone."""
    outer, own = tools.weight(16, 16), tools.weight(16, 16, seed=1)
    proto = tools.build(
        """
        g (float[N, 16] x, bool c) => (float[N, 16] y) {
            h = MatMul (x, w)
            y = If (c) <
                then_branch = yes () => (float[N, 16] a) { a = MatMul (h, w) },
                else_branch = no () => (float[N, 16] b) { b = Identity (h) }
            >
        }
        """,
        {"w": outer},
        inner={"yes": {"w": own}},
    )
    model, found = found_in(proto)
    assert [(site.scope, needs(site)) for site in found.sites] == [
        ("", [("MatMul", 1, "matmul")]),
        ("If.then_branch", [("MatMul", 1, "matmul")]),
    ]
    np.testing.assert_array_equal(read_weight(model, found.sites[1]), own.T)


def test_names_must_be_unique_first(tools):
    with pytest.raises(ModelError, match="no name of its own"):
        find_sites(load(tools.everything()))


def test_a_site_of_another_model_cannot_be_read(tools):
    model, found = found_in(tools.everything())
    lost = dataclasses.replace(found.sites[0], name="lost")
    with pytest.raises(ModelError, match="no initializer 'lost'"):
        read_weight(model, lost)


SIGNAL = """
signal (float[1, 64] sound, bool go) => (float[A, B, C] y, float[D, E, F] z) {
    axis = Constant <value_ints = [1]> ()
    line = Unsqueeze (sound, axis)
    half = Mul (line, scale)
    y = Conv <strides = [8]> (half, first)
    r = Relu (y)
    z = If (go) <
        then_branch = yes () => (float[D, E, F] a) { a = Conv (line, captured) },
        else_branch = no () => (float[D, E, F] b) { b = Conv (r, second) }
    >
}
"""


def test_filters_of_raw_inputs_are_marked(tools):
    weights = {
        "scale": tools.weight(1),
        "first": tools.weight(16, 1, 16),
        "captured": tools.weight(8, 1, 16, seed=1),
        "second": tools.weight(8, 16, 3),
    }
    found = found_in(tools.build(SIGNAL, weights))[1]
    marked = {site.name: site.filters_input for site in found.sites}
    assert marked == {"first": True, "captured": True, "second": False}
