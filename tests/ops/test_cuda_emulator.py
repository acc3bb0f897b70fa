"""The emulated GPU finds what a GPU would: kernels without one of their waits give wrong results.

A planted fault leaves out one kind of call, in all places or in one of them
(ops/gpu/emulator.h). Every barrier and every wait of a kernel is there for a reason, so each has to
be missed either when copies come as late as a GPU may deliver them, or as early.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# kernel -> the weight, rows and type of x, GPU, and the faults that it could have. A fault with a
# number is one of one call of each thread.
PRODUCTS: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "few columns": (
        {"rows": 40, "length": 1500, "bits": 4}, 3, "float32", "80", "barrier:0 barrier:1",
    ),
    "many columns": (
        {"rows": 150, "length": 1500, "bits": 4}, 70, "float32", "80",
        "wait wait:1 barrier barrier:0 barrier:2 barrier:3",
    ),
    "FewRows, bytes": (
        {"rows": 100, "length": 3000, "bits": 4}, 1, "float16", "90",
        "wait wait:0 wait:1 warp warp:0 warp:2 barrier:0 barrier:1 barrier:2",
    ),
    "FewRows, float16": (
        {"rows": 100, "length": 3000, "bits": 3}, 2, "float16", "90",
        "wait wait:0 wait:1 warp warp:0 warp:2 barrier:0 barrier:1",
    ),
    "SomeRows, two sums": (
        {"rows": 300, "length": 1700, "bits": 4}, 16, "float16", "90",
        "wait warp barrier barrier:0 barrier:1 phase phase:0 phase:3 tensor tensor:5 fence fence:0",
    ),
    "SomeRows": (
        {"rows": 40, "length": 1700, "bits": 2}, 64, "float16", "90",
        "wait warp barrier:0 barrier:1 phase phase:1 tensor tensor:7 fence",
    ),
    "ManyRows": (
        {"rows": 130, "length": 1200, "bits": 4}, 100, "float16", "90",
        "wait warp barrier barrier:0 barrier:1 phase phase:0 phase:2 tensor tensor:6 fence",
    ),
    "ManyRows, one split": (
        {"rows": 520, "length": 640, "bits": 2}, 260, "bfloat16", "90",
        "wait phase phase:5 tensor fence",
    ),
    "OneRowBytes": (
        {"rows": 100, "length": 3000, "memory": "int8"}, 1, "float16", "80",
        "barrier barrier:0 barrier:1 barrier:2",
    ),
    "OneRowHalves": (
        {"rows": 100, "length": 3000, "memory": "float16"}, 1, "float16", "80",
        "barrier barrier:0 barrier:1",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def error(emulated: Path, benchmarks: Any) -> Callable[..., float]:
    """The error of a product, in units of its tolerance; infinite for what the emulator refuses."""
    calls = benchmarks.Calls(emulated)

    def error_(rows: int, length: int, batch: int, dtype: str, **kind: Any) -> float:
        make = benchmarks.hash_case if "memory" in kind else benchmarks.hyper_case
        case = make(rows, length, **kind)
        try:
            found: float = benchmarks.product_error(
                calls, benchmarks.HostMemory(), case, batch, dtype
            )
        except RuntimeError as failure:
            assert "emulated GPU" in str(failure)
            return float("inf")
        return found

    return error_


FAULTS = [(name, fault) for name, (*_, faults) in PRODUCTS.items() for fault in faults.split()]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_kernel_without_a_wait_is_found(
    error: Callable[..., float], monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    weight, batch, dtype, capability, _ = PRODUCTS[name]
    monkeypatch.setenv("ONNXCOMP_EMULATED_CAPABILITY", capability)
    monkeypatch.setenv("ONNXCOMP_EMULATED_FAULT", fault)
    worst = 0.0
    for copies in ("late", "eager"):
        monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", copies)
        worst = max(worst, error(batch=batch, dtype=dtype, **weight))
    assert worst > 1.0


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("copies", ["late", "eager"])
def test_kernels_are_right_without_a_fault(
    error: Callable[..., float], monkeypatch: pytest.MonkeyPatch, name: str, copies: str
) -> None:
    weight, batch, dtype, capability, _ = PRODUCTS[name]
    monkeypatch.setenv("ONNXCOMP_EMULATED_CAPABILITY", capability)
    monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", copies)
    assert error(batch=batch, dtype=dtype, **weight) <= 1.0
