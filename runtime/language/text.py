"""Tokens of a text, by the tokenizer that lies beside the model, or from a file of tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import RuntimeMissingError, UsageError
from onnxcomp.runtime.signature import read_signature

__all__ = ["TOKENIZER", "open_tokenizer", "read_tokens", "tokenizer_beside"]

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

TOKENIZER = "tokenizer.json"


def read_tokens(
    models: Sequence[PathLike],
    *,
    text: PathLike | None = None,
    tokens: PathLike | Array | None = None,
    tokenizer: PathLike | None = None,
) -> Array:
    """Tokens of a file.

    Args:
        models: The models that are to read them, the first one's vocabulary counts.
        text: A file of text in UTF-8.
        tokens: Instead of it a file ``.npy`` of whole numbers, or these.
        tokenizer: A ``tokenizer.json``, or its folder; None for the one beside one of the models.

    Returns:
        int64 ``(count,)``.

    Raises:
        UsageError: Neither a text nor tokens are given, or both, or they cannot be read.
        RuntimeMissingError: The package tokenizers is not installed.
    """
    if (text is None) == (tokens is None):
        raise UsageError(
            "give a text or tokens, one of them", hint="--text FILE, or --tokens FILE.npy"
        )
    if text is not None:
        found = _encoded(Path(text), tokenizer_beside(models, tokenizer))
    elif isinstance(tokens, np.ndarray):
        found = tokens
    else:
        found = _stored(Path(str(tokens)))
    if found.dtype.kind not in "iu" or found.size < 2:
        raise UsageError(
            f"{found.size} tokens of the type {found.dtype} are not a text",
            hint="tokens are two or more whole numbers",
        )
    flat = found.reshape(-1).astype(np.int64)
    _check_vocabulary(models[0], flat)
    return flat


def tokenizer_beside(models: Sequence[PathLike], given: PathLike | None) -> Path:
    """The file of the tokenizer: the one that is given, else the one beside a model.

    Raises:
        UsageError: There is none.
    """
    folders = [Path(model).parent for model in models]
    places = [folder / TOKENIZER for folder in folders]
    if given is not None:
        path = Path(given)
        places = [path / TOKENIZER if path.is_dir() else path]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in dict.fromkeys(places))
    raise UsageError(
        f"there is no tokenizer: looked for {looked}",
        hint="name the model's tokenizer.json by --tokenizer, or give --tokens FILE.npy",
    )


def open_tokenizer(path: Path) -> Any:
    """A ``tokenizers.Tokenizer``.

    Raises:
        RuntimeMissingError: The package tokenizers is not installed.
        UsageError: The file does not describe a tokenizer.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RuntimeMissingError(
            f"reading text needs the package tokenizers: {error}",
            hint="pip install 'onnxcomp[lm]', or give tokens with --tokens FILE.npy",
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain exceptions
        raise UsageError(
            f"{path} does not describe a tokenizer: {error}",
            hint="a tokenizer.json is what the package tokenizers saves",
        ) from error


def _encoded(path: Path, tokenizer: Path) -> Array:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="the text has to be a file in UTF-8"
        ) from error
    encoding = open_tokenizer(tokenizer).encode(content, add_special_tokens=False)
    return np.array(encoding.ids, np.int64)


def _stored(path: Path) -> Array:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="write it with numpy.save, as whole numbers"
        ) from error
    if not isinstance(found, np.ndarray):
        raise UsageError(f"{path} holds several arrays", hint="write one with numpy.save")
    return found


def _check_vocabulary(model: PathLike, tokens: Array) -> None:
    """Refuse tokens that the model's table does not have."""
    bounds = [spec.bound for spec in read_signature(model) if spec.bound is not None]
    bound = min(bounds, default=None)
    if tokens.min() < 0 or (bound is not None and tokens.max() >= bound):
        worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise UsageError(
            f"token {worst} is outside the model's vocabulary of {bound or 'whole numbers'}",
            hint="the tokenizer has to be that of the model",
        )
