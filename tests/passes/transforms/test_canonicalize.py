"""Canonical form: named nodes, constants as initializers, equal weights once."""

import numpy as np
import onnx
import pytest

from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.traversal import scopes
from onnxcomp.passes.transforms.canonicalize import canonicalize

BRANCHES = """
g (float[N, 16] x, bool c) => (float[N, 16] y) {
    y = If (c) <
        then_branch = yes () => (float[N, 16] a) { a = MatMul (x, w) },
        else_branch = no () => (float[N, 16] b) { b = MatMul (x, w) }
    >
}
"""


def branches(tools, first, second):
    return tools.build(BRANCHES, inner={"yes": {"w": first}, "no": {"w": second}})


def branch_feeds(tools, go):
    return {"x": tools.weight(3, 16, seed=5), "c": np.array(go)}


def agree(tools, one, two, feeds):
    for first, second in zip(tools.run(one, feeds), tools.run(two, feeds), strict=True):
        np.testing.assert_array_equal(first, second)


def weight_names(model):
    return [name for scope in scopes(model) for name in scope.graph.initializers]


def test_every_node_gets_a_name_of_its_own(tools):
    proto = tools.everything()
    proto.graph.node[1].name = proto.graph.node[3].name = "product"
    model = load(proto)
    change = canonicalize(model)
    names = [node.name for scope in scopes(model) for node in scope.graph]
    assert all(names) and len(set(names)) == len(names)
    assert names[1] == "product" and names[3] == "product_2"
    assert change.count == len(names) - 1


def test_a_canonical_model_does_not_change_again(tools):
    model = load(tools.everything())
    canonicalize(model)
    assert canonicalize(model).count == 0


def test_matrices_in_constants_become_initializers(tools):
    proto = tools.build(
        """
        g (float[N, 16] x, bool c) => (float[N, 16] y, float[16, 16] seen) {
            w = Constant () seen = Constant () b = Constant ()
            h = MatMul (x, w)
            i = Add (h, b)
            y = If (c) <
                then_branch = yes () => (float[N, 16] a) { v = Constant () a = MatMul (i, v) },
                else_branch = no () => (float[N, 16] d) { d = MatMul (i, w) }
            >
        }
        """
    )
    values = {
        "w": tools.weight(16, 16), "v": tools.weight(16, 16, seed=1),
        "seen": tools.weight(16, 16, seed=2), "b": tools.weight(16),
    }  # fmt: skip

    def fill(graph):
        for node in graph.node:
            for attribute in node.attribute:
                fill(attribute.g)
            if node.op_type == "Constant":
                tensor = onnx.numpy_helper.from_array(values[node.output[0]], node.output[0])
                node.attribute.append(onnx.helper.make_attribute("value", tensor))

    fill(proto.graph)
    model = load(proto)
    change = canonicalize(model)
    assert {scope.path: list(scope.graph.initializers) for scope in scopes(model)} == {
        "": ["w"],
        "If.then_branch": ["v"],
        "If.else_branch": [],
    }
    assert [note.split()[1] for note in change.notes] == ["w", "v"]
    for go in (True, False):
        agree(tools, proto, model, branch_feeds(tools, go))


def test_in_ir_3_lifted_constants_are_listed_as_inputs(tools):
    proto = tools.build(
        "g (float[N, 16] x) => (float[N, 16] y) { w = Constant () y = MatMul (x, w) }",
        ir_version=3,
        opset=8,
    )
    tensor = onnx.numpy_helper.from_array(tools.weight(16, 16))
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("value", tensor))
    model = load(proto)
    canonicalize(model)
    result = tools.proto_of(model)
    assert [value.name for value in result.graph.input] == ["x", "w"]
    onnx.checker.check_model(result, full_check=True)
    agree(tools, proto, result, {"x": tools.weight(2, 16)})


