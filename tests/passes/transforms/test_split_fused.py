"""Weights inside of fused operators of ONNX Runtime are taken out, and nothing else changes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from tests.passes.conftest import build, weight

import onnxcomp
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.pass_manager import Context
from onnxcomp.passes.transforms.split_fused import SplitFused

WIDTH, HEADS, BATCH, LENGTH = 64, 4, 2, 7
IDS = np.arange(BATCH * LENGTH, dtype=np.int32).reshape(BATCH, LENGTH) % 90
X = weight(BATCH, LENGTH, WIDTH, seed=9)
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3], np.int32)
BIAS = weight(3 * WIDTH, seed=2)
FLOATS = f"float[{BATCH}, {LENGTH}, {WIDTH}]"

Feed = Mapping[str, Any]
Weights = dict[str, Any]
PRODUCT = "g ({x} x) => (float[B, L, N] y) {{ y = com.microsoft.{node} }}"

CASES: dict[str, tuple[str, Weights, Feed, Mapping[str, int]]] = {
    "FusedMatMul": (
        PRODUCT.format(x=FLOATS, node="FusedMatMul <alpha = 0.25, transB = 1> (x, w)"),
        {"w": weight(96, WIDTH)},
        {"x": X},
        {"Transpose": 1, "MatMul": 1, "Mul": 1},
    ),
    "FusedMatMul without a factor": (
        PRODUCT.format(x=FLOATS, node="FusedMatMul (x, w)"),
        {"w": weight(WIDTH, 96)},
        {"x": X},
        {"MatMul": 1},
    ),
    "FusedGemm": (
        f"g (float[{LENGTH}, {WIDTH}] x) => (float[B, N] y) {{"
        ' y = com.microsoft.FusedGemm <activation = "Relu", alpha = 0.5, transB = 1> (x, w, b) }',
        {"w": weight(96, WIDTH), "b": weight(96)},
        {"x": X[0]},
        {"Gemm": 1, "Relu": 1},
    ),
    "Attention": (
        f"g ({FLOATS} x, int32[{BATCH}, {LENGTH}] mask) => (float[B, L, N] y) {{"
        f" y = com.microsoft.Attention <num_heads = {HEADS}> (x, w, b, mask) }}",
        {"w": weight(WIDTH, 3 * WIDTH), "b": BIAS},
        {"x": X, "mask": MASK},
        {"MatMul": 1, "Add": 1, "Split": 1, "MultiHeadAttention": 1},
    ),
    "Attention that looks back": (
        PRODUCT.format(
            x=FLOATS,
            node=f"Attention <num_heads = {HEADS}, unidirectional = 1, scale = 0.3> (x, w, b)",
        ),
        {"w": weight(WIDTH, 3 * WIDTH), "b": BIAS},
        {"x": X},
        {"MatMul": 1, "Add": 1, "Split": 1, "MultiHeadAttention": 1},
    ),
    "EmbedLayerNormalization": (
        f"g (int32[{BATCH}, {LENGTH}] ids) => (float[B, L, N] y) {{"
        " y, last = com.microsoft.EmbedLayerNormalization <epsilon = 0.001>"
        " (ids, ids, w, p, s, gamma, beta) }",
        {
            "w": weight(90, WIDTH), "p": weight(40, WIDTH, seed=3), "s": weight(90, WIDTH, seed=4),
            "gamma": weight(WIDTH, seed=5), "beta": weight(WIDTH, seed=6),
        },
        {"ids": IDS},
        {"Gather": 4, "Shape": 1, "Range": 1, "Add": 2, "LayerNormalization": 1},
    ),
}  # fmt: skip


def fused(graph: str, weights: Weights) -> onnx.ModelProto:
    model = build(graph, weights)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def split(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, int]:
    loaded = load(model)
    canonicalize(loaded)
    settings = Settings(min_size=1024)
    change = SplitFused().run(loaded, Context(settings))
    save(loaded, path)
    return onnx.load(path), change.count


def run(model: onnx.ModelProto, feed: Feed) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_split_graph_computes_the_same(name: str, tmp_path: Path) -> None:
    graph, weights, feed, kinds = CASES[name]
    before = fused(graph, weights)
    after, count = split(before, tmp_path / "m.onnx")
    assert count == 1 and Counter(node.op_type for node in after.graph.node) == kinds
    np.testing.assert_allclose(run(after, feed), run(before, feed), rtol=1e-4, atol=1e-4)
    loaded = load(after)
    canonicalize(loaded)
    (site,) = [s for s in find_sites(loaded, min_size=1024).sites if s.name == "w"]
    assert {use.need for use in site.uses} <= {"matmul", "gather"}


@pytest.mark.parametrize("name", ["FusedMatMul", "Attention", "EmbedLayerNormalization"])
def test_the_weight_computes_on_codes_and_sees_data(name: str, tmp_path: Path) -> None:
    graph, weights, feed, _ = CASES[name]
    path, small = tmp_path / "m.onnx", tmp_path / "small.onnx"
    onnx.save(fused(graph, weights), path)
    result = onnxcomp.optimize(path, small, bits=6, min_size=1024, data=[dict(feed)] * 10)
    assert result.verify is not None and result.verify.passed
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert "HyperGather" in kinds if name.startswith("Embed") else "HyperMatMul" in kinds


@pytest.mark.parametrize(
    "node",
    [
        "FusedMatMul <transA = 1> (x, w)",
        f"Attention <num_heads = {HEADS}> (x, w)",
        f"Attention <num_heads = {HEADS}> (x, w, b, , past)",
    ],
)
def test_what_is_no_plain_product_stays(node: str, tmp_path: Path) -> None:
    past = f"float[2, {BATCH}, {HEADS}, 3, {WIDTH // HEADS}] past"
    kind = f"{FLOATS} x" if "past" not in node else f"{FLOATS} x, {past}"
    outputs = "y, present" if "past" in node else "y"
    graph = f"g ({kind}) => (float[B, L, N] y) {{ {outputs} = com.microsoft.{node} }}"
    rows = LENGTH if "transA" in node else WIDTH
    weights = {"w": weight(rows, 3 * WIDTH), "b": BIAS}
    after, count = split(fused(graph, weights), tmp_path / "m.onnx")
    assert count == 0 and [n.op_type for n in after.graph.node] == [node.split(" ")[0]]


def test_small_weights_and_old_models_stay(tmp_path: Path) -> None:
    graph, weights, _, _ = CASES["FusedMatMul"]
    old = fused(graph, weights)
    old.opset_import[0].version = 13
    assert split(old, tmp_path / "m.onnx")[1] == 0
    little = {"w": weight(96, WIDTH)[:3]}
    assert split(fused(graph, little), tmp_path / "m.onnx")[1] == 0
