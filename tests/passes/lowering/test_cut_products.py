"""Products that are cut into products with some rows each give the same, in less memory."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.lowering.cut_products import cut_coded_products, cut_dense_products
from onnxcomp.passes.lowering.session_memory import expansions
from onnxcomp.passes.lowering.stages import end_waiting
from onnxcomp.runtime.evaluate import run_model

LENGTH, ROWS = 200, 500


@pytest.fixture(params=["float32", "float16"])
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two products with one weight, the second one's rows as columns, and one with another."""
    kind = np.dtype(request.param)
    code = helper.np_dtype_to_tensor_dtype(kind)
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((LENGTH, ROWS)) / 14, "v": np.ones((ROWS, 3)) / ROWS}
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"], "first"),
            helper.make_node("Relu", ["p"], ["h"]),
            helper.make_node("Tanh", ["x"], ["t"]),
            helper.make_node("MatMul", ["t", "w"], ["y"], "second"),
            helper.make_node("MatMul", ["h", "v"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", code, ["n", 2, LENGTH])],
        [helper.make_tensor_value_info(name, code, None) for name in ("y", "z")],
        [numpy_helper.from_array(a.astype(kind), name) for name, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "dense.onnx"
    onnx.save(model, path)
    return path


def outputs(model: Path, library: bool) -> dict[str, Any]:
    x = np.random.default_rng(1).standard_normal((3, 2, LENGTH))
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
    kind = kinds[onnx.load(model).graph.input[0].type.tensor_type.elem_type]
    return dict(run_model(model, [{"x": x.astype(kind)}], library=library)[0])


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        limit = 1e-5 if array.dtype == np.float32 else 2e-3
        np.testing.assert_allclose(array, other[name], rtol=limit, atol=limit)


def test_dense_products(dense: Path) -> None:
    model = load(dense)
    assert cut_dense_products(model, 4 * LENGTH * ROWS) == 0
    assert cut_dense_products(model, 4 * LENGTH * ROWS // 4) == 2
    sizes = [value.const_value.nbytes for value in model.graph.initializers.values()]
    assert sum(sizes) > 2 * LENGTH * ROWS
    assert "w" not in model.graph.initializers
    assert [node.op_type for node in model.graph].count("Concat") == 2
    cut = dense.with_name("cut.onnx")
    save(model, cut)
    assert_same(outputs(dense, False), outputs(cut, False))


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_products_on_codes(dense: Path, precision: str) -> None:
    small = dense.with_name("small.onnx")
    onnxcomp.optimize(dense, small, bits=4, min_size=4096, precision=precision, verify=False)
    model = load(small)
    end_waiting(model)
    whole = [need.kept + need.working for _, need in expansions(model, library=False)]
    whole = [size for size in whole if size > 1 << 20]  # others are tables, made dense at once
    assert len(whole) == 2
    assert cut_coded_products(model, max(whole)) == 0
    assert cut_coded_products(model, max(whole) // 4) == 2
    parts = [need.kept + need.working for _, need in expansions(model, library=False)]
    assert len(parts) > 8
    assert max(parts) < max(whole) / 3
    cut = small.with_name("cut.onnx")
    save(model, cut)
    assert_same(outputs(small, False), outputs(cut, False))
    assert_same(outputs(small, True), outputs(cut, True))
