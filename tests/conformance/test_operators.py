"""Weights of every operator that has any, compressed and run in both forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.runtime.evaluate import run_model

Array = npt.NDArray[Any]

# Graph, inputs, weights, and how many of the weights end as codes.
Case = tuple[str, Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]], int]

CASES: dict[str, Case] = {
    "ConvTranspose": (
        "float[1, 32, 6, 6] x", {"w": (32, 32, 3, 3)}, "y = ConvTranspose (x, w)", 1,
    ),
    "grouped Conv": (
        "float[1, 32, 6, 6] x", {"w": (32, 16, 3, 3)}, "y = Conv <group = 2> (x, w)", 1,
    ),
    "depthwise Conv": (
        "float[1, 256, 6, 6] x", {"w": (256, 1, 3, 3)}, "y = Conv <group = 256> (x, w)", 1,
    ),
    "Conv over time": ("float[1, 16, 20] x", {"w": (32, 16, 5)}, "y = Conv (x, w)", 1),
    "LSTM": (
        "float[5, 2, 24] x", {"w": (1, 128, 24), "r": (1, 128, 32)},
        "y = LSTM <hidden_size = 32> (x, w, r)", 2,
    ),
    "LSTM in two directions": (
        "float[5, 2, 24] x", {"w": (2, 128, 24), "r": (2, 128, 32)},
        'y = LSTM <hidden_size = 32, direction = "bidirectional"> (x, w, r)', 2,
    ),
    "GRU": (
        "float[5, 2, 24] x", {"w": (1, 96, 24), "r": (1, 96, 32)},
        "y = GRU <hidden_size = 32> (x, w, r)", 2,
    ),
    "RNN": (
        "float[5, 2, 48] x", {"w": (1, 64, 48), "r": (1, 64, 64)},
        "y = RNN <hidden_size = 64> (x, w, r)", 2,
    ),
    "packed Attention": (
        "float[2, 7, 32] x", {"w": (32, 96), "b": (96,)},
        "y = com.microsoft.Attention <num_heads = 4> (x, w, b)", 1,
    ),
    "MultiHeadAttention over constants": (
        "float[1, 7, 32] x", {"k": (1, 40, 32), "v": (1, 40, 32)},
        "y = com.microsoft.MultiHeadAttention <num_heads = 4> (x, k, v)", 2,
    ),
    "MultiHeadAttention behind a product": (
        "float[1, 7, 32] x", {"w": (32, 96)},
        "p = MatMul (x, w) q, k, v = Split <axis = -1> (p, sizes) "
        "y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v)", 1,
    ),
    "Attention over constants": (
        "float[1, 4, 7, 16] x", {"k": (1, 4, 20, 16), "v": (1, 4, 20, 16)},
        "y = Attention (x, k, v)", 2,
    ),
    "FusedConv": (
        "float[1, 32, 6, 6] x", {"w": (32, 32, 3, 3)},
        'y = com.microsoft.FusedConv <activation = "Relu"> (x, w)', 1,
    ),
    "FusedGemm": (
        "float[3, 48] x", {"w": (64, 48), "c": (64,)},
        'y = com.microsoft.FusedGemm <activation = "Relu", transB = 1> (x, w, c)', 1,
    ),
    "FusedMatMul": (
        "float[3, 48] x", {"w": (64, 48)},
        "y = com.microsoft.FusedMatMul <transB = 1, alpha = 0.5> (x, w)", 1,
    ),
    "Einsum": (
        "float[3, 48] x", {"w": (48, 64)}, 'y = Einsum <equation = "ij,jk->ik"> (x, w)', 1,
    ),
    "Einsum over heads": (
        "float[2, 5, 48] x", {"w": (48, 4, 16)},
        'y = Einsum <equation = "bth,hnd->btnd"> (x, w)', 1,
    ),
    "batched MatMul": ("float[3, 5, 32] x", {"w": (3, 32, 48)}, "y = MatMul (x, w)", 1),
    "weight from the left": ("float[48, 5] x", {"w": (64, 48)}, "y = MatMul (w, x)", 1),
    "SkipLayerNormalization behind a product": (
        "float[1, 5, 64] x", {"w": (64, 64), "scale": (64,), "shift": (64,)},
        "p = MatMul (x, w) y = com.microsoft.SkipLayerNormalization (p, x, scale, shift)", 1,
    ),
    "EmbedLayerNormalization": (
        "int32[1, 5] x", {"words": (64, 48), "places": (64, 48), "scale": (48,), "shift": (48,)},
        "y, mask = com.microsoft.EmbedLayerNormalization (x, , words, places, , scale, shift)", 2,
    ),
    "Loop with captured and own weights": (
        "float[3, 48] x", {"w": (48, 48)},
        "y = Loop <body = step (int64 i, bool c, float[3, 48] s) => "
        "(bool d, float[3, 48] t) { d = Identity (c) p = MatMul (s, w) r = Relu (p) "
        "q = MatMul (r, own) "
        "t = Tanh (q) }> (trips, go, x)", 2,
    ),
    "Scan with captured and own weights": (
        "float[4, 48] x", {"w": (48, 48), "start": (1, 48)},
        "last, y = Scan <num_scan_inputs = 1, body = step (float[1, 48] s, float[48] e) => "
        "(float[1, 48] t, float[1, 48] u) { a = Add (s, e) p = MatMul (a, w) r = Relu (p) "
        "q = MatMul (r, own) "
        "t = Tanh (q) u = Identity (t) }> (start, x)", 2,
    ),
}  # fmt: skip

# What graphs read besides inputs and weights.
CONSTANTS = {
    "sizes": np.array([32, 32, 32]),
    "trips": np.array(3),
    "go": np.array(True),
}


def build(case: str) -> onnx.ModelProto:
    source, weights, nodes, _ = CASES[case]
    graph = onnx.parser.parse_graph(f"g ({source}) => (float y) {{ {nodes} }}")
    graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(len(case))
    for name, shape in weights.items():
        values = rng.standard_normal(shape) / np.sqrt(shape[-1])
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    for name, array in CONSTANTS.items():
        if any(name in node.input for node in graph.node):
            graph.initializer.append(numpy_helper.from_array(array, name))
    for node in graph.node:
        for attribute in node.attribute:
            if "own" in nodes and attribute.type == onnx.AttributeProto.GRAPH:
                own = rng.standard_normal((48, 48)).astype(np.float32) / 7
                attribute.g.initializer.append(numpy_helper.from_array(own, "own"))
    opset = 23 if case == "Attention over constants" else 17
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


@pytest.mark.parametrize("mode", ["auto", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_compressed_and_both_forms_run(case: str, mode: Any, tmp_path: Path) -> None:
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    onnx.save(build(case), dense)
    settings = ".*:bits=6,state_bits=8,group=32"
    result = oc.optimize(
        dense, small, method="hyper", bits=6, min_size=1024, mode=mode, set_=settings
    )
    assert result.verify is not None and result.verify.passed
    coded = [site.name for site in result.report.sites if site.compressed]
    assert len(coded) == CASES[case][3], [(s.name, s.reason) for s in result.report.sites]
    (found,) = result.verify.outputs.values()
    assert found.snr_db is not None and found.snr_db > 20
    oc.expand(small, tmp_path / "expanded.onnx")
    feed = {"x": sample(case)}
    (wanted,), (portable,) = (
        run_model(path, [feed], library=False) for path in (tmp_path / "expanded.onnx", small)
    )
    np.testing.assert_allclose(portable["y"], wanted["y"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_structured_tables_go_through_the_whole_compiler(bits: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    weights = {"v": (96, 128), "w": (128, 80)}
    graph = onnx.parser.parse_graph(
        "g (float[4, 96] x) => (float y) { a = MatMul (x, v) r = Relu (a) y = MatMul (r, w) }"
    )
    graph.output[0].type.tensor_type.ClearField("shape")
    for name, shape in weights.items():
        values = rng.standard_normal(shape).astype(np.float32) / 10
        graph.initializer.append(numpy_helper.from_array(values, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    dense, small = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    onnx.save(model, dense)
    result = oc.optimize(
        dense, small, method="hyper", bits=bits, min_size=1024, set_=".*:table=structured"
    )
    assert result.verify is not None and result.verify.passed
    assert [site.params["table"] for site in result.report.sites] == ["structured"] * 2
    oc.apply(dense, result.plan, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == small.read_bytes()
    oc.expand(small, tmp_path / "expanded.onnx")
    feed = {"x": rng.standard_normal((4, 96)).astype(np.float32)}
    (wanted,), (portable,) = (
        run_model(path, [feed], library=False) for path in (tmp_path / "expanded.onnx", small)
    )
    np.testing.assert_allclose(portable["y"], wanted["y"], rtol=0, atol=1e-4)


def sample(case: str) -> Array:
    kind, rest = CASES[case][0].split("[")
    shape = [int(size) for size in rest.split("]")[0].split(",")]
    rng = np.random.default_rng(7)
    if kind == "int32":
        return rng.integers(0, 64, shape).astype(np.int32)
    return rng.standard_normal(shape).astype(np.float32)
