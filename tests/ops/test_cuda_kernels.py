"""The CUDA kernels, emulated: every kernel runs on the CPU and is compared with numpy.

The same sources that nvcc compiles are compiled by the C++ compiler (ops/gpu/simt.h); on a GPU,
benchmarks/gpu_check.sh makes the same comparisons.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

Array = np.ndarray[Any, Any]

# One to eight columns, sixteen, sixty-four and more, by one part or two: every form of the product.
BATCHES = (1, 4, 5, 9, 33, 70)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SETTINGS = [
    (bits, states, group, leveled)
    for bits in range(1, 7)
    for states in (6, 7, 8, 10, 12)
    for group in (32, 64, 128, 256)
    for leveled in (False, True)
    if states >= bits + 2
    and (not leveled or states > 8)
    and (group in (32, 256) or states in (7, 12) or bits == 4)
]
MAPS: dict[str, dict[str, Any]] = {
    "fold": {"slots": 5},
    "fold from a later tile": {"slots": 7, "base": 1000},
    "roast": {"slots": 9, "run": 1},
    "unsigned": {"slots": 4, "signed": False},
    "large": {"slots": 3, "base": (1 << 31) - 40},
    "chunks of 64": {"slots": 11, "chunk": 64},
    "chosen chunks of 8": {"slots": 300, "chunk": 8, "stride": 41},
    "chosen chunks of 4": {"slots": 500, "chunk": 4, "stride": 7, "run": 1},
}


@pytest.fixture(scope="module")
def calls(emulated: Path, benchmarks: Any) -> Any:
    """The kernels, compiled for this CPU."""
    return benchmarks.Calls(emulated)


def multiply(benchmarks: Any, calls: Any, case: Any, x: Array) -> Array:
    result: Array = benchmarks.multiply(calls, benchmarks.HostMemory(), case, x, "float32")
    return result


def check_product(benchmarks: Any, calls: Any, case: Any, batch: int, dtype: str) -> None:
    memory = benchmarks.HostMemory()
    assert benchmarks.product_error(calls, memory, case, batch, dtype) <= 1.0


@pytest.mark.parametrize(("bits", "states", "group", "leveled"), SETTINGS)
def test_hyper_kernels_agree_with_the_definition(
    calls: Any, benchmarks: Any, bits: int, states: int, group: int, leveled: bool
) -> None:
    case = benchmarks.hyper_case(
        35, group + 9, bits=bits, states=states, group=group, leveled=leveled
    )
    memory = benchmarks.HostMemory()
    weight, want = case.weight(memory.place), case.dense()
    w, read = memory.output(want.shape, np.float32)
    calls.decode(weight, w, "float32")
    np.testing.assert_array_equal(read(), want)
    indices = np.array([[0, 34, -1], [-35, 7, 16]], np.int64)
    y, read = memory.output((6, case.geometry.length), np.float32)
    calls.gather(weight, memory.place(indices), 8, 6, y)
    np.testing.assert_array_equal(read(), want[indices.ravel()])
    batch = BATCHES[(bits + states + group) % len(BATCHES)]
    check_product(benchmarks, calls, case, batch, ("float32", "float16")[states % 4 // 2])


@pytest.mark.parametrize("shared", [65536, 101376, 166912])
def test_every_generation_has_the_shared_memory_that_kernels_take(
    calls: Any, benchmarks: Any, monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    monkeypatch.setenv("ONNXCOMP_EMULATED_SHARED", str(shared))
    for bits in range(1, 7):
        for states in (6, 7, 8, 10, 12):
            if states < bits + 2:
                continue
            case = benchmarks.hyper_case(20, 137, bits=bits, states=states, leveled=states == 12)
            for batch in (3, 9, 20, 70):
                check_product(benchmarks, calls, case, batch, "float16")
    for batch in (3, 9, 20, 70):
        check_product(benchmarks, calls, benchmarks.hash_case(20, 137), batch, "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (16, 128), (300, 129), (40, 1500)])
def test_hyper_products_of_any_shape(
    calls: Any, benchmarks: Any, rows: int, length: int, batch: int, dtype: str
) -> None:
    group = 32 if (rows, length) == (300, 129) else 128
    check_product(benchmarks, calls, benchmarks.hyper_case(rows, length, group=group), batch, dtype)


@pytest.mark.parametrize("memory", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", MAPS)
def test_hash_kernels_agree_with_the_definition(
    calls: Any, benchmarks: Any, name: str, memory: str
) -> None:
    case = benchmarks.hash_case(35, 300, memory=memory, **MAPS[name])
    store = benchmarks.HostMemory()
    weight, want = case.weight(store.place), case.dense()
    w, read = store.output(want.shape, np.float32)
    calls.decode(weight, w, "float32")
    np.testing.assert_array_equal(read(), want)
    indices = np.array([0, 34, -1, -35, 16], np.int32)
    y, read = store.output((5, 300), np.float32)
    calls.gather(weight, store.place(indices), 4, 5, y)
    np.testing.assert_array_equal(read(), want[indices])
    for batch in BATCHES:
        check_product(benchmarks, calls, case, batch, "float32" if batch % 2 else "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (16, 16), (300, 129), (40, 1500)])
def test_hash_products_of_any_shape(
    calls: Any, benchmarks: Any, rows: int, length: int, dtype: str
) -> None:
    for batch in (1, 12, 66):
        check_product(benchmarks, calls, benchmarks.hash_case(rows, length), batch, dtype)


@pytest.mark.parametrize("memory", ["float16", "int8"])
@pytest.mark.parametrize("copies", ["late", "eager"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (16, 16), (300, 129), (40, 3000), (35, 8192)])
def test_hash_products_of_one_row(
    calls: Any,
    benchmarks: Any,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    length: int,
    copies: str,
    memory: str,
) -> None:
    monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", copies)
    for dtype in ("float16", "bfloat16"):
        for options in list(MAPS.values())[:5]:
            case = benchmarks.hash_case(rows, length, memory=memory, **options)
            assert calls.scratch(case.weight(benchmarks.HostMemory().place), 1, dtype) == 0
            check_product(benchmarks, calls, case, 1, dtype)


def test_a_hash_product_of_one_row_that_is_not_finite_is_nan(calls: Any, benchmarks: Any) -> None:
    for memory in ("float16", "int8"):
        case = benchmarks.hash_case(33, 200, memory=memory)
        for dtype, value in (("float16", np.inf), ("bfloat16", np.nan), ("bfloat16", -np.inf)):
            x = np.ones((1, 200), DTYPES[dtype])
            x[0, 137] = value
            y = benchmarks.multiply(calls, benchmarks.HostMemory(), case, x, dtype)
            assert not np.isfinite(y).any()


@pytest.mark.parametrize("family", ["hyper", "hash"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoding_rounds_once(calls: Any, benchmarks: Any, family: str, dtype: str) -> None:
    for length in (256, 131):
        case = (benchmarks.hyper_case if family == "hyper" else benchmarks.hash_case)(20, length)
        memory = benchmarks.HostMemory()
        w, read = memory.output((20, length), DTYPES[dtype])
        calls.decode(case.weight(memory.place), w, dtype)
        np.testing.assert_array_equal(read(), case.dense().astype(DTYPES[dtype]))


@pytest.mark.parametrize("family", ["hyper", "hash"])
def test_an_index_outside_gives_a_row_of_nan(calls: Any, benchmarks: Any, family: str) -> None:
    case = (benchmarks.hyper_case if family == "hyper" else benchmarks.hash_case)(20, 131)
    memory = benchmarks.HostMemory()
    indices = np.array([20, 3, -21, 1 << 40], np.int64)
    y, read = memory.output((4, 131), np.float32)
    calls.gather(case.weight(memory.place), memory.place(indices), 8, 4, y)
    got = read()
    assert np.isnan(got[[0, 2, 3]]).all()
    np.testing.assert_array_equal(got[1], case.dense()[3])


@pytest.mark.parametrize("family", ["hyper", "hash"])
@pytest.mark.parametrize("batch", [2, 40])
def test_only_rows_with_an_infinity_or_nan_become_nan(
    calls: Any, benchmarks: Any, family: str, batch: int
) -> None:
    case = (benchmarks.hyper_case if family == "hyper" else benchmarks.hash_case)(33, 200)
    x = np.random.default_rng(0).normal(size=(batch, 200)).astype(np.float32)
    x[0, 5], x[1, 199] = np.inf, np.nan
    y = multiply(benchmarks, calls, case, x)
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2:]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_activations_of_any_size_keep_their_precision(
    calls: Any, benchmarks: Any, scale: float
) -> None:
    case = benchmarks.hyper_case(33, 200)
    dense = case.dense().astype(np.float64)
    x = (np.random.default_rng(0).normal(size=(3, 200)) * scale).astype(np.float32)
    exact = x.astype(np.float64) @ dense.T
    unit = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(dense, axis=1)
    assert (np.abs(multiply(benchmarks, calls, case, x) - exact) <= 2.0**-21 * unit).all()


def test_the_same_product_gives_the_same_bits(calls: Any, benchmarks: Any) -> None:
    case = benchmarks.hyper_case(40, 3000)
    for batch in (3, 20):
        x = np.random.default_rng(1).normal(size=(batch, 3000)).astype(np.float32)
        np.testing.assert_array_equal(
            multiply(benchmarks, calls, case, x), multiply(benchmarks, calls, case, x)
        )


def test_levels_are_found_where_a_table_has_them(calls: Any, benchmarks: Any) -> None:
    assert calls.levels(benchmarks.hyper_case(1, 1, states=12, leveled=True).table) is not None
    assert calls.levels(benchmarks.hyper_case(1, 1, states=12).table) is None
    assert calls.levels(benchmarks.hyper_case(1, 1, states=8).table) is None


def test_an_empty_batch_needs_nothing(calls: Any, benchmarks: Any) -> None:
    memory = benchmarks.HostMemory()
    weight = benchmarks.hyper_case(20, 100).weight(memory.place)
    assert calls.scratch(weight, 0, "float16") == 0
    calls.matmul(weight, 0, 0, 0, "float16", (0, 0))


def test_wrong_shapes_are_refused_with_the_values(calls: Any, benchmarks: Any) -> None:
    memory = benchmarks.HostMemory()
    weight = benchmarks.hyper_case(20, 100).weight(memory.place)
    with pytest.raises(RuntimeError, match="scratch has 1 bytes, must have"):
        calls.matmul(weight, 0, 0, 40, "float16", (0, 1))
    weight.group = 48
    with pytest.raises(RuntimeError, match="group must be 32, 64, 128 or 256"):
        calls.decode(weight, 0, "float32")
    shared = benchmarks.hash_case(20, 100).weight(memory.place)
    shared.map = (ctypes.c_int64 * 6)(0, 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"map\[1\] is 0"):
        calls.decode(shared, 0, "float32")
