"""Saving models: exact sizes, aligned data, nothing left behind."""

import os
import shutil
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.errors import CompressionError, ModelError, UsageError
from onnxcomp.passes.ir.model import copy_model, load, output_size, save
from onnxcomp.passes.ir.writer import PAGE, THRESHOLD
from onnxcomp.passes.transforms.canonicalize import canonicalize

MODES = ("auto", "always", "never")


def holding(*values):
    """A model that holds initializers and returns them."""
    for value in values:
        value.type = ir.TensorType(value.const_value.dtype)
        value.shape = ir.Shape(list(value.const_value.shape))
    graph = ir.Graph([], values, nodes=[], initializers=values, opset_imports={"": 17}, name="g")
    return ir.Model(graph, ir_version=8)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_model_is_the_same_model(tmp_path, tools, mode):
    model = tools.everything()
    path = tmp_path / "out.onnx"
    saved = save(load(model), path, external_data=mode)
    assert files(tmp_path) == [file.name for file in saved.files]
    assert files(tmp_path) == (["out.onnx", "out.onnx.data"] if mode == "always" else ["out.onnx"])
    assert tools.differences(model, onnx.load(path)) == []
    onnx.checker.check_model(path, full_check=True)
    for one, two in zip(
        tools.run(model, tools.everything_feeds()),
        tools.run(path, tools.everything_feeds()),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["out.onnx", "a-much-longer-name.onnx"])
def test_the_size_is_known_before(tmp_path, tools, mode, name):
    model = load(tools.everything())
    expected = output_size(model, external_data=mode, name=name)
    saved = save(model, tmp_path / name, external_data=mode)
    assert expected == saved.bytes == sum(file.stat().st_size for file in saved.files)


def test_external_tensors_are_aligned(tmp_path, tools):
    model = tools.build(
        "g (float[N, 200] x) => (float[N, 200] y) { h = MatMul (x, v) i = Add (h, c) "
        "j = Add (i, b) y = MatMul (j, w) }",
        {
            "b": tools.weight(200, seed=2),
            "c": tools.weight(200),
            "v": tools.weight(200, 200),
            "w": tools.weight(200, 200, seed=1),
        },
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(tools.weight(300, seed=3), "odd"))
    save(load(model), tmp_path / "out.onnx", external_data="always")
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    for tensor in written.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        size = int(np.prod(tensor.dims)) * 4
        assert bool(entries) == (size >= 1024), tensor.name
        if entries:
            assert entries["location"] == "out.onnx.data" and int(entries["length"]) == size
            assert int(entries["offset"]) % (PAGE if size >= 65536 else 64) == 0


def test_large_models_get_a_data_file_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxcomp.passes.ir.writer.THRESHOLD", 1 << 20)
    assert THRESHOLD == 64 << 20

    def model(elements):
        values = np.broadcast_to(np.float32(0), (elements,))
        return holding(ir.Value(name="w", const_value=ir.Tensor(values)))

    assert len(save(model(1 << 18), tmp_path / "large.onnx").files) == 2
    assert len(save(model((1 << 18) - 1), tmp_path / "small.onnx").files) == 1


def test_sizes_beyond_two_gigabytes_need_no_memory(tmp_path):
    values = np.broadcast_to(np.float16(0), (3 << 10, 1 << 20))
    model = holding(ir.Value(name="w", const_value=ir.Tensor(values)))
    inside = output_size(model) - values.nbytes
    assert 0 < inside < 300
    for attempt in (
        lambda: output_size(model, external_data="never"),
        lambda: save(model, tmp_path / "out.onnx", external_data="never"),
    ):
        with pytest.raises(ModelError, match="protobuf stops at"):
            attempt()
    assert files(tmp_path) == []


def test_nothing_refers_to_the_input(tmp_path, tools):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save(load(tools.everything()), first / "model.onnx", external_data="always")
    model = load(first / "model.onnx")
    expected = tools.run(first / "model.onnx", tools.everything_feeds())
    for mode in MODES:
        save(model, second / f"{mode}.onnx", external_data=mode)
    shutil.rmtree(first)
    for mode in MODES:
        found = tools.run(second / f"{mode}.onnx", tools.everything_feeds())
        np.testing.assert_array_equal(found[0], expected[0])


def test_files_the_model_is_read_from_are_not_overwritten(tmp_path, tools):
    path = tmp_path / "model.onnx"
    save(load(tools.everything()), path, external_data="always")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    (tmp_path / "link.onnx").symlink_to(path)
    (tmp_path / "other.onnx.data").symlink_to(tmp_path / "model.onnx.data")
    model = copy_model(load(path))
    for name, mode in (("model.onnx", "never"), ("link.onnx", "never"), ("other.onnx", "always")):
        with pytest.raises(UsageError, match="would overwrite"):
            save(model, tmp_path / name, external_data=mode)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def failing_model(tools, error):
    def give():
        raise error

    model = load(tools.everything())
    tensor = ir.LazyTensor(give, ir.DataType.FLOAT, ir.Shape([64, 64]), name="late")
    model.graph.register_initializer(ir.Value(name="late", const_value=tensor))
    return model


@pytest.mark.parametrize(
    "error", [ValueError("no values"), KeyboardInterrupt(), OSError(28, "full")]
)
@pytest.mark.parametrize("mode", ["always", "never"])
def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path, tools, error, mode):
    (tmp_path / "out.onnx").write_bytes(b"old")
    expected = UsageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save(failing_model(tools, error), tmp_path / "out.onnx", external_data=mode)
    assert files(tmp_path) == ["out.onnx"] and (tmp_path / "out.onnx").read_bytes() == b"old"


