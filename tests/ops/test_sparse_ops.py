"""SparseDecode, SparseWeight's body and numpy restore the same weight, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.bodies import functions
from onnxcomp.passes.weight import DOMAIN, DTYPES

Array = npt.NDArray[Any]


def pruned(rows: int, length: int, zeros: float, dtype: Any = np.float32) -> Array:
    """A weight with zeros."""
    rng = np.random.default_rng(rows * 1000 + length)
    weight = rng.standard_normal((rows, length)).astype(dtype)
    weight[rng.random((rows, length)) < zeros] = 0
    return weight


def stored(weight: Array) -> dict[str, Array]:
    """Inputs of an operator by name."""
    shared = sparse_format.shared_tensors(*weight.shape)
    named = {key.split(".")[1]: array for key, array in shared.items()}
    return {**sparse_format.pack(weight), **named}


def model_of(
    inputs: dict[str, Array], extent: tuple[int, int], opset: int = 17, fed: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """One SparseDecode with its portable body; `fed` names inputs that are no constants."""
    names = list(sparse_format.NODE_INPUTS)
    node = helper.make_node("SparseDecode", names, ["y"], domain=DOMAIN, extent=list(extent))
    tensors = {name: numpy_helper.from_array(inputs[name], name) for name in names}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        *([node], "g", [value(n, tensors[n].data_type, inputs[n].shape) for n in fed]),
        [value("y", tensors["values"].data_type, None)],
        [tensor for name, tensor in tensors.items() if name not in fed],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=imports, functions=list(functions(opset)), ir_version=8
    )


def run(model: onnx.ModelProto, *, library: bool, feeds: dict[str, Array] | None = None) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        onnxcomp.register(options)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds or {})[0])


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
def test_all_forms_agree_in_every_opset(opset: int) -> None:
    weight = pruned(13, 37, 0.5)
    model = model_of(stored(weight), (13, 37), opset)
    for library in (False, True):
        assert run(model, library=library).tobytes() == weight.tobytes(), library


def test_there_are_no_bodies_before_the_opset_that_has_cumsum() -> None:
    assert not functions(10)
    assert [body.name for body in functions(11)] == ["SparseWeight", "SparseDecode"]


@settings(max_examples=40, deadline=None)
@given(
    extent=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    zeros=st.sampled_from([0.0, 0.3, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from([np.float32, np.float16]),
)
def test_kernel_and_body_equal_the_weight(
    extent: tuple[int, int], zeros: float, dtype: Any
) -> None:
    weight = pruned(*extent, zeros, dtype)
    inputs = stored(weight)
    assert sparse_format.decode(inputs, extent).tobytes() == weight.tobytes()
    model = model_of(inputs, extent)
    for library in (False, True):
        assert run(model, library=library).tobytes() == weight.tobytes()


def test_bfloat16_is_moved_as_it_is() -> None:
    weight = pruned(9, 130, 0.5).astype(DTYPES["bfloat16"])
    model = model_of(stored(weight), weight.shape)
    model.graph.node.append(helper.make_node("Cast", ["y"], ["z"], to=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", 1, None))
    found = run(model, library=True)
    np.testing.assert_array_equal(found, weight.astype(np.float32))


def test_pieces_of_a_large_weight_fall_into_place() -> None:
    weight = pruned(700, 259, 0.6)
    assert run(model_of(stored(weight), (700, 259)), library=True).tobytes() == weight.tobytes()


@pytest.mark.parametrize("fed", [("mask",), ("values",), ("mask", "values")])
def test_tensors_that_another_node_makes(fed: tuple[str, ...]) -> None:
    weight = pruned(13, 37, 0.5)
    inputs = stored(weight)
    model = model_of(inputs, (13, 37), fed=fed)
    feeds = {name: inputs[name] for name in fed}
    for library in (False, True):
        assert run(model, library=library, feeds=feeds).tobytes() == weight.tobytes()


def beyond(mask: Array) -> Array:
    """The mask with a bit behind the last column."""
    found = mask.copy()
    found[3, -1] |= 0x80
    return found


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("mask", lambda mask: mask[:, :-1], "mask has shape"),
        ("mask", lambda mask: mask[:-1], "mask has shape"),
        ("mask", lambda mask: mask.reshape(-1), "mask has shape"),
        ("mask", beyond, "behind"),
        ("mask", np.zeros_like, "values have shape"),
        ("values", lambda values: values[:-1], "values have shape"),
        ("values", lambda values: values[None], "values have shape"),
        ("values", lambda values: values[:0], "values have shape"),
        ("values", np.ones_like, "not zero"),
        ("values", lambda values: -values, "not zero"),
    ],
)
def test_malformed_tensors_are_an_error_status(
    name: str, change: Any, said: str, constant: bool
) -> None:
    inputs = stored(pruned(13, 37, 0.5))
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    fed = () if constant else (name,)
    with pytest.raises(Exception, match=said) as caught:
        run(model_of(inputs, (13, 37), fed=fed), library=True, feeds={n: inputs[n] for n in fed})
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("mode", ["folded", "decode"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_model_keeps_its_result_with_and_without_the_library(
    mode: str, dtype: Any, tmp_path: Path
) -> None:
    weight = pruned(96, 96, 0.6, dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        *("g", [value("x", kind, [96, 96])], [value("y", kind, [96, 96])]),
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "o.onnx"
    result = onnxcomp.optimize(model, path, method="sparse", mode=mode, min_size=64)
    assert result.verify is not None and result.verify.passed
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("SparseDecode" if mode == "decode" else "SparseWeight") in operators
    found = onnxcomp.InferenceSession(path).run(None, {"x": np.zeros((96, 96), dtype)})[0]
    np.testing.assert_array_equal(found, weight)
    onnxcomp.expand(path, tmp_path / "d.onnx")
    dense = numpy_helper.to_array(onnx.load(tmp_path / "d.onnx").graph.initializer[0])
    assert dense.tobytes() == weight.tobytes()
