"""The payload cache: hits, misses, and files that are not whole."""

import os
import platform
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.encoding.by_values import encode_matrix
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, Use, WeightSite

SITE = WeightSite("w", (32, 256), "float32", (Use("n", "Gather", 0, "gather"),), "", 32, 256, False)
HYPER = CODECS["hyper"]
PARAMS = HyperParams(3)


@pytest.fixture(scope="module")
def weight() -> Array:
    return np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)


@pytest.fixture(scope="module")
def payload(weight: Array) -> Payload:
    return HYPER.encode(SITE, weight, PARAMS)


def equal(one: Payload | None, other: Payload) -> bool:
    return (
        one is not None
        and one.tensors.keys() == other.tensors.keys()
        and all(np.array_equal(one.tensors[key], other.tensors[key]) for key in other.tensors)
        and one.shared.keys() == other.shared.keys()
        and {k: tuple(np.ravel(v)) for k, v in one.attributes.items()}
        == {k: tuple(np.ravel(v)) for k, v in other.attributes.items()}
    )


def test_a_stored_payload_comes_back(tmp_path: Path, weight: Array, payload: Payload) -> None:
    cache = PayloadCache(tmp_path / "new" / "folder")
    key = cache.key(SITE, weight, HYPER, PARAMS)
    assert cache.get(key, SITE, HYPER, PARAMS) is None
    cache.put(key, payload)
    found = cache.get(key, SITE, HYPER, PARAMS)
    assert equal(found, payload)
    assert found is not None
    assert np.array_equal(HYPER.decode(SITE, found), HYPER.decode(SITE, payload))
    assert [path.name for path in cache.folder.iterdir()] == [cache.path(key).name]


def test_begun_files_go_with_their_process_on_its_machine_only(tmp_path: Path) -> None:
    own, other = platform.node(), f"not.{platform.node()}"
    names = [f"a.{os.getpid()}.1.{own}.part", f"b.{1 << 30}.1.{other}.part"]
    for name in (*names, f"c.{1 << 30}.1.{own}.part", f"d.{1 << 30}.1.part", "e.x.part"):
        (tmp_path / name).touch()
    PayloadCache(tmp_path, make=False)
    assert len(list(tmp_path.iterdir())) == 5
    PayloadCache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_key_follows_from_content_and_settings_alone(tmp_path: Path, weight: Array) -> None:
    cache = PayloadCache(tmp_path)
    key = cache.key(SITE, weight, HYPER, PARAMS)
    changed = weight.copy()
    changed[3, 7] += 1e-3
    assert cache.key(SITE, changed, HYPER, PARAMS) != key
    assert cache.key(SITE, weight, HYPER, HyperParams(4)) != key
    assert cache.key(SITE, weight, CODECS["dense"], PARAMS) != key
    assert cache.key(SITE, np.asfortranarray(weight), HYPER, PARAMS) == key


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_counts_as_missing_and_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, weight: Array, payload: Payload, data: st.DataObject
) -> None:
    cache = PayloadCache(tmp_path_factory.mktemp("cache"))
    key = cache.key(SITE, weight, HYPER, PARAMS)
    cache.put(key, payload)
    whole = bytearray(cache.path(key).read_bytes())
    if data.draw(st.booleans(), "cut short"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1), "length")]
    else:
        place = data.draw(st.integers(0, len(whole) - 1), "place")
        whole[place] ^= data.draw(st.integers(1, 255), "bits")
        damaged = whole
    cache.path(key).write_bytes(damaged)
    assert cache.get(key, SITE, HYPER, PARAMS) is None
    cache.put(key, payload)
    assert equal(cache.get(key, SITE, HYPER, PARAMS), payload)


def test_a_payload_of_another_layout_counts_as_missing(tmp_path: Path, payload: Payload) -> None:
    cache = PayloadCache(tmp_path)
    cache.put("key", payload)
    assert cache.get("key", SITE, HYPER, HyperParams(4)) is None
    assert cache.get("key", SITE, CODECS["dense"], PARAMS) is None


def test_what_is_kept_is_neither_encoded_nor_decoded_again(
    tmp_path: Path, weight: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = (SITE.name, SITE.shape, SITE.dtype, ("Gather",), SITE.nbytes)
    choice = Choice(*facts, codec="hyper", params=PARAMS)
    first = encode_matrix(lambda: weight, SITE, choice, PayloadCache(tmp_path), 1)
    for name in ("encode", "decode"):
        monkeypatch.setattr(type(HYPER), name, None)
    second = encode_matrix(lambda: weight, SITE, choice, PayloadCache(tmp_path), 1)
    assert first.payload is not None
    assert equal(second.payload, first.payload)
    assert second.error == first.error > 0
