"""Masks of patterns, and the codec sparse+hyper: sizes, errors, and models that use it."""

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
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.codecs.sparse import format as sparse_format
from onnxcomp.passes.codecs.sparse.codec import SparseCodec, SparseParams
from onnxcomp.passes.codecs.sparse.hyper_codec import SparseHyperCodec, SparseHyperParams
from onnxcomp.passes.codecs.sparse.int_codec import SparseIntCodec, SparseIntParams
from onnxcomp.passes.codecs.sparse.masks import MaskForm
from onnxcomp.passes.weight import Array, WeightSite

CODEC = SparseHyperCodec()
PAIRS = (0, 0)  # stands for two of every four


def pruned(extent: tuple[int, int], block: tuple[int, int], seed: int = 0) -> Array:
    """Normal values, about half of the blocks zero; of `PAIRS`, the two smallest of every four."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(extent).astype(np.float32)
    if block == PAIRS:
        fours = weight.reshape(extent[0], -1, 4)
        np.put_along_axis(fours, np.argsort(np.abs(fours), axis=-1)[..., :2], 0, axis=-1)
        return weight
    counts = tuple(size // side for size, side in zip(extent, block, strict=True))
    held = rng.random(counts) < 0.5
    return np.where(np.kron(held, np.ones(block, bool)), weight, np.float32(0))


def marked(make_site: Any, weight: Array, **more: Any) -> WeightSite:
    """The site of a weight, with what analysis finds out."""
    return dataclasses.replace(
        make_site(*weight.shape, **more),
        kept=sparse_format.count_kept(weight),
        paired=sparse_format.is_paired(weight),
        block=sparse_format.block_of(weight),
    )


def product(weight: Array, opset: int = 17) -> onnx.ModelProto:
    """A product with one weight, ``(length, rows)`` as MatMul takes it."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", kind, ["n", weight.shape[1]])], [value("y", kind, None)]),
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@settings(max_examples=60, deadline=None)
@given(
    block=st.tuples(st.sampled_from([1, 2, 4, 16]), st.sampled_from([1, 2, 8, 32])),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 21)),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_masks_of_blocks_hold_every_bit(
    block: tuple[int, int], counts: tuple[int, int], share: float
) -> None:
    held = np.random.default_rng(counts).random(counts) < share
    whole = np.kron(held, np.ones(block, bool)).astype(bool)
    form = MaskForm(*whole.shape, block=block)
    bits = np.packbits(whole, axis=1, bitorder="little")
    mask = form.pack_bits(bits)
    assert (
        mask.shape == form.shape == (counts[0], -(-counts[1] // 8)) and mask.nbytes == form.nbytes
    )
    np.testing.assert_array_equal(form.bits(mask), bits)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), eights=st.integers(1, 40), seed=st.integers(0, 99))
def test_masks_of_pairs_hold_every_bit(rows: int, eights: int, seed: int) -> None:
    order = np.random.default_rng(seed).random((rows, 2 * eights, 4)).argsort(axis=-1)
    held = (order < 2).reshape(rows, -1)
    form = MaskForm(rows, 8 * eights, paired=True)
    bits = np.packbits(held, axis=1, bitorder="little")
    mask = form.pack_bits(bits)
    assert mask.shape == form.shape and mask.max() < 216
    np.testing.assert_array_equal(form.bits(mask), bits)
    assert form.nbytes <= rows * (held.shape[1] / 12 + 2)
    with pytest.raises(ValueError, match="215"):
        form.bits(np.full_like(mask, 216))


