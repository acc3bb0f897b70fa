"""The error the hyper codec promises; benchmarks/bench_hyper_quality.py measures it in full."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams, native
from onnxcomp.passes.codecs.hyper.tables import NORMAL_SQNR, WINDINGS
from onnxcomp.passes.weight import Array, Use, WeightSite

# Rows of 1024 weights; the numpy encoder is a hundred times slower.
ROWS = 128 if native.available() else 16
SITE = WeightSite(
    "w", (ROWS, 1024), "float32", (Use("n", "MatMul", 1, "matmul"),), "", ROWS, 1024, False
)

# Signal to noise ratios of 128 states that the project set out with, dB.
TARGET = {2: 11.15, 3: 16.84, 4: 22.45}


def draw(name: str) -> Array:
    rng = np.random.default_rng(11)
    draws = {
        "normal": lambda: rng.standard_normal(SITE.shape),
        "laplace": lambda: rng.laplace(size=SITE.shape),
        "student4": lambda: rng.standard_t(4, size=SITE.shape),
    }
    return draws[name]().astype(np.float32)


def decibels(weight: Array, params: HyperParams) -> float:
    codec = CODECS["hyper"]
    error = codec.decode(SITE, codec.encode(SITE, weight, params, threads=2)) - weight
    return float(10 * np.log10(np.square(weight).sum() / np.square(error).sum()))


@pytest.mark.parametrize("bits", TARGET)
def test_every_distribution_is_coded_like_the_normal_one(bits: int) -> None:
    found = {
        name: decibels(draw(name), HyperParams(bits)) for name in ("normal", "laplace", "student4")
    }
    assert found["normal"] > TARGET[bits]
    assert max(found.values()) - min(found.values()) < 0.15, found


@pytest.mark.parametrize(("bits", "state_bits"), [p for p in sorted(WINDINGS) if p[1] <= 8])
def test_normal_data_is_coded_as_predicted(bits: int, state_bits: int) -> None:
    found = decibels(draw("normal"), HyperParams(bits, state_bits))
    assert found == pytest.approx(NORMAL_SQNR[bits, state_bits], abs=0.1)


@pytest.mark.parametrize("bits", range(1, 7))
def test_more_states_are_better(bits: int) -> None:
    known = [NORMAL_SQNR[pair] for pair in sorted(WINDINGS) if pair[0] == bits]
    assert known == sorted(known)
    bound = 20 * bits * np.log10(2)
    assert all(bound - 2.1 < value < bound for value in known)
