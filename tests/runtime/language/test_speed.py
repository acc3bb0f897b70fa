"""Tokens per second are measured of prompts and behind a cache."""

from pathlib import Path

import pytest

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.language.speed import bench_generation


def test_prompts_and_decoding_are_timed_in_both_forms(decoder_folder: Path, library: Path) -> None:
    models = [decoder_folder / "model.onnx", decoder_folder / "small.onnx"]
    result = bench_generation(
        models, prompt=20, contexts=(8, 30), threads=1, portable=True, seconds=0.01
    )
    assert (result["threads"], result["provider"]) == (1, "cpu")
    assert [m["form"] for m in result["models"]] == ["standard", "library", "portable"]
    for model in result["models"]:
        assert model["load_ms"] > 0 and 10**7 < model["rss_bytes"] < 10**9
        assert model["file_bytes"] == Path(model["path"]).stat().st_size
        assert model["prompt"]["tokens"] == 20
        assert [task["context"] for task in model["decode"]] == [8, 30]
        for task in (model["prompt"], *model["decode"]):
            assert task["tokens_per_second"] == pytest.approx(1e3 / task["ms_per_token"], rel=1e-2)
            assert task["cpu_ms_per_token"] > 0
        # A token of a prompt shares its pass with nineteen others.
        assert model["prompt"]["ms_per_token"] < model["decode"][0]["ms_per_token"]


def test_a_model_without_a_cache_reads_prompts_only(language_model_path: Path) -> None:
    (model,) = bench_generation([language_model_path], prompt=8, seconds=0.01)["models"]
    assert model["decode"] == [] and model["prompt"]["tokens_per_second"] > 0


def test_what_cannot_be_timed_is_an_error(decoder_folder: Path, demo_model_path: Path) -> None:
    with pytest.raises(UsageError, match="no model"):
        bench_generation([])
    with pytest.raises(UsageError, match="a prompt of 0 tokens"):
        bench_generation([decoder_folder / "model.onnx"], prompt=0)
    with pytest.raises(ModelError, match="no input like 'pairs'"):
        bench_generation([demo_model_path], seconds=0.01)
