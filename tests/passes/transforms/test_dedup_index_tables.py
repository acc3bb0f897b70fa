"""Weights that a graph looks up by tables of indices are stored by runs, and keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp

Array = npt.NDArray[Any]


def tiled(rng: np.random.Generator, length: int, rows: int, entries: int) -> Array:
    """ROAST: every tile of 32 x 64 weights is a block of the memory that begins anywhere."""
    index = np.empty((length, rows), np.int64)
    offsets = np.arange(32 * 64).reshape(32, 64)
    for top in range(0, length, 32):
        for left in range(0, rows, 64):
            first = rng.integers(0, entries - 32 * 64)
            index[top : top + 32, left : left + 64] = first + offsets
    return index.T.copy()


def rotated(rng: np.random.Generator, length: int, rows: int, entries: int) -> Array:
    """STABLE-RPS: every round of the memory is rotated by some number of entries."""
    flat = np.arange(length * rows)
    shift = rng.integers(0, entries, len(flat) // entries + 1)
    return ((shift[flat // entries] + flat) % entries).reshape(rows, length)


def elementwise(rng: np.random.Generator, length: int, rows: int, entries: int) -> Array:
    """HashedNets: every weight is somewhere else."""
    return rng.integers(0, entries, (rows, length))


MAPS = {"tiled": tiled, "rotated": rotated, "elementwise": elementwise}
LENGTH, ROWS = 256, 512


def shared_graph(index: Array, entries: int, *, nd: bool, opset: int = 18) -> onnx.ModelProto:
    """The forms in which both exporters of torch write such a layer."""
    rng = np.random.default_rng(3)
    memory = rng.uniform(-0.07, 0.07, entries).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), index.shape)
    tensors = {"memory": memory, "index": index, "signs": signs}
    nodes = []
    if nd:
        tensors["minus_one"] = np.array([-1], np.int64)
        nodes.append(helper.make_node("Unsqueeze", ["index", "minus_one"], ["deep"]))
        nodes.append(helper.make_node("GatherND", ["memory", "deep"], ["looked"]))
        tensors["scale"] = np.array(0.37, np.float32)
    else:
        nodes.append(helper.make_node("Gather", ["memory", "index"], ["looked"], axis=0))
        scale = numpy_helper.from_array(np.array(0.37, np.float32))
        nodes.append(helper.make_node("Constant", [], ["scale"], value=scale))
    nodes += [
        helper.make_node("Mul", ["looked", "signs"], ["signed"]),
        helper.make_node("Mul", ["signed", "scale"], ["weight"]),
        helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", index.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", index.shape[0]])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def weight_of(path: Path) -> Array:
    """What the product reads, as the graph computes it."""
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(["weight"], {"x": np.zeros((1, LENGTH), np.float32)})[0])


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("nd", [False, True])
def test_weights_keep_their_bits_and_tables_go(tmp_path: Path, kind: str, nd: bool) -> None:
    entries = LENGTH * ROWS // 16
    index = MAPS[kind](np.random.default_rng(1), LENGTH, ROWS, entries)
    onnx.save(shared_graph(index, entries, nd=nd), tmp_path / "model.onnx")
    result = onnxcomp.optimize(tmp_path / "model.onnx", tmp_path / "out.onnx", method="hash")
    expected = weight_of(tmp_path / "model.onnx")
    found = weight_of(tmp_path / "out.onnx")
    assert np.array_equal(found.view(np.int32), expected.view(np.int32))
    assert result.verify is not None and result.verify.passed
    share = (tmp_path / "out.onnx").stat().st_size / (tmp_path / "model.onnx").stat().st_size
    assert share < {"tiled": 0.05, "rotated": 0.05, "elementwise": 0.40}[kind]
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def test_all_names_of_the_model_stay(tmp_path: Path) -> None:
    entries = LENGTH * ROWS // 16
    index = rotated(np.random.default_rng(1), LENGTH, ROWS, entries)
    onnx.save(shared_graph(index, entries, nd=False, opset=11), tmp_path / "model.onnx")
    onnxcomp.optimize(tmp_path / "model.onnx", tmp_path / "out.onnx", method="auto")
    model = onnx.load(tmp_path / "out.onnx")
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert not {"index", "signs"} & {tensor.name for tensor in model.graph.initializer}
    assert "memory" in {tensor.name for tensor in model.graph.initializer}
    assert model.opset_import[0].version == 11


def changed(model: onnx.ModelProto, name: str, array: Array) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("case", ["signs", "range", "overridable"])
def test_what_is_no_table_of_shared_weights_is_left_alone(tmp_path: Path, case: str) -> None:
    entries = LENGTH * ROWS // 16
    index = rotated(np.random.default_rng(1), LENGTH, ROWS, entries)
    model = shared_graph(index, entries, nd=False)
    if case == "signs":  # the product with other numbers ends what is known, the look-up stays
        signs = np.random.default_rng(0).standard_normal(index.shape).astype(np.float32)
        model = changed(model, "signs", signs)
    elif case == "range":
        model = changed(model, "index", index + entries)
    else:
        model.graph.input.append(
            helper.make_tensor_value_info("index", TensorProto.INT64, index.shape)
        )
    onnx.save(model, tmp_path / "model.onnx")
    options: dict[str, Any] = {"method": "hash", "exclude": "signs", "verify": case == "signs"}
    onnxcomp.optimize(tmp_path / "model.onnx", tmp_path / "out.onnx", **options)
    names = {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert "index" in names or case == "signs"
    assert ("signs" in names) or case != "signs"


def folded(index: Array, entries: int, *, dense: bool = False) -> onnx.ModelProto:
    """The same model after a session, or another tool, has multiplied its weight out."""
    rng = np.random.default_rng(3)
    memory = rng.uniform(-0.07, 0.07, entries).astype(np.float32)
    signs = rng.choice(np.array([-1, 1], np.float32), index.shape)
    weight = memory[index] * signs * np.float32(0.37)
    if dense:
        weight = rng.uniform(-0.07, 0.07, index.shape).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", index.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", index.shape[0]])],
        [numpy_helper.from_array(weight, "weight")],
    )
    imports = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def product_weight(path: Path) -> Array:
    """What the product reads."""
    model = onnx.load(path)
    (gemm,) = [node for node in model.graph.node if node.op_type == "Gemm"]
    model.graph.output.append(helper.make_tensor_value_info(gemm.input[1], TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": np.zeros((1, LENGTH), np.float32)})[1])


@pytest.mark.parametrize("kind", ["tiled", "rotated"])
def test_folded_weights_are_found_by_their_repeated_values(tmp_path: Path, kind: str) -> None:
    entries = LENGTH * ROWS // 16
    index = MAPS[kind](np.random.default_rng(1), LENGTH, ROWS, entries)
    model = folded(index, entries)
    onnx.save(model, tmp_path / "model.onnx")
    result = onnxcomp.optimize(
        tmp_path / "model.onnx", tmp_path / "out.onnx", method="dense", detect_sharing=True
    )
    assert result.verify is not None and result.verify.passed
    expected = numpy_helper.to_array(model.graph.initializer[0])
    assert np.array_equal(
        product_weight(tmp_path / "out.onnx").view(np.int32), expected.view(np.int32)
    )
    share = (tmp_path / "out.onnx").stat().st_size / (tmp_path / "model.onnx").stat().st_size
    assert share < {"tiled": 0.14, "rotated": 0.11}[kind]  # 1/16 for values, 1/32 for signs


@pytest.mark.parametrize("case", ["dense", "elementwise", "not asked"])
def test_weights_that_do_not_repeat_in_order_stay(tmp_path: Path, case: str) -> None:
    entries = LENGTH * ROWS // 16
    make = elementwise if case == "elementwise" else rotated
    index = make(np.random.default_rng(1), LENGTH, ROWS, entries)
    onnx.save(folded(index, entries, dense=case == "dense"), tmp_path / "model.onnx")
    onnxcomp.optimize(
        tmp_path / "model.onnx",
        tmp_path / "out.onnx",
        method="dense",
        detect_sharing=case != "not asked",
    )
    names = {tensor.name for tensor in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert names == {"weight"}
