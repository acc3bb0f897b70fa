"""The sparse codec keeps every bit, in bytes that are known before, and is taken where it pays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.analysis.zeros import mark_zeros
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.codec import SparseCodec, SparseParams
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import DTYPES, Array

CODEC = SparseCodec()


def pruned(shape: tuple[int, ...], zeros: float, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < zeros] = 0
    return weight


@settings(max_examples=40, deadline=None)
@given(
    extent=st.tuples(st.integers(1, 60), st.integers(1, 200)),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back_in_the_bytes_that_were_planned(
    make_site: Any, extent: tuple[int, int], zeros: float, dtype: str, seed: int
) -> None:
    weight = pruned(extent, zeros, seed).astype(DTYPES[dtype])
    negative = np.copysign(weight, -1.0).astype(weight.dtype)
    masked = np.where(weight == 0, negative, weight)  # as a trainer's mask leaves it
    params = SparseParams(sparse_format.count_kept(masked))
    assert params.kept == np.count_nonzero(weight)
    CODEC.check(params)
    site = make_site(*extent, dtype=dtype)
    payload = CODEC.encode(site, masked.astype(np.float32), params)
    assert payload.nbytes == CODEC.size(site, params)
    layout = CODEC.layout(site, params)
    found = {k: (t.shape, t.dtype) for k, t in payload.tensors.items()}
    assert found == {k: (t.shape, t.dtype) for k, t in layout.items()}
    assert payload.shared.keys() == CODEC.shared(site, params).keys()
    decoded = CODEC.decode(site, payload)
    assert decoded.dtype == np.float32
    assert decoded.tobytes() == weight.astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values_in_half_precision_are_rounded_and_no_zero_is(make_site: Any, dtype: str) -> None:
    weight = pruned((40, 130), 0.6).astype(DTYPES[dtype]).astype(np.float32)
    site, params = make_site(40, 130, dtype=dtype), SparseParams(np.count_nonzero(weight))
    half = dataclasses.replace(params, value_bits=16)
    CODEC.check(half)
    payload = CODEC.encode(site, weight, half)
    assert payload.nbytes == CODEC.size(site, half)
    saved = 2 * (1 + params.kept) if dtype == "float32" else 0
    assert payload.nbytes == CODEC.encode(site, weight, params).nbytes - saved
    decoded = CODEC.decode(site, payload)
    np.testing.assert_array_equal(decoded, weight.astype(np.float16).astype(np.float32))
    error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(CODEC.predict(site, half), rel=0.2)
    assert SparseParams.of(half).to_json() == {"kept": params.kept, "value_bits": 16}
    assert "value_bits" not in params.to_json()


def test_half_precision_that_cannot_be_is_refused(make_site: Any) -> None:
    weight = pruned((40, 130), 0.6)
    weight[np.unravel_index(np.argmax(weight), weight.shape)] = 1e5
    params = SparseParams(np.count_nonzero(weight), value_bits=16)
    with pytest.raises(ModelError, match="float16"):
        CODEC.encode(make_site(40, 130), weight, params)
    with pytest.raises(UsageError, match="value_bits"):
        CODEC.check(SparseParams(5, value_bits=8))


def test_pieces_of_large_weights_are_put_together(make_site: Any) -> None:
    weight = pruned((1030, 2050), 0.7)
    assert sparse_format.count_kept(weight) == np.count_nonzero(weight)
    payload = CODEC.encode(make_site(1030, 2050), weight, SparseParams(np.count_nonzero(weight)))
    np.testing.assert_array_equal(CODEC.decode(make_site(1030, 2050), payload), weight)


def test_ranks_follow_their_definition() -> None:
    for byte, row in enumerate(sparse_format.ranks()):
        bits = [byte >> j & 1 for j in range(8)]
        assert row.tolist() == [sum(bits[: j + 1]) * bits[j] for j in range(8)]


def test_only_weights_with_known_zeros_are_offered_anything(make_site: Any) -> None:
    site = make_site(64, 64)
    assert "zero" in (CODEC.refuse(site) or "") and not CODEC.candidates(site)
    known = dataclasses.replace(site, kept=100)
    assert CODEC.refuse(known) is None
    assert CODEC.candidates(known) == [SparseParams(100)]
    assert CODEC.size(known, SparseParams(100)) == 64 * 8 + 4 * 101
    with pytest.raises(UsageError):
        CODEC.check(SparseParams(-1))


def test_another_weight_than_the_one_that_was_planned_is_refused(make_site: Any) -> None:
    with pytest.raises(ModelError, match="planned"):
        CODEC.encode(make_site(8, 8), pruned((8, 8), 0.5), SparseParams(64))


def test_tensors_that_do_not_fit_are_refused(make_site: Any) -> None:
    site = make_site(8, 13)
    weight = pruned((8, 13), 0.5)
    payload = CODEC.encode(site, weight, SparseParams(np.count_nonzero(weight)))
    mask, values = payload.tensors["mask"], payload.tensors["values"]
    behind = mask.copy()
    behind[0, -1] |= 0x80
    fits = np.append(values, np.float32(1))
    for tensors in (
        {"mask": mask[:, :1], "values": values},
        {"mask": mask, "values": values[1:]},
        {"mask": behind, "values": fits},
    ):
        with pytest.raises(ValueError, match="mask"):
            CODEC.decode(site, Payload(tensors))


def product(weight: Array, opset: int = 17) -> onnx.ModelProto:
    """A product with one weight."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", kind, ["n", len(weight)])], [value("y", kind, None)]),
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    ("zeros", "opset", "dtype", "counted"),
    [
        (0.5, 17, np.float32, True),
        (0.5, 11, np.float32, True),
        (0.5, 10, np.float32, False),
        (0.01, 17, np.float32, False),
        (0.05, 17, np.float32, True),
        (0.05, 17, np.float16, False),
        (0.5, 17, np.float16, True),
        (0.5, 17, np.float64, False),
    ],
)
def test_zeros_are_counted_where_leaving_them_out_pays(
    zeros: float, opset: int, dtype: Any, counted: bool
) -> None:
    weight = pruned((96, 96), zeros).astype(dtype)
    weight[0, 0] = -0.0
    model = load(product(weight, opset))
    canonicalize(model)
    (site,) = mark_zeros(model, find_sites(model, min_size=64).sites)
    assert site.kept == (np.count_nonzero(weight) if counted else None)


