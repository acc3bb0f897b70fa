"""Models to GraphSurgeon and back."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxcomp.passes.ir.loader import from_gs
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.traversal import scopes

gs = pytest.importorskip("onnx_graphsurgeon", reason="GraphSurgeon is an extra")
graphsurgeon = pytest.importorskip("onnxcomp.passes.ir.graphsurgeon")


def rich(tools):
    """The model with everything, and everything GraphSurgeon would drop."""
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 17], domain: "test"> Twice (a) => (b) { b = Add (a, a) }'
    )
    body.metadata_props.add(key="origin", value="tests")
    model = tools.everything()
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("test", 1))
    model.graph.node.add(op_type="Twice", domain="test", input=["side"], output=["more"])
    model.graph.output.append(helper.make_tensor_value_info("more", 1, ["N", 48]))
    model.graph.node[2].metadata_props.add(key="note", value="kept")
    model.graph.metadata_props.add(key="graph", value="kept")
    model.graph.initializer[0].metadata_props.add(key="tensor", value="kept")
    model.graph.initializer.append(numpy_helper.from_array(tools.weight(3), "unused"))
    model.graph.quantization_annotation.add(tensor_name="h")
    model.graph.quantization_annotation[0].quant_parameter_tensor_names.add(key="SCALE", value="s")
    model.graph.value_info.append(helper.make_tensor_value_info("loose", 1, [7]))
    model.model_version = 7
    return model


def test_a_round_trip_changes_nothing(tools):
    model = rich(tools)
    graph = graphsurgeon.to_gs(load(model))
    assert isinstance(graph, gs.Graph)
    assert tools.differences(model, tools.proto_of(from_gs(graph))) == []
    # The graph may be used again.
    assert tools.differences(model, tools.proto_of(load(graph))) == []


def test_listed_initializers_stay_listed(tools):
    for ir_version in (3, 8):
        model = tools.build(
            "g (float[N, 16] x) => (float[N, 8] y) { y = MatMul (x, w) }",
            {"w": tools.weight(16, 8)},
            listed=True,
            ir_version=ir_version,
            opset=8,
        )
        result = tools.proto_of(from_gs(graphsurgeon.to_gs(load(model))))
        assert tools.differences(model, result) == []


def test_captured_weights_stay_where_they_were(tools):
    model = from_gs(graphsurgeon.to_gs(load(tools.everything())))
    owned = {scope.path: set(scope.graph.initializers) for scope in scopes(model) if scope.path}
    assert sorted(map(sorted, owned.values())) == [[], ["own"]]
    assert "outer" in model.graph.initializers


def test_edits_arrive(tools):
    proto = rich(tools)
    graph = graphsurgeon.to_gs(load(proto))
    by_op = {node.op: node for node in graph.nodes}
    by_op["Relu"].op = "Tanh"
    fc1 = graph.tensors()["fc1"]
    fc1.values = np.asarray(fc1.values * 2, np.float32)
    extra = gs.Variable("extra", np.float32, ["N", 128])
    graph.nodes.append(gs.Node("Neg", inputs=[graph.tensors()["h"]], outputs=[extra]))
    graph.outputs.append(extra)
    graph.outputs[0].shape = [1, "classes"]
    result = tools.proto_of(from_gs(graph))
    ops = [node.op_type for node in result.graph.node]
    assert "Tanh" in ops and "Relu" not in ops and "Neg" in ops
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in result.graph.initializer}
    exact = numpy_helper.to_array(proto.graph.initializer[1])
    np.testing.assert_array_equal(tensors["fc1"], exact * 2)
    assert result.graph.output[0].type.tensor_type.shape.dim[1].dim_param == "classes"
    assert [value.name for value in result.graph.output][-1] == "extra"
    assert result.graph.node[1].doc_string == "the first product"
    assert result.doc_string == proto.doc_string


def test_removed_parts_stay_removed(tools):
    graph = graphsurgeon.to_gs(load(rich(tools)))
    graph.outputs = [value for value in graph.outputs if value.name != "logits"]
    result = tools.proto_of(from_gs(graph.cleanup()))
    assert "LSTM" not in {node.op_type for node in result.graph.node}
    assert not {"lstm_w", "lstm_r"} & {tensor.name for tensor in result.graph.initializer}
    onnx.checker.check_model(result)


EXOTIC = [
    dtype
    for dtype in ir.DataType
    if dtype.name.startswith(("FLOAT8", "INT4", "UINT4", "FLOAT4", "BFLOAT", "INT2", "UINT2"))
]


def exotic_model(dtype):
    ones = np.ones((3, 5)).astype(dtype.numpy())
    tensor = ir.serde.serialize_tensor(ir.Tensor(ones, dtype=dtype, name="w"))
    info = helper.make_tensor_value_info("y", dtype.value, [3, 5])
    node = helper.make_node("Identity", ["w"], ["y"])
    graph = helper.make_graph([node], "g", [], [info], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("dtype", EXOTIC, ids=lambda dtype: dtype.name)
def test_rare_types_survive_read_or_unread(tools, dtype):
    model = exotic_model(dtype)
    graph = graphsurgeon.to_gs(load(model))
    assert tools.differences(model, tools.proto_of(from_gs(graph))) == []
    constant = graph.tensors()["w"]
    values = np.ones((3, 5)).astype(dtype.numpy())
    constant._values = values
    assert tools.differences(model, tools.proto_of(from_gs(graph))) == []
    assert constant._values is values


def test_a_graph_made_by_hand_is_read(tools):
    x = gs.Variable("x", np.float32, ["N", 16])
    y = gs.Variable("y", np.float32, ["N", 8])
    weight = gs.Constant("w", tools.weight(16, 8))
    half = gs.Constant("b", np.ones(8).astype(ml_dtypes.bfloat16))
    node = gs.Node("MatMul", inputs=[x, weight], outputs=[y])
    cast = gs.Node("Cast", attrs={"to": 1}, inputs=[half], outputs=[gs.Variable("c")])
    graph = gs.Graph([node, cast], [x], [y], opset=17, ir_version=8)
    model = load(graph)
    feeds = {"x": tools.weight(3, 16, seed=1)}
    np.testing.assert_allclose(
        tools.run(model, feeds)[0], feeds["x"] @ weight.values, rtol=1e-5, atol=1e-5
    )
    assert model.graph.initializers["b"].const_value.dtype == ir.DataType.BFLOAT16