def test_masks_without_the_pattern_are_refused() -> None:
    held = np.zeros((4, 16), bool)
    held[1, 3] = True
    bits = np.packbits(held, axis=1, bitorder="little")
    for form in (MaskForm(4, 16, block=(2, 1)), MaskForm(4, 16, paired=True)):
        with pytest.raises(ModelError, match=r"pairs|blocks of 2 x 1"):
            form.pack_bits(bits)
        with pytest.raises(ValueError, match="fit"):
            form.bits(np.zeros((3, 1), np.uint8))


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 1), (8, 8), (32, 32)])
def test_the_largest_blocks_are_found(block: tuple[int, int]) -> None:
    weight = pruned((96, 160), block)
    assert sparse_format.block_of(weight) == block
    tall = np.concatenate([np.zeros((8192, 160), np.float32), weight])  # found in the last piece
    assert sparse_format.block_of(tall) == block
    weight[5, 7] = 0 if weight[5, 7] else 1
    assert sparse_format.block_of(weight) == (1, 1)


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 1), (4, 8), PAIRS])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sizes_and_errors_are_known_before(
    make_site: Any, block: tuple[int, int], dtype: str
) -> None:
    weight = pruned((64, 1024), block)
    site = marked(make_site, weight, dtype=dtype)
    offered = CODEC.candidates(site)
    assert [params.bits for params in offered] == [6, 5, 4, 3, 2]
    for params in offered:
        CODEC.check(params)
        payload = CODEC.encode(site, weight, params)
        layout = CODEC.layout(site, params)
        assert {k: (t.shape, t.dtype) for k, t in payload.tensors.items()} == {
            k: (t.shape, t.dtype) for k, t in layout.items()
        }
        assert payload.nbytes == CODEC.size(site, params)
        assert dict(payload.attributes) == dict(CODEC.attributes(site, params))
        assert payload.shared.keys() == CODEC.shared(site, params).keys()
        decoded = CODEC.decode(site, payload)
        assert not decoded[weight == 0].any()
        error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
        assert error == pytest.approx(CODEC.predict(site, params), rel=0.03)
        assert params.paired == (block == PAIRS)


def test_two_of_four_in_four_bits_against_integers(make_site: Any) -> None:
    """Smaller than integers of as many bits, and at least 0.9 dB more exact."""
    weight = pruned((256, 4096), PAIRS)
    site = marked(make_site, weight)
    own = next(params for params in CODEC.candidates(site) if params.bits == 4)
    integers, other = SparseIntCodec(), SparseIntParams(4, 128, 1, site.kept or 0)
    assert CODEC.size(site, own) < 0.98 * integers.size(site, other)
    assert 8 * CODEC.size(site, own) / weight.size == pytest.approx(2 + 2 / 3 + 1 / 16, abs=0.01)
    errors = [
        np.linalg.norm(codec.decode(site, codec.encode(site, weight, params)) - weight)
        for codec, params in ((CODEC, own), (integers, other))
    ]
    assert errors[0] < 0.9 * errors[1]


def test_fewer_than_two_of_four_take_bits(make_site: Any) -> None:
    weight = pruned((64, 1024), PAIRS)
    weight[:, ::8] = 0
    assert not any(params.paired for params in CODEC.candidates(marked(make_site, weight)))
    assert not CODEC.candidates(make_site(64, 1024))
    weight = pruned((64, 1024), PAIRS)
    weight[3, np.flatnonzero(weight[3])[:2]] = 0  # two of these are stored as if they were kept
    site = marked(make_site, weight)
    (params,) = (own for own in CODEC.candidates(site) if own.bits == 6)
    assert params.paired
    decoded = CODEC.decode(site, CODEC.encode(site, weight, params))
    assert np.abs(decoded[weight == 0]).max() < 0.1


def test_a_weight_of_zeros_becomes_zeros(make_site: Any) -> None:
    site = dataclasses.replace(make_site(32, 64), kept=0)
    payload = CODEC.encode(site, np.zeros((32, 64), np.float32), SparseHyperParams())
    assert not CODEC.decode(site, payload).any()


def test_other_weights_and_settings_are_refused(make_site: Any) -> None:
    weight = pruned((16, 64), (1, 1))
    site = marked(make_site, weight)
    with pytest.raises(ModelError, match="planned"):
        CODEC.encode(site, weight, SparseHyperParams(kept=3))
    with pytest.raises(ModelError, match="blocks of 4 x 1"):
        CODEC.encode(site, weight, SparseHyperParams(high=4, kept=site.kept or 0))
    wrong: tuple[dict[str, int], ...] = ({"bits": 7}, {"paired": 2}, {"wide": 3}, {"kept": -1})
    for fields in wrong:
        with pytest.raises(UsageError):
            CODEC.check(SparseHyperParams(**fields))
    payload = CODEC.encode(site, weight, SparseHyperParams(kept=site.kept or 0))
    for change in ({"block": (3, 1)}, {"block": 4}, {"paired": 7}, {"block": (32, 1)}):
        with pytest.raises(ValueError, match=r"fit|pair"):
            CODEC.decode(
                site, Payload(payload.tensors, payload.shared, {**payload.attributes, **change})
            )
    fewer = {**payload.tensors, "mask": payload.tensors["mask"][:, :-1]}
    with pytest.raises(ValueError, match="fit"):
        CODEC.decode(site, Payload(fewer, payload.shared, payload.attributes))


