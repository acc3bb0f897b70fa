"""Laws that hold for every codec in `CODECS`; a new codec is tested here without a new line."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.weight import Array, WeightSite

SiteMaker = Callable[..., WeightSite]

CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)

EXTENTS = st.tuples(st.integers(1, 70), st.integers(1, 300))
NEEDS = st.sampled_from(["matmul", "gather", "dense"])
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])


def weight_of(rows: int, length: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, length), np.float32)


def relative_error(weight: Array, decoded: Array) -> float:
    return float(np.linalg.norm(decoded - weight) / np.linalg.norm(weight))


def bytes_of(payload: Payload) -> dict[str, bytes]:
    return {key: tensor.tobytes() for key, tensor in payload.tensors.items()}


@CODEC
@settings(max_examples=25, deadline=None)
@given(extent=EXTENTS, need=NEEDS, dtype=DTYPES, pick=st.integers(0, 99))
def test_what_encode_stores_is_known_before(
    codec: Codec, make_site: SiteMaker, extent: tuple[int, int], need: str, dtype: str, pick: int
) -> None:
    site = make_site(*extent, need=need, dtype=dtype)
    candidates = codec.candidates(site)
    if codec.refuse(site) is not None:
        assert not candidates
        return
    params = candidates[pick % len(candidates)]
    codec.check(params)
    payload = codec.encode(site, weight_of(*extent), params)
    layout = codec.layout(site, params)
    assert {k: (t.shape, t.dtype) for k, t in payload.tensors.items()} == {
        k: (t.shape, t.dtype) for k, t in layout.items()
    }
    assert payload.nbytes == codec.size(site, params) == sum(t.nbytes for t in layout.values())
    assert dict(payload.attributes) == dict(codec.attributes(site, params))
    shared = codec.shared(site, params)
    assert shared.keys() == payload.shared.keys()
    if codec.bases is not None:  # what is found for several weights has a known form only
        assert all(shared[key].shape == payload.shared[key].shape for key in shared)
        assert all(shared[key].dtype == payload.shared[key].dtype for key in shared)
        return
    assert all(np.array_equal(shared[key], payload.shared[key]) for key in shared)
    decoded = codec.decode(site, payload)
    assert decoded.shape == extent
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@CODEC
def test_candidates_go_from_most_to_fewest_bytes(codec: Codec, make_site: SiteMaker) -> None:
    for extent in ((64, 256), (96, 9), (10, 144)):
        site = make_site(*extent, need="dense")
        sizes = [codec.size(site, params) for params in codec.candidates(site)]
        assert sizes == sorted(sizes, reverse=True)
        assert all(size <= site.nbytes for size in sizes)


@CODEC
def test_threads_and_strides_do_not_change_the_bytes(codec: Codec, make_site: SiteMaker) -> None:
    weight = weight_of(130, 300)
    site = make_site(130, 300)
    for params in codec.candidates(site):
        expected = bytes_of(codec.encode(site, weight, params))
        assert bytes_of(codec.encode(site, weight, params, threads=2)) == expected
        assert bytes_of(codec.encode(site, np.asfortranarray(weight), params)) == expected
        assert bytes_of(codec.encode(site, weight[::-1], params)) != expected


@CODEC
def test_predicted_error_is_met(codec: Codec, make_site: SiteMaker) -> None:
    site = make_site(64, 512)
    weight = weight_of(64, 512)
    for params in codec.candidates(site):
        error = relative_error(weight, codec.decode(site, codec.encode(site, weight, params)))
        expected = codec.predict(site, params)
        assert error == pytest.approx(expected, rel=0.03, abs=1e-7), params


@CODEC
def test_more_bits_never_hurt(codec: Codec, make_site: SiteMaker) -> None:
    site = make_site(32, 256)
    weight = np.random.default_rng(3).standard_t(4, (32, 256)).astype(np.float32)
    best: dict[int, float] = {}
    for params in codec.candidates(site):
        error = relative_error(weight, codec.decode(site, codec.encode(site, weight, params)))
        bits = params.to_json().get("bits", 0)
        best[bits] = max(best.get(bits, 0.0), error)
    assert [best[bits] for bits in sorted(best)] == sorted(best.values(), reverse=True)


# The published winding has one centre, the mean of the tensor, and shared entries are means over
# their uses: neither has exact zeros.
@pytest.mark.parametrize(
    "codec", [codec for name, codec in CODECS.items() if name not in ("winding", "hash")]
)
def test_zeros_are_exact(codec: Codec, make_site: SiteMaker) -> None:
    weight = weight_of(20, 256)
    weight[3] = 0
    weight[7, 128:] = 0
    site = make_site(20, 256)
    for params in codec.candidates(site):
        decoded = codec.decode(site, codec.encode(site, weight, params))
        assert not decoded[3].any()
        assert (
            np.array_equal(decoded, np.where(weight == 0, 0, decoded))
            or params.to_json().get("group", 256) > 128
        )
        nothing = codec.encode(site, np.zeros_like(weight), params)
        assert not codec.decode(site, nothing).any()
        assert not any(tensor.any() for tensor in nothing.tensors.values())


@CODEC
def test_unknown_dtypes_and_foreign_settings_are_refused(
    codec: Codec, make_site: SiteMaker
) -> None:
    reason = codec.refuse(make_site(64, 64, dtype="int8"))
    assert reason is not None and "int8" in reason
    with pytest.raises(UsageError):
        codec.check(Params())


@CODEC
def test_kinds_cover_the_uses(codec: Codec, make_site: SiteMaker) -> None:
    for need in ("matmul", "gather", "dense"):
        kinds = codec.kinds(make_site(16, 128, need=need))
        assert {"weight", "decode"} <= kinds
        assert kinds <= {"weight", "decode", need}
