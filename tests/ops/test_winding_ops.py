"""WindingDecode, WindingWeight's body and numpy restore the same weight, bit by bit."""

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
from onnxcomp.passes.codecs.winding.bodies import functions
from onnxcomp.passes.codecs.winding.codec import WindingCodec, WindingParams
from onnxcomp.passes.codecs.winding.format import GRIDS, NODE_INPUTS
from onnxcomp.passes.weight import DOMAIN, Use, WeightSite

Array = npt.NDArray[Any]
CODEC = WindingCodec()


def stored(rows: int, length: int, params: WindingParams) -> tuple[dict[str, Array], Array]:
    """Inputs of an operator by name, and the weight they mean."""
    use = (Use("n", "Conv", 1, "dense"),)
    site = WeightSite("w", (rows, length), "float32", use, "", rows, length, False)
    weight = np.random.default_rng(rows).standard_t(4, (rows, length)).astype(np.float32)
    payload = CODEC.encode(site, weight, params)
    shared = {key.split(".")[1]: array for key, array in payload.shared.items()}
    return {**payload.tensors, **shared}, CODEC.decode(site, payload)


def model_of(inputs: dict[str, Array], extent: tuple[int, int], opset: int = 17) -> onnx.ModelProto:
    """One WindingDecode with its portable body."""
    node = helper.make_node(
        *("WindingDecode", list(NODE_INPUTS), ["y"]),
        domain=DOMAIN,
        extent=list(extent),
        count=[extent[0] * extent[1]],
    )
    graph = helper.make_graph(
        *([node], "g", [], [helper.make_tensor_value_info("y", 1, None)]),
        [numpy_helper.from_array(inputs[name], name) for name in NODE_INPUTS],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=imports, functions=list(functions(opset)), ir_version=8
    )


def run(model: onnx.ModelProto, *, library: bool) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        onnxcomp.register(options)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


def test_all_forms_agree_in_every_opset() -> None:
    inputs, wanted = stored(13, 37, WindingParams(5, "pi", 2))
    for opset in (7, 8, 9, 10, 11, 13, 17, 21, 22, 23):
        model = model_of(inputs, (13, 37), opset)
        for library in (False, True):
            found = run(model, library=library)
            np.testing.assert_array_equal(found, wanted, err_msg=f"opset {opset}, {library}")


@settings(max_examples=25, deadline=None)
@given(
    extent=st.tuples(st.integers(1, 40), st.integers(1, 150)),
    bits=st.integers(2, 6),
    grid=st.sampled_from(GRIDS),
    classes=st.integers(0, 3),
    group=st.sampled_from([0, 16, 48, 128]),
)
def test_kernel_and_body_equal_numpy(
    extent: tuple[int, int], bits: int, grid: str, classes: int, group: int
) -> None:
    inputs, wanted = stored(*extent, WindingParams(bits, grid, classes, 0.0, 0, group))
    model = model_of(inputs, extent)
    for library in (False, True):
        np.testing.assert_array_equal(run(model, library=library), wanted)


def test_pieces_of_a_large_weight_fall_into_place() -> None:
    inputs, wanted = stored(400, 259, WindingParams(4, "lattice", 0, 0.0, 0, 64))
    np.testing.assert_array_equal(run(model_of(inputs, (400, 259)), library=True), wanted)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("codes", np.zeros((1, 1, 10), np.uint8), "codes hold"),
        ("codes", np.zeros((1, 31, 17), np.uint8), "codes have shape"),
        ("spans", np.zeros(1, np.float32), "class"),
        ("scales", np.ones((2, 1, 1), np.float16), "scales"),
        ("centre", np.zeros(3, np.float32), "centre"),
        ("spans", np.zeros((2, 2), np.float32), "spans"),
        ("sizes", np.array([1024, 0, 4], np.int64), "sizes"),
        ("sizes", np.array([1024, 2000, 4], np.int64), "sizes"),
        ("sizes", np.array([1024, 17, 2**40], np.int64), "sizes"),
        ("generator", np.array([-1, 2], np.int64), "generator"),
    ],
)
def test_malformed_tensors_are_an_error_status(name: str, content: Array, said: str) -> None:
    inputs, _ = stored(13, 37, WindingParams(5))
    inputs[name] = content
    with pytest.raises(Exception, match=said) as caught:
        run(model_of(inputs, (13, 37)), library=True)
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("mode", ["folded", "decode"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_model_keeps_its_result_with_and_without_the_library(
    mode: str, dtype: Any, tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).standard_normal((96, 96)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", kind, [96, 96])], [value("y", kind, [96, 96])]),
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "o.onnx"
    result = onnxcomp.optimize(model, path, method="winding", bits=4, mode=mode, min_size=64)
    assert result.verify is not None and result.verify.passed
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ("WindingDecode" if mode == "decode" else "WindingWeight") in operators
    found = onnxcomp.InferenceSession(path).run(None, {"x": np.eye(96, dtype=dtype)})[0]
    onnxcomp.expand(path, tmp_path / "d.onnx")
    dense = numpy_helper.to_array(onnx.load(tmp_path / "d.onnx").graph.initializer[0])
    np.testing.assert_array_equal(found, dense)
