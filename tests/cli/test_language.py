"""Commands for language models: `eval lm` and `bench --generate`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp.cli.bench import generation_verdict

Run = Callable[..., Any]  # gives an Answer: code, out, err, json, verdict


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A few words, said again and again. " * 30, encoding="utf-8")
    return path


def test_eval_lm_compares_with_the_reference(
    onnxcomp: Run, decoder_folder: Path, text: Path
) -> None:
    small, dense = decoder_folder / "small.onnx", decoder_folder / "model.onnx"
    words = ("eval", "lm", small, "--reference", dense, "--text", text, "--context", 64)
    answer = onnxcomp(*words, "--windows", 3)
    assert answer.code == 0, answer.err
    header, first, second = answer.out.splitlines()[:3]
    assert header.split()[:3] == ["model", "file", "perplexity"]
    assert first.startswith(str(dense)) and "100.00 %" in first
    assert second.startswith(str(small)) and "±" in second
    assert answer.verdict.startswith("KL 0.") and answer.verdict.endswith("on 192 tokens")
    document = onnxcomp(*words, "--windows", 3, "--json").json
    assert document["windows"] == 3 and document["context"] == 64
    assert f"KL {document['kl']:.4f} nats" in answer.verdict


def test_eval_lm_alone_gives_perplexity(onnxcomp: Run, decoder_folder: Path, text: Path) -> None:
    answer = onnxcomp("eval", "lm", decoder_folder / "model.onnx", "--text", text)
    assert answer.code == 0, answer.err
    assert "KL" not in answer.out and answer.verdict.startswith("perplexity ")


def test_eval_lm_says_what_is_missing(onnxcomp: Run, decoder_folder: Path, tmp_path: Path) -> None:
    dense = decoder_folder / "model.onnx"
    answer = onnxcomp("eval", "lm", dense)
    assert answer.code == 2 and "--text FILE, or --tokens FILE.npy" in answer.err
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    words = ("--text", tmp_path / "text.txt", "--tokenizer", tmp_path)
    answer = onnxcomp("eval", "lm", dense, *words)
    assert answer.code == 2 and f"looked for {tmp_path}/tokenizer.json" in answer.err
    np.save(tmp_path / "tokens.npy", np.arange(100))
    answer = onnxcomp("eval", "lm", tmp_path / "none.onnx", "--tokens", tmp_path / "tokens.npy")
    assert answer.code == 5


def test_bench_generate_prints_tokens_per_second(onnxcomp: Run, decoder_folder: Path) -> None:
    models = (decoder_folder / "model.onnx", decoder_folder / "small.onnx")
    words = ("bench", *models, "--generate", "--prompt", 9, "--context", 7, "--seconds", 0.01)
    answer = onnxcomp(*words)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert "prompt of 9" in lines[0] and "decode at 7" in lines[0]
    assert all(line.count("tokens/s") == 2 for line in lines[1:3])
    assert answer.verdict.startswith(f"speed of decoding relative to {models[0]}: {models[1]}")
    document = onnxcomp(*words, "--json").json
    assert [m["decode"][0]["context"] for m in document["models"]] == [7, 7]
    answer = onnxcomp(*words, "--shape", "input_ids:1,2")
    assert answer.code == 2 and "leave out --data and --shape" in answer.err


def test_models_without_a_cache_are_compared_by_the_prompt() -> None:
    fast, slow = {"tokens_per_second": 400.0}, {"tokens_per_second": 100.0}
    cached = {"path": "a.onnx", "form": "standard", "prompt": fast, "decode": [slow]}
    plain = {"path": "b.onnx", "form": "library", "prompt": slow, "decode": []}
    assert generation_verdict([cached, cached]).endswith("a.onnx (standard) 1.00x")
    assert generation_verdict([cached, plain]) == (
        "speed of the prompt relative to a.onnx: b.onnx (library) 0.25x"
    )