def test_branches_with_equal_names_get_distinct_ones(tools):
    proto = branches(tools, tools.weight(16, 16), tools.weight(16, 16, seed=1))
    model = load(proto)
    change = canonicalize(model)
    assert weight_names(model) == ["w", "w_2"]
    assert change.notes == ("initializer w in If.else_branch was renamed to w_2",)
    for go in (True, False):
        agree(tools, proto, model, branch_feeds(tools, go))


@pytest.mark.parametrize("transposed", [False, True])
def test_equal_weights_of_two_branches_move_to_the_main_graph(tools, transposed):
    values = tools.weight(16, 16)
    proto = branches(tools, values, values.T if transposed else values)
    model = load(proto)
    canonicalize(model)
    assert len(weight_names(model)) == 1 and len(model.graph.initializers) == 1
    onnx.checker.check_model(tools.proto_of(model), full_check=True)
    for go in (True, False):
        agree(tools, proto, model, branch_feeds(tools, go))


def test_equal_weights_are_stored_once(tools):
    values = tools.weight(32, 16)
    proto = tools.build(
        """
        g (int64[N] i, float[N, 32] x) => (float[N, 16] e, float[N, 16] y, float[N, 32] z) {
            e = Gather (first, i)
            y = MatMul (x, second)
            z = MatMul (e, third)
        }
        """,
        {"first": values, "second": values, "third": values.T.copy()},
    )
    model = load(proto)
    change = canonicalize(model)
    assert weight_names(model) == ["first"]
    assert change.notes == (
        "second equals first and is stored once",
        "third is the transpose of first and is stored once",
    )
    feeds = {"i": np.array([3, -1]), "x": tools.weight(2, 32, seed=3)}
    agree(tools, proto, model, feeds)
    untouched = load(proto)
    canonicalize(untouched, deduplicate=False)
    assert weight_names(untouched) == ["first", "second", "third"]


def test_bit_patterns_count_and_not_values(tools):
    first, second = tools.weight(16, 16), tools.weight(16, 16)
    first[3, 3] = 0.0
    second[3, 3] = -0.0
    graph = "g (float[N, 16] x) => (float[N, 16] z) { y = MatMul (x, a) z = MatMul (y, b) }"
    model = load(tools.build(graph, {"a": first, "b": second}))
    canonicalize(model)
    assert weight_names(model) == ["a", "b"]
    first[3, 3] = second[3, 3] = np.nan
    model = load(tools.build(graph, {"a": first, "b": second}))
    canonicalize(model)
    assert weight_names(model) == ["a"]


def test_other_types_shapes_and_small_tensors_are_not_merged(tools):
    values = tools.weight(16, 16)
    weights = {
        "a": values,
        "b": values.astype(np.float16),
        "c": values.reshape(8, 32),
        "d": values[:4, :4].copy(),
        "e": values[:4, :4].copy(),
    }
    proto = tools.build("g (float[N, 16] x) => (float[N, 16] y) { y = Relu (x) }", weights)
    model = load(proto)
    canonicalize(model)
    assert weight_names(model) == list(weights)


def test_overridable_and_returned_weights_are_not_merged(tools):
    values = tools.weight(16, 16)
    graph = "g (float[N, 16] x) => (float[N, 16] z) { y = MatMul (x, a) z = MatMul (y, b) }"
    for ir_version, expected in ((8, ["a", "b"]), (3, ["a"])):
        proto = tools.build(
            graph, {"a": values, "b": values}, listed=True, ir_version=ir_version, opset=8
        )
        model = load(proto)
        canonicalize(model)
        assert weight_names(model) == expected
        listed = [value.name for value in tools.proto_of(model).graph.input]
        assert listed == ["x", *expected]
    proto = tools.build(graph, {"a": values, "b": values})
    proto.graph.output.append(onnx.helper.make_tensor_value_info("b", 1, [16, 16]))
    model = load(proto)
    canonicalize(model)
    assert weight_names(model) == ["a", "b"]
