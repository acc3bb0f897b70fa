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

# kernel -> (rows, length, bits, batch, dtype), and the faults that it could have.
PRODUCTS: dict[str, tuple[dict[str, int], int, tuple[str, ...]]] = {
    "few columns": ({"rows": 40, "length": 1500, "bits": 4}, 3, ("barrier:0", "barrier:1")),
    "many columns": (
        {"rows": 150, "length": 1500, "bits": 4},
        70,
        ("wait", "wait:1", "barrier", "barrier:0", "barrier:2", "barrier:3"),
    ),
}


@pytest.fixture(scope="module")
def error(emulated: Path, benchmarks: Any) -> Callable[..., float]:
    """The error of a product of the codec hyper, in units of its tolerance."""
    calls = benchmarks.Calls(emulated)

    def error_(rows: int, length: int, batch: int, dtype: str = "float32", **kind: int) -> float:
        case = benchmarks.hyper_case(rows, length, **kind)
        try:
            found: float = benchmarks.product_error(
                calls, benchmarks.HostMemory(), case, batch, dtype
            )
        except RuntimeError as failure:
            assert "emulated GPU" in str(failure)
            return float("inf")
        return found

    return error_


FAULTS = [(name, fault) for name, (_, _, faults) in PRODUCTS.items() for fault in faults]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_a_kernel_without_a_wait_is_found(
    error: Callable[..., float], monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    kind, batch, _ = PRODUCTS[name]
    worst = 0.0
    for copies in ("late", "eager"):
        monkeypatch.setenv("ONNXCOMP_EMULATED_COPIES", copies)
        assert error(batch=batch, **kind) <= 1.0
        monkeypatch.setenv("ONNXCOMP_EMULATED_FAULT", fault)
        worst = max(worst, error(batch=batch, **kind))
        monkeypatch.delenv("ONNXCOMP_EMULATED_FAULT")
    assert worst > 1.0
