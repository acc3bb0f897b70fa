"""The hash, the maps and the projection of trained weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.hash import (
    format as hash_format,
)
from onnxcomp.passes.codecs.hash import (
    projection as hash_projection,
)
from onnxcomp.passes.codecs.hash.codec import HashCodec, HashParams
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing, mix, reduce, seeds
from onnxcomp.passes.weight import Stats, WeightSite

SiteMaker = Callable[..., WeightSite]
CODEC = HashCodec()


def test_the_hash_gives_the_published_values() -> None:
    keys = np.array([0, 1, 2, 3, 2**31 - 1, 2**31, 2**40 + 1], np.int64)
    hashes = [401096637, 966896922, 951862733, 566962341, 1269971240, 401096637, 966896922]
    assert mix(keys).tolist() == hashes
    assert reduce(mix(keys[:5]), 1000).tolist() == [186, 450, 443, 264, 591]


def test_unsigned_arithmetic_of_32_bits_gives_the_same_hash() -> None:
    keys = np.random.default_rng(0).integers(0, 2**31, 100_000)
    x = keys.astype(np.uint32) * np.uint32(741103597) + np.uint32(506832693)
    for _ in range(4):
        x = (x * (2 * x + np.uint32(1))) & np.uint32(2**31 - 1)
        x = (x >> np.uint32(15)) | ((x & np.uint32(0x7FFF)) << np.uint32(16))
    assert np.array_equal(mix(keys), x.astype(np.int64))


def test_every_bit_of_a_hash_depends_on_every_bit_of_the_key() -> None:
    keys = np.random.default_rng(1).integers(0, 2**31, 20_000)
    for bit in range(31):
        changed = mix(keys ^ (1 << bit)) ^ mix(keys)
        share = [(changed >> other & 1).mean() for other in range(31)]
        assert min(share) > 0.48 and max(share) < 0.52


def test_consecutive_keys_have_independent_signs_and_even_slots() -> None:
    hashes = mix(np.arange(1 << 18))
    signs = (hashes >> 30) * 2 - 1
    for lag in range(1, 100):
        assert abs(float((signs[:-lag] * signs[lag:]).mean())) < 5 / 2**9
    counts = np.bincount(reduce(hashes, 1000), minlength=1000)
    expected = len(hashes) / 1000
    assert abs(((counts - expected) ** 2 / expected).sum() - 1000) < 5 * np.sqrt(2000)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 100), length=st.integers(1, 200), share=st.floats(0.01, 1.0))
def test_folding_uses_all_slots_equally_often(rows: int, length: int, share: float) -> None:
    geometry = ChunkLayout(rows, length)
    slots = max(1, round(geometry.chunks * share))
    sharing = Sharing(slots, *seeds(3))
    uses = np.bincount(hash_format.places(geometry, sharing, slots).ravel(), minlength=slots)
    assert uses.max() - uses.min() <= 1


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 60), length=st.integers(1, 100), extra=st.integers(0, 5))
def test_without_compression_the_weight_is_the_memory_bit_for_bit(
    rows: int, length: int, extra: int
) -> None:
    geometry = ChunkLayout(rows, length)
    weight = np.random.default_rng(0).standard_normal((rows, length), np.float32)
    memory = hash_format.to_chunks(weight, geometry).reshape(-1, geometry.chunk)
    memory = np.concatenate([memory, np.ones((extra, geometry.chunk), np.float32)])
    sharing = Sharing(len(memory), *seeds(1))
    one = np.ones(1, np.float32)
    assert np.array_equal(hash_format.expand(memory, one, geometry, sharing), weight)


def test_the_error_of_a_mean_is_that_of_its_dimensions(make_site: SiteMaker) -> None:
    weight = np.random.default_rng(5).standard_normal((256, 256), np.float32)
    site = make_site(256, 256)
    for compression in (2, 4, 16):
        payload = CODEC.encode(site, weight, HashParams(compression, memory="float32"))
        error = np.linalg.norm(CODEC.decode(site, payload) - weight) / np.linalg.norm(weight)
        assert error == pytest.approx(np.sqrt(1 - 1 / compression), rel=0.01)


def low_dimensional(rng: np.random.Generator, count: int) -> np.ndarray:
    """Inputs of 64 columns near a space of 10 dimensions."""
    space = rng.standard_normal((10, 64))
    return rng.standard_normal((count, 10)) @ space + 0.05 * rng.standard_normal((count, 64))


@pytest.mark.parametrize(
    "params",
    [HashParams(4, memory="float32"), HashParams(4, "matched", 8, "float32")],
    ids=lambda params: params.map,
)
def test_least_squares_beats_the_mean_on_inputs_of_few_dimensions(
    make_site: SiteMaker, params: HashParams
) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 64)).astype(np.float32)
    train, test = low_dimensional(rng, 500), None
    test = train[400:]
    gram = train[:400].T @ train[:400] / 400
    site = make_site(48, 64)
    stats = Stats(site, 400, gram, train[:400].mean(axis=0))
    errors = []
    for payload in (
        CODEC.encode(site, weight, params),
        CODEC.encode_calibrated(site, weight, params, stats),
    ):
        decoded = CODEC.decode(site, payload).astype(np.float64)
        errors.append(np.linalg.norm(test @ (decoded - weight).T) / np.linalg.norm(test @ weight.T))
    assert errors[1] < 0.35 * errors[0]


def test_least_squares_finds_the_minimum() -> None:
    rng = np.random.default_rng(2)
    geometry = ChunkLayout(16, 32)
    sharing = Sharing(1, *seeds(0))
    weight = rng.standard_normal((16, 32))
    x = rng.standard_normal((200, 32))
    gram = x.T @ x / 200
    start = hash_projection.mean(weight, geometry, sharing, 1)
    found = hash_projection.least_squares(weight, geometry, sharing, start, gram)
    one = np.ones(1, np.float32)
    columns = []
    for entry in range(256):
        unit = np.zeros((1, 256), np.float32)
        unit[0, entry] = 1
        columns.append((x @ hash_format.expand(unit, one, geometry, sharing).T).ravel())
    best, *_ = np.linalg.lstsq(np.stack(columns, axis=1), (x @ weight.T).ravel(), rcond=None)
    np.testing.assert_allclose(found.ravel(), best, atol=1e-3)


def test_matched_chunks_beat_folding_at_equal_compression(make_site: SiteMaker) -> None:
    site = make_site(64, 128)
    weight = np.random.default_rng(0).standard_normal((64, 128), np.float32)
    errors = {}
    for params in (HashParams(4), HashParams(4, "matched", 8), HashParams(4, "matched", 4)):
        decoded = CODEC.decode(site, CODEC.encode(site, weight, params))
        errors[params.chunk] = np.linalg.norm(decoded - weight)
    assert errors[4] < errors[8] < errors[256]


@pytest.mark.parametrize(
    "params",
    [
        HashParams(0),
        HashParams(2000),
        HashParams(map="other"),
        HashParams(chunk=16),
        HashParams(map="matched"),
        HashParams(memory="int4"),
        HashParams(seed=-1),
    ],
)
def test_settings_out_of_range_are_refused(params: HashParams) -> None:
    with pytest.raises(UsageError):
        CODEC.check(params)


@pytest.mark.parametrize("values", [[0, 0, 0, 0, 0, 1], [0, 1, 0, 2**31, 0, 1], [0, 1, 0, 0, 0, 7]])
def test_a_map_out_of_range_is_an_error(values: list[int]) -> None:
    with pytest.raises(ValueError):
        Sharing.of(np.array(values, np.int64))