def test_a_tensor_that_breaks_its_promise_is_an_error(tmp_path, tools):
    short = ir.LazyTensor(
        lambda: ir.Tensor(np.zeros(10, np.float32)), ir.DataType.FLOAT, ir.Shape([64, 64])
    )
    model = load(tools.everything())
    model.graph.register_initializer(ir.Value(name="short", const_value=short))
    with pytest.raises(CompressionError, match="has 16384 bytes, but 40 were read"):
        save(model, tmp_path / "out.onnx")
    assert files(tmp_path) == []


def test_a_missing_folder_is_a_usage_error(tmp_path, tools):
    with pytest.raises(UsageError, match="cannot write"):
        save(load(tools.everything()), tmp_path / "absent" / "out.onnx")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_file_modes_follow_the_umask(tmp_path, tools, mask):
    old = os.umask(mask)
    try:
        saved = save(load(tools.everything()), tmp_path / "out.onnx", external_data="always")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.files} == {0o666 & ~mask}


def test_the_same_model_gives_the_same_bytes(tmp_path, tools):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(load(tools.everything()), tmp_path / name / "out.onnx", external_data="always")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def exotic(dtype, shape=(33, 65)):
    # A power-of-two type has no zero.
    values = np.random.default_rng(0).integers(0, 2, shape) + (dtype == ir.DataType.FLOAT8E8M0)
    return ir.tensor(values.astype(dtype.numpy()), dtype=dtype)


DTYPES = [
    dtype
    for dtype in ir.DataType
    if dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING) and hasattr(dtype, "itemsize")
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("mode", ["always", "never"])
def test_every_element_type_survives(tmp_path, dtype, mode):
    tensor = exotic(dtype)
    value = ir.Value(name="w", const_value=tensor)
    text = ir.Value(name="s", const_value=ir.StringTensor([b"a", b"\xff"], shape=ir.Shape([2])))
    empty = ir.Value(name="e", const_value=ir.Tensor(np.zeros((0, 4), np.float32)))
    path = tmp_path / "out.onnx"
    saved = save(holding(value, text, empty), path, external_data=mode)
    assert saved.bytes == sum(file.stat().st_size for file in saved.files)
    loaded = load(path).graph.initializers
    assert loaded["w"].const_value.dtype == dtype
    assert loaded["w"].const_value.tobytes() == tensor.tobytes()
    np.testing.assert_array_equal(loaded["w"].const_value.numpy(), tensor.numpy())
    assert list(loaded["s"].const_value.string_data()) == [b"a", b"\xff"]
    assert loaded["e"].const_value.numpy().shape == (0, 4)


def test_bfloat16_values_are_read_as_such(tmp_path):
    values = np.arange(2048).astype(ml_dtypes.bfloat16).reshape(32, 64)
    save(holding(ir.Value(name="w", const_value=ir.Tensor(values))), tmp_path / "out.onnx")
    found = load(tmp_path / "out.onnx").graph.initializers["w"].const_value.numpy()
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), values.astype(np.float32))


def test_names_we_made_up_are_not_written(tools):
    model = tools.everything()
    model.graph.node[1].name = model.graph.node[2].name = "twin"
    loaded = load(model)
    assert canonicalize(loaded).count > 0
    assert len({node.name for node in loaded.graph}) == len(loaded.graph)
    assert tools.differences(model, tools.proto_of(loaded)) == []


def test_functions_and_their_value_info_survive(tools):
    body = onnx.parser.parse_function(
        '<opset_import: ["" : 17], domain: "test"> Twice <k: int = 3> (a) => (c) '
        "{ b = Add (a, a) c = Identity (b) }"
    )
    body.doc_string = "doubles"
    body.metadata_props.add(key="a", value="b")
    model = tools.build(
        "g (float[N, 4] x) => (float[N, 4] y) { y = test.Twice (x) }", functions=[body]
    )
    assert tools.differences(model, tools.proto_of(load(model))) == []
    model.ir_version = 10
    model.functions[0].value_info.append(onnx.helper.make_tensor_value_info("b", 1, ["N", 4]))
    assert tools.differences(model, tools.proto_of(load(model))) == []
    model.ir_version = 8
    del model.functions[0].value_info[:]
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("test::Twice/b", 1, ["N", 4]))
    assert tools.differences(model, tools.proto_of(load(model))) == []


MEASURE = """
import re, sys
def peak():
    # Not ru_maxrss: that counts the memory of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
from onnxcomp.passes.ir.model import load, save, output_size
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.analysis.weight_sites import find_sites
before = peak()
model = load(sys.argv[1])
canonicalize(model)
find_sites(model)
output_size(model)
save(model, sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("mode", ["always", "never"])
def test_memory_does_not_grow_with_the_model(tmp_path, mode):
    tensors = [ir.Tensor(np.full((1024, 4096), i // 2, np.float32)) for i in range(12)]
    initializers = [ir.Value(name=f"w{i}", const_value=t) for i, t in enumerate(tensors)]
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 1024]))
    nodes = [ir.node("MatMul", [x, value]) for value in initializers]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"y{i}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(
        [x], outputs, nodes=nodes, initializers=initializers, opset_imports={"": 17}, name="g"
    )
    source = tmp_path / "in.onnx"
    saved = save(ir.Model(graph, ir_version=8), source, external_data=mode)
    assert saved.bytes > 192 << 20
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # One tensor has 16 MiB; comparing two of them takes both, a mask and some change.
    assert float(done.stdout) < 56, f"{done.stdout} MiB beyond the interpreter"
