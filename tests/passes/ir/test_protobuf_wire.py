"""Reading an .onnx file without its tensors."""

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxcomp.passes.ir.protobuf_wire import INLINE, WireError, varint, without_tensors


def all_tensors(model):
    yield from model.graph.initializer
    for node in model.graph.node:
        for attribute in node.attribute:
            yield from attribute.g.initializer
            if attribute.HasField("t"):
                yield attribute.t


@given(st.integers(0, 2**63))
def test_varints_are_those_of_protobuf(value):
    message = onnx.ModelProto(ir_version=value & (2**63 - 1))
    assert message.SerializeToString() == b"\x08" + varint(value & (2**63 - 1))


def test_only_large_tensors_leave_the_message(tools):
    model = tools.everything()
    data = model.SerializeToString()
    bare = onnx.ModelProto.FromString(without_tensors(data))
    for full, light in zip(all_tensors(model), all_tensors(bare), strict=True):
        if len(full.raw_data) < 1024:
            assert light == full
            continue
        entries = {entry.key: entry.value for entry in light.external_data}
        start, length = int(entries["offset"]), int(entries["length"])
        assert entries["location"] == INLINE and not light.raw_data
        assert data[start : start + length] == full.raw_data
        assert (light.name, light.dims, light.data_type) == (full.name, full.dims, full.data_type)


def test_what_is_no_tensor_stays_byte_for_byte(tools):
    model = tools.build("g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    data = model.SerializeToString()
    assert without_tensors(data) == data


def test_packed_float_data_is_found_like_raw_data():
    values = np.arange(2000, dtype=np.float32)
    tensor = helper.make_tensor("w", onnx.TensorProto.FLOAT, [2000], values, raw=False)
    node = helper.make_node("Identity", ["w"], ["y"])
    info = helper.make_tensor_value_info("y", 1, [2000])
    data = helper.make_model(helper.make_graph([node], "g", [], [info], [tensor]))
    serialised = data.SerializeToString()
    bare = onnx.ModelProto.FromString(without_tensors(serialised)).graph.initializer[0]
    start = int(next(entry.value for entry in bare.external_data if entry.key == "offset"))
    found = np.frombuffer(serialised[start : start + values.nbytes], np.float32)
    np.testing.assert_array_equal(found, values)


def test_tensors_that_are_external_already_are_left_alone():
    tensor = numpy_helper.from_array(np.zeros(1000, np.float32), "w")
    tensor.external_data.add(key="location", value="weights.bin")
    graph = onnx.GraphProto(initializer=[tensor])
    data = onnx.ModelProto(graph=graph).SerializeToString()
    assert without_tensors(data) == data


def test_a_file_of_zeros_is_refused_at_its_first_byte():
    with pytest.raises(WireError, match="number 0 at byte 0"):
        without_tensors(bytes(64))
    with pytest.raises(WireError, match="number 0 at byte 2"):
        without_tensors(b"\x08\x08" + bytes(64))


def is_readable(data):
    try:
        onnx.ModelProto.FromString(without_tensors(data))
    except (WireError, DecodeError):
        return False
    return True


def test_every_cut_is_noticed(tools):
    data = tools.everything().SerializeToString()
    # The metadata and the operator sets come after the graph: only the graph is cut here.
    assert is_readable(data)
    assert not any(is_readable(data[:end]) for end in range(100, len(data) - 200, 4099))


def test_endless_nesting_is_refused():
    data = b""
    for _ in range(60):
        attribute = b"\x32" + varint(len(data)) + data + bytes([0x0A]) + varint(1200) + b"n" * 1200
        node = b"\x2a" + varint(len(attribute)) + attribute
        data = b"\x0a" + varint(len(node)) + node
    with pytest.raises(WireError, match="nested"):
        without_tensors(b"\x3a" + varint(len(data)) + data)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=4000))
def test_noise_gives_bytes_or_one_error(noise):
    try:
        assert isinstance(without_tensors(noise), bytes)
    except WireError as error:
        assert "byte" in str(error)
