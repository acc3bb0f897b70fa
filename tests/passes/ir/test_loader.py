"""Loading models: every source, every way a file can be wrong."""

import os
import types

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.ir.model import copy_model, load
from onnxcomp.passes.ir.tensors import MappedTensor
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize


def stored(tmp_path, model, name="model.onnx"):
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


def external_model(location="weights.bin", offset=0, length=1024, shape=(16, 16)):
    """x @ w with w external, and the bytes of w."""
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    info = [helper.make_tensor_value_info(name, 1, ["N", 16]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", info[:1], info[1:], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


VALUES = np.arange(256, dtype=np.float32).reshape(16, 16)


def test_weights_of_a_file_stay_in_it(tmp_path, tools):
    model = tools.everything()
    loaded = load(stored(tmp_path, model))
    for tensor in model.graph.initializer:
        found = loaded.graph.initializers[tensor.name].const_value
        assert isinstance(found, MappedTensor) == (len(tensor.raw_data) >= 1024)
        np.testing.assert_array_equal(found.numpy(), numpy_helper.to_array(tensor))
        assert found.numpy().flags.aligned
    assert tools.differences(model, tools.proto_of(loaded)) == []


def test_objects_are_never_changed(tools, half):
    proto = tools.everything()
    model = ir.from_proto(tools.everything())
    for source, frozen in (
        (proto, lambda: proto.SerializeToString(deterministic=True)),
        (model, lambda: ir.to_proto(model).SerializeToString(deterministic=True)),
    ):
        before = frozen()
        work = load(source)
        canonicalize(work)
        sites = find_sites(work, min_size=0).sites
        params = half.candidates(sites[0])[0]
        rewrite(
            work, [Placement(s, half, half.encode(s, read_weight(work, s), params)) for s in sites]
        )
        tools.proto_of(work)
        assert frozen() == before


def test_torch_programs_are_read_by_their_model(tools):
    model = tools.everything()
    # ONNX IR does not keep whether an initializer has a value_info entry.
    del model.graph.value_info[1]
    for program in (
        types.SimpleNamespace(model=ir.from_proto(model)),
        types.SimpleNamespace(model_proto=model),
    ):
        assert tools.differences(model, tools.proto_of(load(program))) == []


def test_other_objects_are_refused_by_type():
    with pytest.raises(UsageError, match=r"builtins\.dict"):
        load({"graph": 1})


def test_missing_files_and_folders_are_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# a model card\n",
        b"\x00" * 64,
        b"{}",
        onnx.ModelProto(ir_version=8).SerializeToString(),
    ],
    ids=["empty", "text", "zeros", "json", "no graph"],
)
def test_what_is_no_model_is_one_clear_error(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        load(path)


def test_a_truncated_model_is_one_clear_error(tmp_path, tools):
    data = tools.everything().SerializeToString()
    path = tmp_path / "cut.onnx"
    for end in range(100, len(data) - 200, 9973):
        path.write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"cut\.onnx"):
            load(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_files_load_or_are_refused(tmp_path, tools, data):
    content = bytearray(tools.everything().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        # The structure is at both ends; what lies between are weights.
        near = st.one_of(st.integers(0, 1500), st.integers(len(content) - 2500, len(content) - 1))
        content[data.draw(near)] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    try:
        model = load(path)
    except ModelError as error:
        assert "damaged.onnx" in error.message
    else:
        assert isinstance(model, ir.Model)


def test_a_value_nobody_makes_is_refused(tools):
    model = tools.build("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    model.graph.node[0].input[0] = "lost"
    with pytest.raises(ModelError, match="reads 'lost'"):
        load(model)
    model.graph.node[0].input[0] = "x"
    model.graph.output[0].name = "lost"
    with pytest.raises(ModelError, match="output 'lost'"):
        load(model)


@pytest.mark.parametrize(
    ("domain", "operator"),
    [("", "MatMul"), ("", "Identity"), ("", "Loop"), ("com.microsoft", "FusedMatMul")],
)
def test_a_node_without_outputs_is_refused(tools, domain, operator):
    """Nothing can be put in its place."""
    model = tools.build("g (float[4] x) => (float[4] y) { y = Relu (x) }")
    model.graph.node.add(op_type=operator, domain=domain, input=["x", "x"])
    with pytest.raises(ModelError, match="has no output"):
        load(model)
    model.graph.node[1].CopyFrom(onnx.NodeProto(op_type="Log", domain="com.other", input=["x"]))
    load(model)


@pytest.mark.parametrize("field", ["exporter", "torch 2.9", "product.0"])
def test_text_that_is_no_utf8_is_refused(tmp_path, tools, field):
    """Protobuf gives it back as bytes, which nothing behind the loader expects."""
    model = tools.everything()
    model.graph.node[0].name = "product.0"
    model.graph.node[0].metadata_props.add(key="exporter", value="torch 2.9")
    content = model.SerializeToString()
    assert content.count(field.encode()) == 1
    path = tmp_path / "model.onnx"
    path.write_bytes(content.replace(field.encode(), b"\xff" + field.encode()[1:]))
    with pytest.raises(ModelError, match=r"no strings|not a string"):
        load(path)


def test_a_wrong_number_of_bytes_is_refused(tmp_path, tools):
    model = tools.build(
        "g (float[2, 20] x) => (float[2, 20] y) { y = MatMul (x, w) }", {"w": tools.weight(20, 20)}
    )
    for data in (bytes(1596), bytes(40)):
        model.graph.initializer[0].raw_data = data
        for source in (model, stored(tmp_path, model)):
            with pytest.raises(ModelError, match=r"float32 \[20, 20\] and needs 1600 bytes"):
                load(source)


# External data


def test_external_weights_are_mapped_in_place(tmp_path, tools):
    (tmp_path / "weights.bin").write_bytes(bytes(64) + VALUES.tobytes())
    loaded = load(stored(tmp_path, external_model(offset=64)))
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    np.testing.assert_array_equal(tensor.numpy(), VALUES)


def test_a_missing_length_means_all_of_the_tensor(tmp_path):
    model = external_model()
    del model.graph.initializer[0].external_data[1:]
    (tmp_path / "weights.bin").write_bytes(VALUES.tobytes())
    tensor = load(stored(tmp_path, model)).graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), VALUES)


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../weights.bin", "a/../../weights.bin", "C:\\weights.bin", "", ".", "a\0b"],
)
def test_locations_outside_the_folder_are_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(VALUES.tobytes())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(stored(folder, external_model(location)))


