"""Codes with a low-rank repair: the repair pays where inputs have directions that count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.lowrank.hyper_lowrank import HyperLowRankCodec, HyperLowRankParams
from onnxcomp.passes.codecs.moments import output_error
from onnxcomp.passes.weight import Stats, WeightSite

SiteMaker = Callable[..., WeightSite]
CODEC = HyperLowRankCodec()


def test_the_repair_lowers_the_error_of_products(make_site: SiteMaker) -> None:
    site, rng = make_site(256, 256), np.random.default_rng(0)
    weight = rng.standard_normal((256, 256)).astype(np.float32)
    x = rng.standard_normal((6000, 256)) * np.geomspace(10.0, 0.05, 256)
    x = x @ np.linalg.qr(rng.standard_normal((256, 256)))[0]
    stats = Stats(site, len(x), x.T @ x / len(x), x.mean(axis=0))
    hyper = HyperCodec()
    base = hyper.decode(site, hyper.encode(site, weight, HyperParams(2)))
    mended = CODEC.decode(
        site, CODEC.encode_calibrated(site, weight, HyperLowRankParams(2, 32), stats)
    )
    errors = [output_error(weight, decoded, stats.gram) for decoded in (base, mended)]
    assert errors[1] < 0.5 * errors[0]


def test_the_repair_is_that_of_the_base_codes(make_site: SiteMaker) -> None:
    site = make_site(128, 160)
    weight = np.random.default_rng(0).standard_normal((128, 160)).astype(np.float32)
    hyper, params = HyperCodec(), HyperLowRankParams(2, 32, 6, 8)
    base = hyper.encode(site, weight, HyperParams(2, 8))
    payload = CODEC.encode(site, weight, params)
    np.testing.assert_array_equal(payload.tensors["base.codes"], base.tensors["codes"])
    error = weight - hyper.decode(site, base)
    values = np.linalg.svd(error, compute_uv=False)
    left = np.linalg.norm(weight - CODEC.decode(site, payload))
    assert left == pytest.approx(np.linalg.norm(values[32:]), rel=0.01)


def test_wrong_settings_are_refused(make_site: SiteMaker) -> None:
    for params, text in (
        (HyperLowRankParams(0, 32), "bits=0"),
        (HyperLowRankParams(2, 0), "rank=0"),
        (HyperLowRankParams(2, 32, 9), "bits=9"),
    ):
        with pytest.raises(UsageError, match=text):
            CODEC.check(params)
    reason = CODEC.refuse(make_site(32, 500))
    assert reason is not None and reason.startswith("32 x 500")
