"""CUDA kernels that look two weights up at once, emulated: every form against numpy.

Copies come as late as a GPU may deliver them, and as early. What a device gets depends on its
generation and its shared memory, so tests name the kernels that they expect to run.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

Array = np.ndarray[Any, Any]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMATS = ((1, 6), (1, 8), (2, 6), (2, 7), (2, 8), (3, 6), (3, 7), (4, 6), (4, 7))
SHAPES = ((35, 137), (300, 129), (40, 3000), (144, 1100), (1, 1))
# Shared memory of a block: Turing, Ada and consumers' Blackwell, Ampere, Hopper.
SHARED = {"75": 65536, "89": 101376, "80": 166912, "90": 232448}


@pytest.fixture(scope="module")
def calls(emulated: Path, benchmarks: Any) -> Any:
    """The kernels, compiled for this CPU."""
    return benchmarks.Calls(emulated)


@pytest.fixture(params=["late", "eager"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When asynchronous copies come."""
    monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", request.param)
    return str(request.param)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the emulated GPU one of a generation."""

    def device_(capability: str) -> None:
        monkeypatch.setenv("ONNXCOMP_EMULATED_CAPABILITY", capability)
        monkeypatch.setenv("ONNXCOMP_EMULATED_SHARED", str(SHARED[capability]))

    return device_


@pytest.fixture
def kernels(emulated: Path) -> Callable[[], set[str]]:
    """Names of the kernels that ran since the last call, such as "FewRows"."""
    function = ctypes.CDLL(str(emulated)).onnxcomp_emulated_kernels
    function.restype = ctypes.c_char_p

    def kernels_() -> set[str]:
        text: str = function().decode()
        return set(re.findall(r"K = (?:\w+::)*(\w+)", text))

    kernels_()
    return kernels_


def check(benchmarks: Any, calls: Any, case: Any, batch: int, dtype: str) -> None:
    memory = benchmarks.HostMemory()
    assert benchmarks.product_error(calls, memory, case, batch, dtype) <= 1.0


@pytest.mark.parametrize(("bits", "states"), FORMATS)
@pytest.mark.parametrize("capability", ["80", "89", "90"])
@pytest.mark.usefixtures("copies")
def test_products_of_few_rows(
    calls: Any, benchmarks: Any, device: Any, kernels: Any, capability: str, bits: int, states: int
) -> None:
    device(capability)
    for i, (rows, length) in enumerate(SHAPES):
        case = benchmarks.hyper_case(rows, length, bits=bits, states=states)
        batch = (1, 2, 4, 3, 1)[(i + bits + states) % 5]
        batch = min(batch, 2) if capability == "89" else batch
        check(benchmarks, calls, case, batch, ("float16", "bfloat16")[i % 2])
    assert kernels() == {"FewRows"}


@pytest.mark.parametrize(("bits", "states"), FORMATS)
@pytest.mark.parametrize("batch", [5, 16, 29, 64])
@pytest.mark.usefixtures("copies")
def test_products_of_some_rows_on_hopper(
    calls: Any, benchmarks: Any, device: Any, kernels: Any, batch: int, bits: int, states: int
) -> None:
    device("90")
    rows, length = SHAPES[(batch + bits) % 4]
    case = benchmarks.hyper_case(rows, length, bits=bits, states=states)
    check(benchmarks, calls, case, batch, ("float16", "bfloat16")[states % 2])
    assert kernels() == {"PrepareGroup", "SomeRows"}


@pytest.mark.parametrize(("bits", "states"), FORMATS)
@pytest.mark.parametrize("batch", [65, 200, 300])
@pytest.mark.usefixtures("copies")
def test_products_of_many_rows_on_hopper(
    calls: Any, benchmarks: Any, device: Any, kernels: Any, batch: int, bits: int, states: int
) -> None:
    device("90")
    rows, length = ((35, 137), (130, 640), (144, 1100))[(batch + bits + states) % 3]
    case = benchmarks.hyper_case(rows, length, bits=bits, states=states)
    check(benchmarks, calls, case, batch, ("float16", "bfloat16")[states % 2])
    assert kernels() == {"PrepareGroup", "ManyRows"}


@pytest.mark.usefixtures("copies")
def test_more_rows_than_are_prepared_at_once(
    calls: Any, benchmarks: Any, device: Any, kernels: Any
) -> None:
    device("90")
    check(benchmarks, calls, benchmarks.hyper_case(35, 137), 2048 + 3, "float16")
    assert kernels() == {"PrepareGroup", "ManyRows", "SomeRows"}


def test_groups_beyond_one_round_of_a_block_that_prepares(
    calls: Any, benchmarks: Any, device: Any
) -> None:
    device("90")
    check(benchmarks, calls, benchmarks.hyper_case(16, 128 * 70), 6, "float16")


def test_what_pairs_do_not_serve_runs_as_before(
    calls: Any, benchmarks: Any, device: Any, kernels: Any
) -> None:
    device("90")
    check(benchmarks, calls, benchmarks.hyper_case(35, 137), 1, "float32")
    for kind in ({"bits": 5}, {"states": 12}, {"group": 64}):
        check(benchmarks, calls, benchmarks.hyper_case(35, 137, **kind), 3, "float16")
    device("75")
    check(benchmarks, calls, benchmarks.hyper_case(35, 137), 3, "float16")
    assert kernels() == {"Prepare", "SmallProduct"}
    device("80")
    check(benchmarks, calls, benchmarks.hyper_case(35, 137), 20, "float16")
    assert kernels() == {"Prepare", "TiledProduct"}


def test_sums_of_many_tiles_take_more_blocks(
    calls: Any, benchmarks: Any, device: Any, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device("90")
    monkeypatch.setenv("ONNXCOMP_EMULATED_SHARED", str(180 * 1024))  # beside 173 KB of the rest
    check(benchmarks, calls, benchmarks.hyper_case(1000, 300, bits=4), 1, "float16")
    assert kernels() == {"FewRows"}


def test_codes_that_are_not_aligned_are_read_by_words(
    calls: Any, benchmarks: Any, device: Any, kernels: Any
) -> None:
    device("90")
    memory, case = benchmarks.HostMemory(), benchmarks.hyper_case(35, 137)
    weight = case.weight(memory.place)
    weight.codes = memory.place(np.concatenate([np.zeros(4, np.uint8), case.codes.ravel()])) + 4
    x = np.random.default_rng(0).normal(size=(3, 137)).astype(np.float16)
    size = calls.scratch(weight, 3, "float16")
    scratch, _ = memory.output((size,), np.uint8)
    y, read = memory.output((3, 35), np.float16)
    calls.matmul(weight, memory.place(x), y, 3, "float16", (scratch, size))
    want = x.astype(np.float64) @ case.dense().astype(np.float64).T
    assert np.abs(read() - want).max() < 2e-3 * np.abs(want).max()
    assert kernels() == {"Prepare", "SmallProduct"}


@pytest.mark.parametrize("scale", [6e-8, 1e-4, 400.0, 60000.0])
def test_scales_of_any_size_keep_their_precision(
    calls: Any, benchmarks: Any, device: Any, scale: float
) -> None:
    device("90")
    for batch in (1, 20, 100):
        case = benchmarks.hyper_case(35, 300)
        case.scales[...] = np.sign(case.scales.astype(np.float32)) * np.float32(scale)
        case.scales[..., ::2, :] = np.float16(scale)
        check(benchmarks, calls, case, batch, "bfloat16")


@pytest.mark.parametrize("batch", [2, 40, 100])
def test_only_rows_with_an_infinity_or_nan_become_nan(
    calls: Any, benchmarks: Any, device: Any, batch: int
) -> None:
    device("90")
    memory, case = benchmarks.HostMemory(), benchmarks.hyper_case(33, 200)
    for dtype in ("float16", "bfloat16"):
        x = np.random.default_rng(0).normal(size=(batch, 200)).astype(DTYPES[dtype])
        x[0, 5] = np.inf
        x[-1, 199] = np.nan
        y = benchmarks.multiply(calls, memory, case, x, dtype)
        assert np.isnan(y[[0, -1]]).all()
        assert np.isfinite(y[1:-1]).all()


@pytest.mark.parametrize("batch", [1, 12, 100])
def test_the_same_product_gives_the_same_bits(
    calls: Any, benchmarks: Any, device: Any, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    device("90")
    case = benchmarks.hyper_case(40, 3000)
    x = np.random.default_rng(1).normal(size=(batch, 3000)).astype(np.float16)
    results = []
    for when in ("late", "eager", "late"):
        monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", when)
        results.append(benchmarks.multiply(calls, benchmarks.HostMemory(), case, x, "float16"))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize(("bits", "states"), FORMATS)
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.usefixtures("copies")
def test_decoding_is_exact(
    calls: Any, benchmarks: Any, device: Any, kernels: Any, capability: str, bits: int, states: int
) -> None:
    device(capability)
    for i, (rows, length) in enumerate(SHAPES):
        dtype = tuple(DTYPES)[(i + bits + states) % 3]
        case = benchmarks.hyper_case(rows, length, bits=bits, states=states)
        memory = benchmarks.HostMemory()
        want = case.dense().astype(DTYPES[dtype])
        w, read = memory.output(want.shape, DTYPES[dtype])
        calls.decode(case.weight(memory.place), w, dtype)
        np.testing.assert_array_equal(read(), want)
    assert kernels() == {"DecodePairs"}


def test_wrong_scratch_is_refused_with_the_values(calls: Any, benchmarks: Any, device: Any) -> None:
    device("90")
    memory = benchmarks.HostMemory()
    weight = benchmarks.hyper_case(20, 100).weight(memory.place)
    assert calls.scratch(weight, 1, "float16") == 0
    with pytest.raises(RuntimeError, match="scratch has 1 bytes, must have"):
        calls.matmul(weight, 0, 0, 8, "float16", (0, 1))
