"""The benchmark of large models, on small ones: files with holes, and what is computed of rows."""

import argparse
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    if not BENCHMARKS.exists():
        pytest.skip("an installation has no benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_scale
    import scale_models

    yield bench_scale, scale_models
    for name in ("bench_scale", "scale_models", "bench_killed", "results"):
        sys.modules.pop(name, None)


def test_a_huge_model_is_a_file_with_holes(modules: tuple[Any, Any], tmp_path: Path) -> None:
    bench, models = modules
    decoder = models.Decoder(256, 512, 1, 8, 4, vocabulary=20000, half=True, sparse=True)
    model = tmp_path / "decoder130.onnx"
    written = models.write_decoder(decoder, model)
    onnx.checker.check_model(model)
    assert any(a * b > models._PIECE for a, b in decoder.weights.values())
    stored = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert stored < written
    given = argparse.Namespace(commands=["plain"], windows=1, threads=1, memory=None)
    (row,) = bench.measure("130", decoder, given, tmp_path)
    assert row["weights"] == decoder.parameters
    assert row["model_bytes"] == written
    assert 0 < row["bytes"] < written / 3
    assert row["peak_rss_bytes"] > row["base_rss_bytes"] > 0


def test_real_models_are_computed_from_the_right_rows(modules: tuple[Any, Any]) -> None:
    bench, _ = modules
    common = {"command": "plain", "threads": 1, "base_rss_bytes": 10**8}
    large = {
        **common,
        "size": "4",
        "weights": 10**9,
        "cpu_seconds": 50,
        "largest_weights": 6 * 10**7,
    }
    wide = {**common, "size": "0.9", "weights": 10**8, "cpu_seconds": 9}
    rows = [
        {**large, "peak_rss_bytes": 9 * 10**8},
        {**wide, "largest_weights": 32000 * 4096, "peak_rss_bytes": 5 * 10**8},
    ]
    small, big = bench.expected(rows)
    assert (small["model"], small["from_size"], small["memory_from_size"]) == ("7B", "4", "0.9")
    assert small["cpu_seconds"] == round(50 * 6.74)
    assert small["peak_rss_bytes"] == 5 * 10**8
    assert big["peak_rss_bytes"] == 9 * 10**8
