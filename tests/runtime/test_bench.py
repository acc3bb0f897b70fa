"""Measuring models."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnxcomp.errors import ModelError, RuntimeMissingError, UsageError
from onnxcomp.runtime.bench import bench

KEYS = {"path", "form", "load_ms", "median_ms", "p10_ms", "p90_ms", "rss_bytes"}
KEYS |= {"cpu_ms", "peak_rss_bytes", "file_bytes"}


def test_models_are_measured_in_both_forms(twins: tuple[Path, Path], library: Path) -> None:
    result = bench(twins, threads=1, portable=True, seconds=0.01)
    models = result.pop("models")
    assert result == {"threads": 1, "shapes": {"ids": [2, 16]}, "provider": "cpu"}
    assert [model["form"] for model in models] == ["standard", "library", "portable"]
    for model in models:
        assert set(model) == KEYS
        assert 0 < model["p10_ms"] <= model["median_ms"] <= model["p90_ms"]
        assert model["load_ms"] > 0
        assert 10**7 < model["rss_bytes"] < 10**9
        assert model["file_bytes"] == Path(model["path"]).stat().st_size


def test_a_models_own_inputs_are_used_where_the_first_ones_do_not_fit(
    twins: tuple[Path, Path], data_folder: Path
) -> None:
    other = data_folder / "models" / "mnist_cntk.onnx"
    result = bench([twins[0], other], data={"ids": np.zeros((1, 2), np.int64)}, seconds=0.01)
    assert result["shapes"] == {"ids": [1, 2]}
    assert len(result["models"]) == 2


def test_failures_of_a_process_reach_the_caller(
    twins: tuple[Path, Path], no_library: None, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeMissingError, match="absent"):
        bench([twins[1]], seconds=0.01)
    with pytest.raises(ModelError, match="cannot run"):
        bench([twins[0]], data={"ids": np.full((1, 1), 99)}, seconds=0.01)
    with pytest.raises(UsageError, match="no model"):
        bench([])
    with pytest.raises(UsageError, match="provider 'tpu' is unknown") as caught:
        bench([twins[0]], provider="tpu")
    assert "cuda" in caught.value.hint


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="there is a GPU"
)
def test_a_missing_provider_is_not_replaced_in_silence(twins: tuple[Path, Path]) -> None:
    with pytest.raises(RuntimeMissingError, match="CUDAExecutionProvider"):
        bench([twins[0]], provider="cuda", seconds=0.01)
