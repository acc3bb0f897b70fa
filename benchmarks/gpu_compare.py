"""Every CUDA kernel against the numpy definition, on fresh random weights and odd shapes."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from gpu_calls import Calls
from gpu_memory import Memory
from gpu_weights import HashCase, HyperCase, hash_case, hyper_case

__all__ = ["BATCHES", "DTYPES", "TOLERANCE", "Comparison", "compare", "multiply", "product_error"]

Array = np.ndarray[Any, Any]
Case = HyperCase | HashCase

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
# Errors of products in units of |x| |w|: activations in two parts leave 2^-23 of each group's
# largest value and tensor cores cut off as much in every sum; in one part they leave 2^-12; then y
# is rounded to its type.
TOLERANCE = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# Few columns, sixteen, sixty-four and more, in one part or two: every form of the product.
BATCHES = (1, 4, 5, 9, 33, 70, 300)
_SHAPES = ((1, 1), (35, 137), (300, 129), (40, 1500))
_HASHED: tuple[dict[str, Any], ...] = (
    {"slots": 5},
    {"slots": 7, "base": 1000},
    {"slots": 9, "run": 1},
    {"slots": 11, "chunk": 64},
    {"slots": 300, "chunk": 8, "stride": 41},
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One kernel on one weight.

    Attributes:
        kernel: "hyper matmul".
        setting: Bits, states, group; or memory and chunk.
        error: Largest error, for products relative to its tolerance; inf where bits differ that
            must not.
    """

    kernel: str
    setting: str
    error: float


def _weight(calls: Calls, memory: Memory, case: Case) -> Any:
    """The weight as kernels take it, with its levels where it has some."""
    weight = case.weight(memory.place)
    if isinstance(case, HyperCase) and case.geometry.state_bits > 8:
        levels = calls.levels(case.table)
        weight.levels = None if levels is None else ctypes.pointer(levels)
    return weight


def multiply(calls: Calls, memory: Memory, case: Case, x: Array, dtype: str) -> Array:
    """Y of a kernel as float64."""
    weight = _weight(calls, memory, case)
    size = calls.scratch(weight, len(x), dtype)
    scratch, intact = memory.output((size,), np.uint8)
    y, read = memory.output((len(x), case.geometry.rows), DTYPES[dtype])
    calls.matmul(weight, memory.place(x), y, len(x), dtype, (scratch, size))
    result = read().astype(np.float64)
    intact()
    return result


def product_error(calls: Calls, memory: Memory, case: Case, batch: int, dtype: str) -> float:
    """Largest error of a product with random activations, relative to the tolerance."""
    dense = case.dense().astype(np.float64)
    x = np.random.default_rng(batch).normal(size=(batch, dense.shape[1])).astype(DTYPES[dtype])
    x[0] *= DTYPES[dtype](64.0)
    exact = x.astype(np.float64)
    unit = np.linalg.norm(exact, axis=1)[:, None] * np.linalg.norm(dense, axis=1)
    error = np.abs(multiply(calls, memory, case, x, dtype) - exact @ dense.T)
    worst = float((error / (TOLERANCE[dtype] * unit + 1e-300)).max())
    return float("inf") if np.isnan(worst) else worst


def _decode_error(calls: Calls, memory: Memory, case: Case, dtype: str) -> float:
    want = case.dense().astype(DTYPES[dtype])
    w, read = memory.output(want.shape, DTYPES[dtype])
    calls.decode(_weight(calls, memory, case), w, dtype)
    return 0.0 if np.array_equal(read(), want) else float("inf")


def _gather_error(calls: Calls, memory: Memory, case: Case, kind: Any) -> float:
    rows = case.geometry.rows
    indices = np.array([0, rows - 1, -1, -rows, rows // 2], kind)
    y, read = memory.output((5, case.geometry.length), np.float32)
    place = memory.place(indices)
    calls.gather(_weight(calls, memory, case), place, indices.itemsize, 5, y)
    return 0.0 if np.array_equal(read(), case.dense()[indices]) else float("inf")


def _all_of(
    calls: Calls, memory: Callable[[], Memory], family: str, setting: str, case: Case, turn: int
) -> Iterator[Comparison]:
    dtypes = tuple(DTYPES)
    for i, batch in enumerate(BATCHES):
        dtype = dtypes[(i + turn) % 3]
        error = product_error(calls, memory(), case, batch, dtype)
        yield Comparison(f"{family} matmul", f"{setting}, {dtype}, {batch} rows", error)
    dtype = dtypes[turn % 3]
    error = _decode_error(calls, memory(), case, dtype)
    yield Comparison(f"{family} decode", f"{setting}, {dtype}", error)
    error = _gather_error(calls, memory(), case, (np.int32, np.int64)[turn % 2])
    yield Comparison(f"{family} gather", setting, error)


def compare(
    calls: Calls, memory: Callable[[], Memory], *, quick: bool, seed: int
) -> Iterator[Comparison]:
    """Compare every kernel; `quick` takes few settings, for slow checkers."""
    turn = 0
    for bits in range(1, 7):
        for states in (6, 7, 8, 10, 12):
            if states < bits + 2 or (quick and states not in (7, 8, 12)):
                continue
            for group in (64, 128) if quick else (32, 64, 128, 256):
                turn += 1
                rows, length = _SHAPES[1] if quick else _SHAPES[turn % len(_SHAPES)]
                leveled = states > 8 and turn % 2 == 0
                case = hyper_case(
                    rows, length, bits=bits, states=states, group=group, leveled=leveled, seed=seed
                )
                setting = f"k={bits} L={states} g={group}{' leveled' * leveled} {rows}x{length}"
                yield from _all_of(calls, memory, "hyper", setting, case, turn)
    for options in _HASHED[::2] if quick else _HASHED:
        for kind in ("float32", "float16", "int8"):
            turn += 1
            rows, length = _SHAPES[1] if quick else _SHAPES[turn % len(_SHAPES)]
            shared = hash_case(rows, length, memory=kind, seed=seed, **options)
            setting = f"{kind} chunk={options.get('chunk', 256)} {rows}x{length}"
            yield from _all_of(calls, memory, "hash", setting, shared, turn)