@pytest.mark.parametrize(
    ("zeros", "asked", "codec"),
    [
        (0.95, {}, "sparse"),  # fewer than 4 bits for each weight, and nothing is lost
        (0.6, {}, "hyper"),
        (0.6, {"ratio": 2.2}, "sparse"),
        (0.6, {"method": "sparse"}, "sparse"),
        (0.6, {"method": "dense", "rest": "exact"}, "sparse"),
        (0.6, {"method": "dense"}, "dense"),
        (0.95, {"stock": True}, "int"),
        (0.95, {"set_": ["w:bits=6"]}, "hyper"),
        (0.0, {"method": "sparse"}, "dense"),
    ],
)
def test_who_gets_it(zeros: float, asked: dict[str, Any], codec: str) -> None:
    plan = onnxcomp.plan(product(pruned((256, 256), zeros)), **asked)
    (choice,) = plan
    assert choice.codec == codec
    if codec == "sparse":
        assert choice.error == 0.0
        assert choice.reason


def test_a_convolution_is_restored_bit_for_bit(tmp_path: Path) -> None:
    weight = pruned((32, 16, 3, 3), 0.8)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        *("g", [value("x", 1, [1, 16, 9, 9])], [value("y", 1, None)]),
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = onnxcomp.optimize(model, tmp_path / "o.onnx", method="sparse")
    assert result.verify is not None and result.verify.passed
    onnxcomp.expand(tmp_path / "o.onnx", tmp_path / "d.onnx")
    dense = numpy_helper.to_array(onnx.load(tmp_path / "d.onnx").graph.initializer[0])
    assert dense.tobytes() == weight.tobytes()


def test_a_run_stores_values_in_half_precision_where_a_rule_says_so(tmp_path: Path) -> None:
    weight = pruned((256, 192), 0.6)
    exact = onnxcomp.optimize(product(weight), tmp_path / "e.onnx", method="sparse")
    half = onnxcomp.optimize(
        product(weight), tmp_path / "h.onnx", method="sparse", set_=["w:value_bits=16"]
    )
    # The node that converts them takes some bytes.
    saved = exact.report.output.bytes - half.report.output.bytes
    assert 0 < 2 * (1 + np.count_nonzero(weight)) - saved < 300
    assert half.verify is not None and half.verify.passed
    onnxcomp.expand(tmp_path / "h.onnx", tmp_path / "d.onnx")
    dense = numpy_helper.to_array(onnx.load(tmp_path / "d.onnx").graph.initializer[0])
    rounded = weight.astype(np.float16).astype(np.float32)
    assert dense.tobytes() == rounded.tobytes()
    x = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    for session in (onnxruntime.InferenceSession, onnxcomp.InferenceSession):
        (found,) = session(tmp_path / "h.onnx").run(None, {"x": x})
        np.testing.assert_allclose(found, x @ rounded, rtol=1e-4, atol=1e-4)


GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("sparse_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_decode_to_the_bit(path: Path) -> None:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    dtype = DTYPES[str(golden["dtype"])]
    tensors = {"mask": golden["mask"], "values": golden["values"].view(dtype)}
    found = sparse_format.decode(tensors, golden["weight"].shape).astype(np.float32)
    assert found.tobytes() == golden["decoded"].tobytes() == golden["weight"].tobytes()


def test_there_is_a_golden_file_for_every_type() -> None:
    assert {path.stem.split("_")[1] for path in GOLDEN} == set(DTYPES)
