"""Perplexity and divergence of language models are what their definitions say."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxcomp
from onnxcomp import evaluate_lm
from onnxcomp.errors import ModelError, RuntimeMissingError, UsageError
from onnxcomp.runtime.language.evaluation import Divergence, windows_of

Array = np.ndarray[Any, Any]

TEXT = "The quick brown fox jumps over the lazy dog, and 12 naïve foxes do not.\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def reference_numbers(path: Path, other: Path, tokens: Array, context: int) -> dict[str, float]:
    """The definitions, in float64 and all at once."""
    count = (len(tokens) - 1) // context
    used = count * context
    fed, wanted = tokens[:used].reshape(count, context), tokens[1 : used + 1].reshape(-1)
    shares = []
    for model in (path, other):
        session = onnxcomp.InferenceSession(model)
        caches = {
            v.name: np.zeros((count, 2, 0, 16), np.float32)
            for v in session.get_inputs()
            if v.name.startswith("past")
        }
        places = np.broadcast_to(np.arange(context), fed.shape)
        feed = {"input_ids": fed, "attention_mask": np.ones_like(fed), "position_ids": places}
        logits = session.run(["logits"], {**feed, **caches})[0].astype(np.float64)
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        shares.append((raised / raised.sum(-1, keepdims=True)).reshape(used, -1))
    ours, dense = shares
    kl = (dense * np.log(dense / ours)).sum(1)
    return {
        "perplexity": float(np.exp(-np.log(ours[np.arange(used), wanted]).mean())),
        "reference_perplexity": float(np.exp(-np.log(dense[np.arange(used), wanted]).mean())),
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std() / math.sqrt(used)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "same_token": float((ours.argmax(1) == dense.argmax(1)).mean()),
    }


def test_numbers_are_those_of_the_definitions(decoder_folder: Path, text: Path) -> None:
    small, dense = decoder_folder / "small.onnx", decoder_folder / "model.onnx"
    told: list[tuple[int, int, str]] = []
    score = evaluate_lm(
        small, dense, text=text, context=32, windows=None,
        progress=lambda done, total, what: told.append((done, total, what)),
    )  # fmt: skip
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(decoder_folder / "tokenizer.json"))
    tokens = np.array(tokenizer.encode(TEXT).ids)
    assert score.windows == (len(tokens) - 1) // 32 and score.tokens == 32 * score.windows
    wanted = reference_numbers(small, dense, tokens, 32)
    # float32 sums of 320 terms, where these are float64
    assert {n: getattr(score, n) for n in wanted} == pytest.approx(wanted, rel=1e-4)
    assert 0 < wanted["kl"] < 1 and 0.3 < wanted["same_token"] < 1
    assert [done for done, _, _ in told] == list(range(1, score.windows + 1))
    assert "KL" in told[0][2] and told[-1][1] == score.windows
    document = json.loads(json.dumps(score.to_json()))
    assert document["model"] == {"path": str(small), "bytes": small.stat().st_size}
    assert document["reference"]["path"] == str(dense)


def test_a_model_does_not_differ_from_itself(decoder_folder: Path, text: Path) -> None:
    dense = decoder_folder / "model.onnx"
    score = evaluate_lm(dense, dense, text=text, context=50, windows=2)
    assert score.kl == 0.0 and score.same_token == 1.0
    assert score.perplexity == score.reference_perplexity
    alone = evaluate_lm(dense, text=text, context=50, windows=2)
    assert alone.perplexity == score.perplexity
    assert alone.kl is alone.same_token is alone.reference is alone.reference_perplexity is None


def test_the_portable_form_is_judged_on_request(decoder_folder: Path, text: Path) -> None:
    small = decoder_folder / "small.onnx"
    forms = [evaluate_lm(small, text=text, library=library) for library in (None, False)]
    # Activations rounded to int8 make the difference.
    assert forms[0].perplexity == pytest.approx(forms[1].perplexity, rel=0.1)
    assert forms[0].perplexity != forms[1].perplexity


def test_windows_do_not_overlap_and_short_texts_are_one() -> None:
    tokens = np.arange(11)
    pairs = [(fed.tolist(), wanted.tolist()) for fed, wanted in windows_of(tokens, 4, None)]
    assert pairs == [([0, 1, 2, 3], [1, 2, 3, 4]), ([4, 5, 6, 7], [5, 6, 7, 8])]
    assert len(list(windows_of(tokens, 4, 1))) == 1
    ((fed, wanted),) = windows_of(tokens, 256, 40)
    assert len(fed) == len(wanted) == 10


def test_models_without_a_cache_are_read_as_well(language_model_path: Path) -> None:
    tokens = np.arange(200) % 50
    score = evaluate_lm(language_model_path, language_model_path, tokens=tokens, context=64)
    assert score.windows == 3 and score.kl == 0.0


def test_tokens_come_from_a_file_without_the_tokenizer(
    decoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = decoder_folder / "model.onnx"
    np.save(tmp_path / "tokens.npy", np.arange(300, dtype=np.int32).reshape(3, 100))
    score = evaluate_lm(dense, tokens=tmp_path / "tokens.npy", context=100)
    assert score.tokens == 200
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert evaluate_lm(dense, tokens=tmp_path / "tokens.npy", context=100) == score
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(RuntimeMissingError, match="needs the package tokenizers") as caught:
        evaluate_lm(dense, text=tmp_path / "text.txt")
    assert "onnxcomp[lm]" in caught.value.hint and "--tokens" in caught.value.hint


def test_what_is_no_text_is_refused(decoder_folder: Path, tmp_path: Path, text: Path) -> None:
    dense = decoder_folder / "model.onnx"
    np.savez(tmp_path / "many.npz", a=np.arange(9))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "tokenizer.json").write_text("{}")
    for words, arguments in (
        ("give a text or tokens", {}),
        ("give a text or tokens", {"text": text, "tokens": np.arange(9)}),
        ("are not a text", {"tokens": np.arange(1)}),
        ("are not a text", {"tokens": np.ones(9)}),
        ("outside the model's vocabulary of 320", {"tokens": np.arange(400)}),
        ("token -1 is outside", {"tokens": np.array([1, -1])}),
        ("holds several arrays", {"tokens": tmp_path / "many.npz"}),
        ("cannot read .*absent", {"tokens": tmp_path / "absent.npy"}),
        ("cannot read .*latin", {"text": tmp_path / "latin.txt"}),
        ("there is no tokenizer: looked for", {"text": text, "tokenizer": tmp_path / "none"}),
        ("does not describe a tokenizer", {"text": text, "tokenizer": tmp_path}),
        ("0 windows of 256", {"text": text, "windows": 0}),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate_lm(dense, **arguments)


def test_models_that_keep_the_last_logits_only_are_refused(
    decoder_folder: Path, tmp_path: Path, text: Path
) -> None:
    model = onnx.load(decoder_folder / "model.onnx")
    (head,) = (node for node in model.graph.node if node.output[0] == "logits")
    last = helper.make_node("Slice", [head.input[0], "constant_int64_[-1]", "most", "one"], ["h"])
    for name, value in (("constant_int64_[-1]", -1), ("most", 2**62), ("one", 1)):
        model.graph.initializer.append(helper.make_tensor(name, 7, [1], [value]))
    head.input[0] = "h"
    model.graph.node.insert(len(model.graph.node) - 2, last)
    onnx.save(model, tmp_path / "last.onnx")
    with pytest.raises(UsageError, match=r"\[1, 1, 320\] for 256 tokens"):
        evaluate_lm(tmp_path / "last.onnx", tokens=np.zeros(600, np.int64))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    found = Divergence()
    found.add(np.array([[0.0, np.nan]]), np.array([1]))
    with pytest.raises(ModelError, match="the model's logits are not finite"):
        found.score(1)
    found = Divergence()
    found.add(np.zeros((1, 2)), np.array([1]), np.array([[0.0, np.nan]]))
    with pytest.raises(ModelError, match="logits of the reference or the model are not"):
        found.score(1)


def test_sure_and_wrong_predictions_are_infinitely_perplexed() -> None:
    found = Divergence()
    found.add(np.array([[0.0, 1e30]]), np.array([0]))
    assert found.score(1).perplexity == math.inf


def test_compression_is_seen_on_a_cut_of_a_real_model(
    smollm2_path: Path, decoder_script: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    decoder_script["write_cut"](tmp_path, smollm2_path)
    dense = tmp_path / "model.onnx"
    found = []
    for bits in (4, 2):
        small = tmp_path / f"{bits}.onnx"
        onnxcomp.optimize(dense, small, bits=bits, verify=False)
        found.append(evaluate_lm(small, dense, text=text, windows=1).kl)
    assert found[0] is not None and found[1] is not None
    assert 0.01 < found[0] < 0.2 < found[1]
