"""A text is inputs of a language model."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.runtime.inputs import load_inputs
from onnxcomp.runtime.language.roles import role_of, sized
from onnxcomp.runtime.language.windows import CONTEXT, WINDOWS

TEXT, OTHER = (
    "".join(f"Line {number} of a text that is long enough.\n" for number in range(first, last))
    for first, last in ((0, 400), (400, 440))
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_windows_are_spread_over_the_text(decoder_folder: Path, text: Path) -> None:
    from tokenizers import Tokenizer

    text.write_text(4 * TEXT, encoding="utf-8")
    feeds = load_inputs(text, decoder_folder / "model.onnx")
    assert len(feeds) == WINDOWS
    first, last = feeds[0], feeds[-1]
    assert first["input_ids"].shape == (1, CONTEXT) and first["input_ids"].dtype == np.int64
    assert (first["attention_mask"] == 1).all()
    assert (first["position_ids"] == np.arange(CONTEXT)).all()
    assert first["past_key_values.1.key"].shape == (1, 2, 0, 16)
    tokenizer = Tokenizer.from_file(str(decoder_folder / "tokenizer.json"))
    assert TEXT.startswith(tokenizer.decode(first["input_ids"][0].tolist()))
    assert TEXT.endswith(tokenizer.decode(last["input_ids"][0].tolist()))


def test_a_short_text_is_one_window(decoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Hello", encoding="utf-8")
    (feed,) = load_inputs(tmp_path / "short.txt", decoder_folder / "model.onnx")
    assert feed["input_ids"].shape == feed["attention_mask"].shape == (1, 5)


def test_a_text_calibrates_and_checks(decoder_folder: Path, text: Path, tmp_path: Path) -> None:
    dense, path = decoder_folder / "model.onnx", tmp_path / "calibrated.onnx"
    held_out = tmp_path / "other.txt"
    held_out.write_text(OTHER, encoding="utf-8")
    result = onnxcomp.optimize(dense, path, bits=2, data=text)
    assert result.verify is not None and result.verify.passed
    onnxcomp.optimize(dense, tmp_path / "plain.onnx", bits=2, verify=False)
    scores = [
        onnxcomp.evaluate_lm(small, dense, text=held_out, context=64, windows=4).kl or 0.0
        for small in (path, tmp_path / "plain.onnx")
    ]
    assert 0 < scores[0] < 0.6 * scores[1]


def test_other_models_and_missing_tokenizers_are_refused(
    decoder_folder: Path, demo_model_path: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="'pairs' is none of a language model") as caught:
        load_inputs(text, demo_model_path)
    assert ".npz" in caught.value.hint
    shutil.copyfile(decoder_folder / "model.onnx", tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="there is no tokenizer"):
        load_inputs(text, tmp_path / "model.onnx")


def test_roles_are_read_from_names() -> None:
    names = {
        "input_ids": 2, "attention_mask": 2, "position_ids": 2, "use_cache_branch": 1,
        "past_key_values.3.value": 4, "cache_k_0": 4, "pixel_values": 4,
    }  # fmt: skip
    roles = [role_of(name, rank) for name, rank in names.items()]
    assert roles == ["ids", "mask", "positions", "branch", "cache", "cache", ""]
    assert sized(("batch", 2, "past", 16), 3, 5) == (3, 2, 5, 16)
    assert sized((2, None, 4, None, 8), 1, 0) == (2, 1, 4, 0, 8)
