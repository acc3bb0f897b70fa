"""Memories are found again in weights that were multiplied out, and stored with every bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing, expand, seeds
from onnxcomp.passes.transforms.multiplied_out import FoundMemory, find_memories

Array = np.ndarray[Any, Any]

# Rows and columns of weights whose last one has no whole tile, as the head of a classifier.
SHAPES = ((128, 64), (128, 128), (72, 128), (128, 128), (64, 128), (10, 416))


def scale_of(length: int) -> np.float32:
    """What `share` multiplies entries by."""
    return np.float32(1.0 / np.sqrt(3.0 * length) / 0.04)


def weights(
    slots: int, seed: int = 0, shapes: tuple[tuple[int, int], ...] = SHAPES, map: str = "fold"
) -> tuple[Array, list[Array]]:
    """A memory, and the weights in it one behind the other."""
    memory = np.random.default_rng(5).standard_normal((slots, 256), np.float32)
    made, base = [], 0
    for rows, length in shapes:
        geometry = ChunkLayout(rows, length)
        sharing = Sharing(slots if map == "fold" else 1, *seeds(seed), base)
        made.append(expand(memory, np.array([scale_of(length)]), geometry, sharing))
        base += geometry.tiles
    return memory, made


def found(matrices: list[Array], order: list[int] | None = None) -> list[FoundMemory]:
    numbers = range(len(matrices)) if order is None else order
    return find_memories((str(number), matrices[number]) for number in numbers)


@pytest.mark.parametrize("slots", [5, 16, 60, 130])
def test_slots_seed_and_order_are_found(slots: int) -> None:
    _, matrices = weights(slots, seed=7)
    [memory] = found(matrices)
    assert (memory.map, memory.slots) == ("fold", slots)
    assert [layer.name for layer in memory.layers] == list("012345")
    bases = [layer.base for layer in memory.layers]
    assert bases == [0, 32, 96, 136, 200, 232]
    assert memory.certain == 5
    for layer in memory.layers:
        expected = float(scale_of(layer.geometry.length) / scale_of(64))
        assert np.isnan(layer.ratio) or layer.ratio == pytest.approx(expected, rel=1e-5)
    assert np.isnan(memory.layers[5].ratio)
    assert memory.layers[0].ratio == 1.0


@pytest.mark.parametrize("slots", [16, 60, 130])
def test_slots_that_are_hashed_one_by_one_are_found(slots: int) -> None:
    _, matrices = weights(slots, seed=7, map="roast")
    [memory] = found(matrices)
    assert (memory.map, memory.slots, memory.seed) == ("roast", slots, 7)
    assert [layer.base for layer in memory.layers] == [0, 32, 96, 136, 200, 232]


def test_weights_of_another_order_in_the_graph_are_put_in_theirs() -> None:
    _, matrices = weights(60)
    [memory] = found(matrices, order=[0, 2, 4, 1, 3, 5])
    assert memory.slots == 60
    assert [layer.name for layer in memory.layers][:5] == list("01234")


@pytest.mark.parametrize("case", ["trained dense", "one changed", "seed", "no repetition"])
def test_what_is_no_memory_is_left_alone(case: str) -> None:
    rng = np.random.default_rng(0)
    if case == "trained dense":
        matrices = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    elif case == "seed":
        _, matrices = weights(60, seed=123456789)
    elif case == "no repetition":
        _, matrices = weights(1000)
    else:
        _, matrices = weights(60)
        matrices[1] = -matrices[1]
    assert not found(matrices)


def test_constant_weights_are_no_memory() -> None:
    assert not found([np.zeros((64, 128), np.float32), np.ones((64, 128), np.float32)])


def chain(folder: Path, matrices: list[Array], name: str = "m.onnx") -> Path:
    """A model in which the weights multiply inputs of their own."""
    nodes, inputs, outputs = [], [], []
    for number, matrix in enumerate(matrices):
        nodes.append(helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"y{number}"]))
        rows, length = matrix.shape
        value = helper.make_tensor_value_info
        inputs.append(value(f"x{number}", TensorProto.FLOAT, ["n", length]))
        outputs.append(value(f"y{number}", TensorProto.FLOAT, ["n", rows]))
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(matrix.T), f"w{number}")
        for number, matrix in enumerate(matrices)
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), folder / name)
    return folder / name


@pytest.mark.parametrize("map", ["fold", "roast"])
@pytest.mark.parametrize(
    ("method", "detect"),
    [("hash", False), ("auto", True), ("auto", False), ("dense", True)],
)
def test_all_weights_are_stored_in_one_memory_with_every_bit(
    tmp_path: Path, method: str, detect: bool, map: str
) -> None:
    memory, matrices = weights(18, map=map)
    source, out, back = chain(tmp_path, matrices), tmp_path / "o.onnx", tmp_path / "b.onnx"
    result = onnxcomp.optimize(source, out, method=method, detect_sharing=detect)
    assert result.verify is not None and result.verify.passed
    operators = [node.op_type for node in onnx.load(out).graph.node]
    exact = detect or method == "hash"
    trained = [site for site in result.report.sites if "trained to share" in site.reason]
    assert len(trained) == exact
    if not exact:
        return
    assert operators == ["HashMatMul"] * len(matrices)
    onnxcomp.expand(out, back)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(back).graph.initializer}
    for number, matrix in enumerate(matrices):
        assert np.array_equal(tensors[f"w{number}"].T.view(np.uint32), matrix.view(np.uint32))
    assert out.stat().st_size < memory.nbytes + 20_000


def test_a_weight_that_was_changed_afterwards_keeps_its_bits(tmp_path: Path) -> None:
    _, matrices = weights(18)
    matrices[2][3, 5] += 0.25
    source, out = chain(tmp_path, matrices), tmp_path / "o.onnx"
    onnxcomp.optimize(source, out, method="dense", detect_sharing=True)
    onnxcomp.expand(out, tmp_path / "b.onnx")
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert not any("hash.memory" in name for name in tensors)
    assert np.array_equal(tensors["w2"].T, matrices[2]) or "w2" not in tensors


def test_weights_of_fused_operators_are_found(tmp_path: Path) -> None:
    """Operators of runtimes multiply by matrices as MatMul does, the other way round than torch."""
    _, matrices = weights(6, shapes=((96, 64), (64, 64)))
    source, out = chain(tmp_path, matrices), tmp_path / "o.onnx"
    model = onnx.load(source)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Projection", "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    onnx.save(model, source)
    onnxcomp.optimize(source, out, method="dense", detect_sharing=True, verify=False)
    operators = [node.op_type for node in onnx.load(out).graph.node]
    assert {"HashWeight", "HashMatMul", "Projection"} <= set(operators)
    onnxcomp.expand(out, source)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    assert np.array_equal(tensors["w0"].T, matrices[0])
