"""examples/chat.py answers with ONNX Runtime, numpy and tokenizers alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import onnxcomp
from onnxcomp.errors import RuntimeMissingError
from onnxcomp.runtime.language.decoder import Decoder

CHAT = Path(__file__).parents[1] / "examples" / "chat.py"
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 12


def chat(model: Path, *words: str) -> tuple[str, str]:
    """What the program says, and what it says about it; onnxcomp is not on its path."""
    program = (
        "import runpy, sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('onnxcomp', 'onnx', 'jinja2', 'click'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, CHAT, model, "--tokens", str(TOKENS), *words],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def expected(model: Path, *turns: str, library: bool) -> str:
    """Greedy answers by the package's own decoder, every turn read as a whole."""
    from tokenizers import Tokenizer

    from onnxcomp.runtime.session import open_session

    tokenizer = Tokenizer.from_file(str(model.parent / "tokenizer.json"))
    decoder = Decoder(open_session(model, library=library))
    end = tokenizer.token_to_id("<|im_end|>")
    text = said = ""
    for turn in turns:
        text += PROMPT.format(turn)
        decoder.reset()
        found: list[int] = []
        scores = decoder.step(np.array([tokenizer.encode(text).ids]))
        while len(found) < TOKENS and (token := int(scores[0, -1].argmax())) != end:
            found.append(token)
            scores = decoder.step(np.array([[token]]))
        reply = tokenizer.decode(found)
        said += reply + "\n"
        text += reply + "<|im_end|>\n"
    return said


@pytest.fixture(scope="module")
def library() -> str:
    try:
        return str(onnxcomp.get_library_path())
    except RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")


def test_answers_come_from_the_compressed_model_in_both_forms(
    decoder_folder: Path, library: str
) -> None:
    small = decoder_folder / "small.onnx"
    turns = ("What is it?", "Why?")  # answered in whole characters
    words = [word for turn in turns for word in ("--say", turn)]
    said, about = chat(small, "--library", library, *words)
    assert said == expected(small, *turns, library=True)
    assert "tokens read" in about and "ChatML" in about
    said, _ = chat(small, "--say", turns[0])
    assert said == expected(small, turns[0], library=False)


def test_a_seed_decides_about_drawn_tokens(decoder_folder: Path) -> None:
    dense = decoder_folder / "model.onnx"
    words = ("--say", "Hello", "--temperature", "2")
    first, again, other = (chat(dense, *words, "--seed", seed)[0] for seed in "112")
    assert first == again != other


def test_a_model_without_a_cache_is_refused(demo_model_path: Path, decoder_folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, CHAT, demo_model_path, "--folder", decoder_folder, "--say", "x"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and "is no decoder with a KV cache" in run.stderr


def test_later_turns_read_only_what_is_new(smollm2_path: Path) -> None:
    dense = smollm2_path / "model.onnx"
    said, about = chat(dense, "--say", "Name a colour.", "--say", "Another one.", "--threads", "1")
    assert len(said.splitlines()) >= 2
    counts = [int(line.split()[0][1:]) for line in about.splitlines() if "tokens read" in line]
    # The second turn ends the first answer and asks: it does not read the first question again.
    assert counts[1] < counts[0] + TOKENS
