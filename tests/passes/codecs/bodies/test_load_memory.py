"""What `plan` says about loading the portable form is what loading it takes."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "bench_portable_load.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_portable_load", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "rows", "length", "count"),
    [
        ("weight", 20000, 384, 1),
        ("matmul", 20000, 384, 1),
        ("gather", 20000, 384, 1),
        ("weight", 2048, 2048, 1),
        ("matmul", 2048, 2048, 1),
        ("matmul", 512, 512, 20),
    ],
)
def test_peak_memory_is_predicted(
    bench: ModuleType, kind: str, rows: int, length: int, count: int
) -> None:
    weights = bench.Weights(kind, rows, length, count)
    peak = bench.measure(weights)["peak"]
    # What a session of any model takes, measured by one with a tiny weight.
    fixed = bench.measure(bench.Weights(kind, 16, 128))["peak"]
    assert 0.7 < weights.predicted / (peak - fixed) < 1.3
    assert peak < 12 * weights.dense
