"""Weights with equal settings are expanded together: the same values, and a way back."""

import numpy as np
import pytest
from tests.passes.lowering.test_row_parts import operators, placed, ran

from onnxcomp.passes.ir.manifest import compressed_tensors
from onnxcomp.passes.lowering import joined_weights
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.rewrite import rewrite
from onnxcomp.passes.lowering.stages import is_staged

# Filters with whole and padded panels, one and several groups in a row, and one stored flat.
SHAPES = {
    "a": (32, 16, 3, 3),
    "b": (90, 32, 1, 1),
    "c": (64, 90, 3, 3),
    "d": (90, 64, 1, 1),
    "e": (128, 90, 1, 1),
    "f": (16, 128, 1, 1),
}


def convolutions(tools, opset):
    nodes = [
        f"h{i} = Conv <pads = [{', '.join([str(s[2] // 2)] * 4)}]> (h{i - 1}, {name})"
        for i, (name, s) in enumerate(SHAPES.items(), 1)
    ]
    lines = " ".join(nodes).replace("h0", "x").replace(f"h{len(SHAPES)}", "y")
    text = f"g (float[1, 16, 4, 4] x) => (float[1, 16, 4, 4] y) {{ {lines} }}"
    weights = {
        name: tools.weight(shape[0], int(np.prod(shape[1:])), seed=i).reshape(shape) / 20
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return tools.build(text, weights, opset=opset)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("opset", [8, 12, 13, 21])
def test_weights_together_are_what_they_are_alone(tools, monkeypatch, opset, pieces):
    monkeypatch.setattr(joined_weights, "_SMALL", 0)
    if pieces > 1:
        monkeypatch.setattr("onnxcomp.passes.lowering.stages.LEAST", 1 << 14)
    proto = convolutions(tools, opset)
    x = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    alone, found = placed(proto)
    rewrite(alone, found)
    assert operators(alone)["HyperWeight"] == len(SHAPES)
    model, found = placed(proto)
    lower(model, found)
    assert is_staged(model) == (pieces > 1) and not model.functions
    counts = operators(model)
    groups = {placement.payload.attributes["group"] for placement in found}
    if pieces == 1 and opset >= 12:
        assert counts["Einsum"] == len(groups) < len(SHAPES)
    np.testing.assert_array_equal(ran(tools, model, x), ran(tools, alone, x))
    expand(model)
    assert operators(model) == {"Conv": len(SHAPES)}
    expand(alone)
    np.testing.assert_array_equal(ran(tools, model, x), ran(tools, alone, x))


def test_no_constant_is_left_that_nobody_reads(tools, monkeypatch):
    """ONNX Runtime would warn of each when a session is created."""
    monkeypatch.setattr(joined_weights, "_SMALL", 0)
    model, found = placed(convolutions(tools, 17))
    lower(model, found)
    assert operators(model)["Split"]
    assert all(value.uses() for value in model.graph.initializers.values())
    assert compressed_tensors(model) <= model.graph.initializers.keys()
    expand(model)
    assert operators(model) == {"Conv": len(SHAPES)}


def test_what_is_joined_has_a_limit(tools, monkeypatch):
    monkeypatch.setattr(joined_weights, "_LEAST", 0)
    monkeypatch.setattr(joined_weights, "_SMALL", 0)
    proto = convolutions(tools, 17)
    model, found = placed(proto)
    lower(model, found)
    groups = {placement.payload.attributes["group"] for placement in found}
    assert operators(model)["Einsum"] > len(groups)
    x = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    alone, found = placed(proto)
    rewrite(alone, found)
    np.testing.assert_array_equal(ran(tools, model, x), ran(tools, alone, x))


def test_few_small_weights_stay_alone(tools):
    """They would take more of the graph together."""
    text = "g (float[2, 64] x) => (float[2, 64] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    proto = tools.build(text, {"w": tools.weight(64, 64), "v": tools.weight(64, 64, seed=1)})
    model, found = placed(proto)
    lower(model, found)
    assert operators(model)["MatMul"] > 2 and not operators(model)["Split"]


def test_padded_columns_are_cut_off(tools):
    text = "g (float[2, 300] x) => (float[2, 200] y) { y = MatMul (x, w) }"
    proto = tools.build(text, {"w": tools.weight(300, 200)})
    model, found = placed(proto)
    lower(model, found)
    assert operators(model)["Slice"] == 1
    alone, found = placed(proto)
    rewrite(alone, found)
    x = np.random.default_rng(0).standard_normal((2, 300)).astype(np.float32)
    np.testing.assert_array_equal(ran(tools, model, x), ran(tools, alone, x))
