"""Texts and tokens of the language model benchmark: what is calibrated with, and what is judged by.

Wikitext-2 is written with spaces around punctuation; they are taken out again, as every use of a
model would have it. Calibration takes the first half of its validation text, judging the second
one. Shakespeare is judged by only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from onnxcomp.runtime.language.evaluation import windows_of

__all__ = [
    "CONTEXT",
    "TEXTS",
    "calibration_feeds",
    "calibration_tokens",
    "held_out",
    "prompts",
    "unspaced",
    "windows",
]

Tokens = npt.NDArray[np.int64]

CONTEXT = 256
TEXTS = {"wikitext": "wikitext2/valid.txt", "shakespeare": "tinyshakespeare/input.txt"}

# Spaces that the tokenization of wikitext put in, and what the text has instead.
_SPACES = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?)\]}%])", r"\1"),
    (r"([(\[{$£]) ", r"\1"),
    (r" (n't|'s|'m|'d|'ll|'ve|'re)\b", r"\1"),
    (r'" ([^"]*?) "', r'"\1"'),
)


def unspaced(text: str) -> str:
    """Wikitext without the spaces that its tokens were cut at."""
    for pattern, wanted in _SPACES:
        text = re.sub(pattern, wanted, text)
    return text


def plain(text: str) -> str:
    """Wikitext as it is written, without empty lines."""
    lines = (line.strip() for line in unspaced(text).splitlines())
    return "\n".join(line for line in lines if line)


def _half(data: Path, name: str, tokenizer: Tokenizer, *, second: bool) -> Tokens:
    """Tokens of one half of a text."""
    text = (data / "eval" / TEXTS[name]).read_text(encoding="utf-8")
    if name == "wikitext":
        text = plain(text)
    middle = text.index("\n", len(text) // 2)
    part = text[middle:] if second else text[:middle]
    return np.array(tokenizer.encode(part, add_special_tokens=False).ids, np.int64)


def held_out(data: Path, model: Path) -> dict[str, Tokens]:
    """Tokens to judge by, by text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return {name: _half(data, name, tokenizer, second=True) for name in TEXTS}


def calibration_tokens(data: Path, model: Path, windows: int) -> Tokens:
    """Windows of text that nothing is judged by, ``(windows, CONTEXT)``."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens = _half(data, "wikitext", tokenizer, second=False)
    return tokens[: windows * CONTEXT].reshape(windows, CONTEXT)


def calibration_feeds(tokens: Tokens, config: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The windows as inputs of the model, its cache empty."""
    windows, length = tokens.shape
    empty = np.zeros((windows, config["num_key_value_heads"], 0, config["head_dim"]), np.float32)
    places = np.tile(np.arange(length), (windows, 1))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": places}
    for layer in range(config["num_hidden_layers"]):
        feeds |= {f"past_key_values.{layer}.{kind}": empty for kind in ("key", "value")}
    return feeds


def windows(tokens: Tokens, most: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Windows of a text, and the tokens that follow each of theirs."""
    return windows_of(tokens, CONTEXT, most)


def prompts(tokens: dict[str, Tokens], count: int, length: int) -> list[list[int]]:
    """Prompts from all texts, spread over them."""
    found = []
    for number in range(count):
        text = list(tokens.values())[number % len(tokens)]
        start = number * (len(text) - length) // count
        found.append(text[start : start + length].tolist())
    return found
