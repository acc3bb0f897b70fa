"""The codec sparse+int: sizes, errors, patterns, and models that use it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.codecs.sparse import integers
from onnxcomp.passes.codecs.sparse.int_codec import SparseIntCodec, SparseIntParams
from onnxcomp.passes.codecs.sparse.integers import IntLayout
from onnxcomp.passes.weight import Array

CODEC = SparseIntCodec()


def halved(rows: int, length: int, *, paired: bool, seed: int = 0) -> Array:
    """Normal values, half of them zero: any half, or two of every four."""
    weight = np.random.default_rng(seed).standard_normal((rows, length)).astype(np.float32)
    parts = np.abs(weight).reshape(rows, -1, 4 if paired else length)
    half = parts.shape[2] // 2
    order = np.argsort(parts, axis=-1)[..., :half]
    np.put_along_axis(weight.reshape(parts.shape), order, 0, axis=-1)
    return weight


def site_of(make_site: Any, weight: Array, *, paired: bool = False, **more: Any) -> Any:
    site = make_site(*weight.shape, **more)
    return dataclasses.replace(site, kept=int(np.count_nonzero(weight)), paired=paired)


def test_sizes_against_those_of_dense_integers(make_site: Any) -> None:
    """Two of four with 4 bits take three quarters of dense 4 bits with the same scales at most."""
    weight = halved(256, 4096, paired=True)
    dense = {bits: bits + 16 / 128 for bits in (8, 4)}
    sizes = {
        (params.bits, params.paired): 8
        * CODEC.size(site_of(make_site, weight), params)
        / weight.size
        for bits in (8, 4)
        for paired in (0, 1)
        for params in [SparseIntParams(bits, 128, paired, weight.size // 2)]
    }
    assert sizes[4, 1] <= 0.75 * dense[4]
    assert sizes[4, 1] == pytest.approx(2 + 2 / 3 + 16 / 128, abs=0.01)
    assert sizes[8, 0] == pytest.approx(4 + 1 + 16 / 128, abs=0.01)
    assert sizes[8, 0] < 0.65 * dense[8]


def test_the_smaller_mask_is_offered(make_site: Any) -> None:
    weight = halved(64, 1024, paired=True)
    offered = CODEC.candidates(site_of(make_site, weight, paired=True))
    assert [(params.bits, params.paired) for params in offered] == [(8, 1), (4, 1)]
    offered = CODEC.candidates(site_of(make_site, weight))
    assert [(params.bits, params.paired) for params in offered] == [(8, 0), (4, 0)]
    weight[:, 64:] = 0  # few elements: codes for all of two in four cost more than bits
    offered = CODEC.candidates(site_of(make_site, weight, paired=True))
    assert {params.paired for params in offered} == {0}
    assert not CODEC.candidates(make_site(64, 1024))


@pytest.mark.parametrize("paired", [False, True])
def test_predicted_and_measured_errors_are_met(make_site: Any, paired: bool) -> None:
    weight = halved(128, 1024, paired=paired)
    site = site_of(make_site, weight, paired=paired)
    offered = CODEC.candidates(site)
    measured = CODEC.measure(site, weight, offered)
    for params, expected in zip(offered, measured, strict=True):
        decoded = CODEC.decode(site, CODEC.encode(site, weight, params))
        assert not decoded[weight == 0].any()
        error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
        assert error == pytest.approx(expected, rel=0.03)
        assert error == pytest.approx(CODEC.predict(site, params), rel=0.25)


def test_nothing_is_stored_of_a_weight_of_zeros(make_site: Any) -> None:
    site = dataclasses.replace(make_site(16, 64), kept=0)
    payload = CODEC.encode(site, np.zeros((16, 64), np.float32), SparseIntParams(4))
    assert not any(tensor.any() for tensor in payload.tensors.values())
    assert not CODEC.decode(site, payload).any()


def test_other_weights_and_settings_are_refused(make_site: Any) -> None:
    weight = halved(16, 64, paired=False)
    site = site_of(make_site, weight)
    with pytest.raises(ModelError, match="planned"):
        CODEC.encode(site, weight, SparseIntParams(kept=3))
    with pytest.raises(ModelError, match="float16"):
        CODEC.encode(site, weight * np.float32(1e9), SparseIntParams(kept=site.kept))
    for wrong in ({"bits": 5}, {"group": 32}, {"paired": 2}, {"kept": -1}):
        with pytest.raises(UsageError):
            CODEC.check(SparseIntParams(**wrong))
    payload = CODEC.encode(site, weight, SparseIntParams(kept=site.kept))
    for name in ("mask", "codes", "scales"):
        tensors = {**payload.tensors, name: payload.tensors[name][:-1]}
        with pytest.raises(ValueError, match="fit"):
            CODEC.decode(site, Payload(tensors, payload.shared, payload.attributes))


def test_ranks_of_pairs_follow_their_definition() -> None:
    table = integers.paired_ranks()
    assert not table[216:].any()
    assert table[0].tolist() == [1, 2, 0, 0, 3, 4, 0, 0, 5, 6, 0, 0]
    assert table[5 + 6 * 2 + 36 * 3].tolist() == [0, 0, 1, 2, 3, 0, 0, 4, 0, 5, 6, 0]
    assert len({row.tobytes() for row in table[:216]}) == 216


def product(weight: Array) -> onnx.ModelProto:
    """A product with one weight, ``(length, rows)`` as MatMul takes it."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", 1, ["n", weight.shape[1]])], [value("y", 1, None)]),
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_models_with_zeros_become_products_on_integers(
    tmp_path: Path, bits: int, paired: bool
) -> None:
    weight = halved(256, 384, paired=paired)
    path = tmp_path / "o.onnx"
    asked = {"method": "sparse+int", "bits": bits}
    (choice,) = onnxcomp.plan(product(weight), **asked)
    assert (choice.codec, choice.params.to_json()["paired"]) == ("sparse+int", int(paired))
    result = onnxcomp.optimize(product(weight), path, **asked)
    assert result.verify is not None and result.verify.passed
    assert [node.op_type for node in onnx.load(path).graph.node] == ["SparseIntMatMul"]
    x = np.random.default_rng(1).standard_normal((4, 384)).astype(np.float32)
    found = onnxcomp.InferenceSession(path).run(None, {"x": x})[0]
    onnxcomp.expand(path, tmp_path / "d.onnx")
    (dense,) = onnx.load(tmp_path / "d.onnx").graph.initializer
    wanted = x @ numpy_helper.to_array(dense)
    assert np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)


def test_nobody_gets_it_who_does_not_ask_for_it() -> None:
    weight = halved(256, 384, paired=True)
    for asked in ({}, {"ratio": 5}, {"method": "sparse"}):
        (choice,) = onnxcomp.plan(product(weight), **asked)
        assert choice.codec != "sparse+int"


GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("sparseint_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_decode_to_the_bit(path: Path) -> None:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    bits, group, paired = (int(value) for value in golden["settings"])
    layout = IntLayout(*golden["weight"].shape, bits, group, paired == 1, 0)
    assert integers.decode(golden, layout).tobytes() == golden["decoded"].tobytes()


def test_there_is_a_golden_file_for_every_form() -> None:
    forms = {tuple(path.stem.split("_")[1:3]) for path in GOLDEN}
    assert forms == {(bits, pattern) for bits in ("b4", "b8") for pattern in ("any", "paired")}