def test_links_out_of_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(VALUES.tobytes())
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(stored(folder, external_model()))


def test_a_content_addressed_cache_of_links_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "1234").write_bytes(VALUES.tobytes())
    stored(blobs, external_model(), "abcd")
    (snapshot / "weights.bin").symlink_to(blobs / "1234")
    (snapshot / "model.onnx").symlink_to(blobs / "abcd")
    tensor = load(snapshot / "model.onnx").graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), VALUES)


def test_hard_links_are_read(tmp_path):
    (tmp_path / "first.bin").write_bytes(VALUES.tobytes())
    os.link(tmp_path / "first.bin", tmp_path / "weights.bin")
    assert load(stored(tmp_path, external_model())).graph.initializers["w"].const_value.nbytes


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (external_model(), "cut short"),
        (external_model(offset=900), "cut short"),
        (external_model(length=512), "needs 1024 bytes, but 512"),
        (external_model("absent.bin"), "cannot be read"),
        (external_model("folder"), "not a regular file"),
    ],
)
def test_data_files_that_do_not_fit_are_refused(tmp_path, model, message):
    (tmp_path / "weights.bin").write_bytes(VALUES.tobytes()[:1000])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match=message) as caught:
        load(stored(tmp_path, model))
    assert "'w'" in caught.value.message and caught.value.exit_code == 5


def test_a_negative_offset_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(VALUES.tobytes())
    with pytest.raises(ModelError, match="offset"):
        load(stored(tmp_path, external_model(offset=-4)))


def test_a_message_with_external_data_needs_a_path(tmp_path):
    with pytest.raises(ModelError, match="without a path"):
        load(external_model())


def test_external_tensors_of_an_ir_model_keep_their_folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(VALUES.tobytes())
    model = ir.load(stored(tmp_path, external_model()))
    tensor = load(model).graph.initializers["w"].const_value
    np.testing.assert_array_equal(tensor.numpy(), VALUES)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


# What ONNX IR has no form for


def sparse_model():
    values = numpy_helper.from_array(np.array([3.0, 4.0], np.float32), "s")
    linear = numpy_helper.from_array(np.array([1, 6], np.int64))
    graph = onnx.parser.parse_graph("g (float[2, 4] x) => (float[2, 4] y) { y = Add (x, s) }")
    graph.sparse_initializer.add(values=values, indices=linear, dims=[2, 4])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_sparse_initializers_survive(tmp_path, tools):
    model = sparse_model()
    for source in (model, stored(tmp_path, model)):
        loaded = load(source)
        assert tools.differences(model, tools.proto_of(copy_model(loaded))) == []
        dense = loaded.graph.initializers["s"].const_value.numpy()
        np.testing.assert_array_equal(dense, [[0, 3, 0, 0], [0, 0, 4, 0]])


def with_sparse_node(op_type):
    model = sparse_model()
    attribute = onnx.AttributeProto(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.CopyFrom(model.graph.sparse_initializer[0])
    model.graph.node.insert(0, helper.make_node(op_type, [], ["s"]))
    model.graph.node[0].attribute.append(attribute)
    del model.graph.sparse_initializer[:]
    return model


def test_sparse_constants_become_sparse_initializers(tools):
    found = tools.proto_of(load(with_sparse_node("Constant")))
    assert tools.differences(sparse_model(), found) == []


def test_other_sparse_attributes_are_refused_with_advice():
    with pytest.raises(ModelError, match="sparse_value") as caught:
        load(with_sparse_node("Other"))
    assert "dense" in caught.value.hint


def test_map_types_survive(tools):
    tensor = helper.make_tensor_type_proto(1, [])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(7, tensor))
    graph = onnx.parser.parse_graph("g (float[N, 3] x) => (float[N, 3] m) { m = ZipMap (x) }")
    graph.node[0].domain = "ai.onnx.ml"
    graph.output[0].type.CopyFrom(kind)
    imports = [helper.make_opsetid("ai.onnx.ml", 1), helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    assert tools.differences(model, tools.proto_of(load(model))) == []


def test_training_info_and_loose_value_info_survive(tools):
    model = tools.everything()
    model.training_info.add().initialization.name = "init"
    model.graph.value_info.append(helper.make_tensor_value_info("nowhere", 1, [7]))
    model.graph.quantization_annotation.add(tensor_name="h")
    model.graph.quantization_annotation[0].quant_parameter_tensor_names.add(key="SCALE", value="s")
    assert tools.differences(model, tools.proto_of(copy_model(load(model)))) == []