@pytest.mark.parametrize("block", [(1, 1), (1, 4), (4, 1), (16, 2), PAIRS])
@pytest.mark.parametrize(("mode", "opset", "dtype"), [
    ("auto", 17, np.float32), ("decode", 13, np.float32), ("auto", 11, np.float16),
])  # fmt: skip
def test_models_with_zeros_are_restored(
    tmp_path: Path, block: tuple[int, int], mode: str, opset: int, dtype: Any
) -> None:
    weight = pruned((128, 384), block).astype(dtype)
    path = tmp_path / "o.onnx"
    result = onnxcomp.optimize(
        product(weight, opset), path, method="sparse+hyper", bits=4, mode=mode
    )
    (site,) = result.report.sites
    assert site.method == "sparse+hyper" and site.params["paired"] == (block == PAIRS)
    assert result.verify is not None and result.verify.passed
    assert result.verify.portable is not None and result.verify.portable.passed
    onnxcomp.expand(path, tmp_path / "d.onnx")
    (dense,) = onnx.load(tmp_path / "d.onnx").graph.initializer
    found = numpy_helper.to_array(dense).T
    assert not found[weight == 0].any()
    x = np.random.default_rng(1).standard_normal((4, 384)).astype(dtype)
    plain = onnxruntime.InferenceSession(path).run(None, {"x": x})[0].astype(np.float32)
    wanted = x.astype(np.float32) @ found.T.astype(np.float32)
    assert np.linalg.norm(plain - wanted) < 2e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (8, 8)])
def test_blocks_of_exact_weights_have_smaller_masks(
    tmp_path: Path, make_site: Any, block: tuple[int, int]
) -> None:
    weight = pruned((128, 384), block)
    site, codec = marked(make_site, weight), SparseCodec()
    (params,) = codec.candidates(site)
    assert (params.high, params.wide) == block
    assert SparseParams(3).to_json() == {"kept": 3}
    plain = SparseParams(site.kept or 0)
    saved = codec.size(site, plain) - codec.size(site, params)
    assert saved == 128 * 48 - 128 * 48 // (block[0] * block[1])
    result = onnxcomp.optimize(product(weight), tmp_path / "o.onnx", method="sparse")
    assert result.verify is not None and result.verify.passed
    assert result.report.sites[0].bytes_after == codec.size(site, params)
    onnxcomp.expand(tmp_path / "o.onnx", tmp_path / "d.onnx")
    (dense,) = onnx.load(tmp_path / "d.onnx").graph.initializer
    assert numpy_helper.to_array(dense).T.tobytes() == weight.tobytes()


def test_nobody_gets_it_who_does_not_ask_for_it() -> None:
    for asked in ({}, {"ratio": 5}, {"method": "sparse"}):
        (choice,) = onnxcomp.plan(product(pruned((256, 384), PAIRS)), **asked)
        assert choice.codec != "sparse+hyper"


GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("sparsehyper_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_are_written_and_read_to_the_bit(path: Path, make_site: Any) -> None:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    weight = golden["weight"]
    bits, paired, high, wide = (int(value) for value in golden["settings"])
    kept = int(np.count_nonzero(weight))
    params = SparseHyperParams(bits, 7, 128, paired, high, wide, kept)
    site = make_site(*weight.shape)
    payload = CODEC.encode(site, weight, params)
    for name, tensor in payload.tensors.items():
        assert tensor.tobytes() == golden[name].tobytes(), name
    tensors = {name: golden[name] for name in payload.tensors}
    found = CODEC.decode(site, Payload(tensors, payload.shared, payload.attributes))
    assert found.tobytes() == golden["decoded"].tobytes()


def test_there_is_a_golden_file_for_every_pattern() -> None:
    assert {path.stem.split("_")[2] for path in GOLDEN} == {"1by1", "paired", "1by4", "4by2"}
