"""Functions whose bodies hold weights: inlined where that is safe, named where it is not."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize

LAYER = """
<opset_import: ["" : 17, "test" : 1], domain: "test"> Layer <axis> (x, b) => (y) {
    w = Constant ()
    p = MatMul (x, w)
    s = test.Shift (p, b)
    y = Concat <axis: int = @axis> (s, p)
}
"""
SHIFT = '<opset_import: ["" : 17], domain: "test"> Shift (x, b) => (y) { y = Add (x, b) }'
OUTER = """
<opset_import: ["" : 17, "test" : 1], domain: "test"> Outer (x, b) => (y) {
    y = test.Layer <axis = 1> (x, b)
}
"""
CALLS = """
g (float[N, 32] x, bool go) => (float[N, 64] y, float[N, 64] z) {
    y = test.Outer (x, b)
    z = If (go) <
        then_branch = yes () => (float[N, 64] a) { a = test.Layer <axis = -1> (x, b) },
        else_branch = no () => (float[N, 64] c) { c = Identity (y) }
    >
}
"""


def function(text, **constants):
    body = onnx.parser.parse_function(text)
    for node in body.node:
        if node.op_type == "Constant" and node.output[0] in constants:
            tensor = numpy_helper.from_array(constants[node.output[0]])
            node.attribute.append(helper.make_attribute("value", tensor))
    return body


def layered(tools, **options):
    functions = [function(SHIFT), function(LAYER, w=tools.weight(32, 32)), function(OUTER)]
    weights = {"b": tools.weight(32)}
    return tools.build(CALLS, weights, functions=functions, **options)


def canonical(proto):
    model = load(proto)
    change = canonicalize(model)
    return model, change


def agree(tools, one, two, feeds):
    for first, second in zip(tools.run(one, feeds), tools.run(two, feeds), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("go", [True, False])
def test_weights_of_nested_functions_become_one_site(tools, go):
    proto = layered(tools)
    model, change = canonical(proto)
    feeds = {"x": tools.weight(3, 32, seed=2), "go": np.array(go)}
    agree(tools, proto, model, feeds)
    assert [key[1] for key in model.functions] == ["Shift"]
    assert [note for note in change.notes if "inlined" in note] == [
        "function test::Layer was inlined",
        "function test::Outer was inlined",
    ]
    (site,) = find_sites(model, min_size=0).sites
    assert [use.need for use in site.uses] == ["matmul", "matmul"]
    onnx.checker.check_model(tools.proto_of(model), full_check=True)


def test_a_canonical_model_stays(tools):
    model = canonical(layered(tools))[0]
    assert canonicalize(model).count == 0


def test_users_see_the_same_outputs_and_a_smaller_file(tools, tmp_path):
    proto = layered(tools)
    table = function(
        '<opset_import: ["" : 17], domain: "test"> Table (i) => (y) '
        "{ t = Constant () y = Gather (t, i) }",
        t=tools.weight(200, 64),
    )
    proto.functions.append(table)
    proto.graph.input.append(helper.make_tensor_value_info("i", 7, ["M"]))
    proto.graph.output.append(helper.make_tensor_value_info("row", 1, ["M", 64]))
    proto.graph.node.append(helper.make_node("Table", ["i"], ["row"], domain="test"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    result = oc.optimize(path, tmp_path / "small.onnx", bits=4, min_size=1024)
    assert result.report.coverage == 1.0 and result.verify.passed
    after = onnx.load(tmp_path / "small.onnx")
    assert [value.name for value in after.graph.output] == ["y", "z", "row"]
    assert result.report.output.bytes < path.stat().st_size / 2


BODIES = {
    "another operator set": '<opset_import: ["" : 16], domain: "test"> F (x) => (y) '
    "{ w = Constant () y = MatMul (x, w) }",
    "an output that is an input": '<opset_import: ["" : 17], domain: "test"> F (x) => (y, x) '
    "{ w = Constant () y = MatMul (x, w) }",
    "one value returned twice": '<opset_import: ["" : 17], domain: "test"> F (x) => (y, y) '
    "{ w = Constant () y = MatMul (x, w) }",
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_cannot_be_moved_stay_and_are_listed(tools, case):
    body = function(BODIES[case], w=tools.weight(32, 32))
    outputs = ", ".join(f"float[N, 32] y{index}" for index in range(len(body.output)))
    names = ", ".join(f"y{index}" for index in range(len(body.output)))
    proto = tools.build(
        f"g (float[N, 32] x) => ({outputs}) {{ {names} = test.F (x) }}", functions=[body]
    )
    model = canonical(proto)[0]
    assert len(model.functions) == 1
    (tensor,) = find_sites(model, min_size=0).skipped
    assert tensor.name == "test::F/w" and tensor.bytes == 4096 and tensor.uses == ("MatMul",)
    assert tensor.reason == "in the body of function test::F, which cannot be inlined"


def test_functions_without_weights_stay(tools):
    body = function(SHIFT)
    proto = tools.build(
        "g (float[N, 32] x) => (float[N, 32] y) { y = test.Shift (x, b) }",
        {"b": tools.weight(32)},
        functions=[body],
    )
    model = canonical(proto)[0]
    assert tools.differences(proto, tools.proto_of(model)) == []


def test_new_names_hide_no_others(tools):
    """The body and the graph around it use the same names for different things."""
    body = function(
        '<opset_import: ["" : 17], domain: "test"> F (x) => (y) '
        "{ w = Constant () h = MatMul (x, w) y = Relu (h) }",
        w=tools.weight(32, 32),
    )
    proto = tools.build(
        "g (float[N, 32] a) => (float[N, 32] y) "
        "{ h = test.F (a) w = test.F (h) s = Add (w, h) y = Neg (s) }",
        functions=[body],
    )
    model = canonical(proto)[0]
    agree(tools, proto, model, {"a": tools.weight(3, 32, seed=4)})
    assert list(model.graph.initializers) == ["test::F/w"]


def test_a_weight_given_to_a_function_is_compressed(tools, tmp_path):
    body = function(
        '<opset_import: ["" : 17], domain: "test"> Linear (x, w) => (y) { y = MatMul (x, w) }'
    )
    proto = tools.build(
        "g (float[N, 64] x) => (float[N, 96] y) { y = test.Linear (x, w) }",
        {"w": tools.weight(64, 96)},
        functions=[body],
    )
    onnx.save(proto, tmp_path / "model.onnx")
    result = oc.optimize(tmp_path / "model.onnx", tmp_path / "small.onnx", min_size=0)
    assert result.verify.passed and result.report.coverage == 1.0
