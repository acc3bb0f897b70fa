"""A text as inputs of a decoder: windows of its tokens, each behind an empty cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import UsageError
from onnxcomp.runtime.language.roles import role_of, sized
from onnxcomp.runtime.language.text import read_tokens
from onnxcomp.runtime.signature import InputSpec, expected

__all__ = ["CONTEXT", "WINDOWS", "text_inputs"]

Array = npt.NDArray[Any]

# What a run takes in minutes. More windows lose less, and time and memory of a run follow them: a
# quarter of these costs a model of 135 million weights a third more divergence at 4 bits.
WINDOWS, CONTEXT = 128, 256


def text_inputs(
    path: Path, model: str | os.PathLike[str], specs: Sequence[InputSpec]
) -> dict[str, Array]:
    """Inputs of a model that reads a text, by name, one sample for each window.

    Windows are spread evenly over the text.

    Args:
        path: The text, in UTF-8.
        model: The decoder; its ``tokenizer.json`` lies beside it.
        specs: Its inputs.

    Returns:
        Arrays with an axis for the windows in front of the input's own.

    Raises:
        UsageError: The text or the tokenizer cannot be read, or the model is no decoder.
        RuntimeMissingError: The package tokenizers is not installed.
    """
    roles = {spec.name: role_of(spec.name, len(spec.dims)) for spec in specs}
    if "ids" not in roles.values() or "" in roles.values():
        odd = next((name for name, role in roles.items() if not role), specs[0].name)
        raise UsageError(
            f"{path} is a text, and the input {odd!r} is none of a language model",
            hint=f"give arrays in an .npz file; {expected(specs)}",
        )
    tokens = read_tokens([model], text=path)
    length = min(CONTEXT, len(tokens))
    count = min(WINDOWS, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    windows = np.stack([tokens[start : start + length] for start in starts])[:, None]
    values = {
        "ids": windows,
        "mask": np.ones_like(windows),
        "positions": np.broadcast_to(np.arange(length), windows.shape),
        "branch": np.zeros((1, 1), bool),
    }
    return {
        spec.name: np.zeros((1, *sized(spec.dims, 1, 0)), spec.dtype)
        if roles[spec.name] == "cache"
        else values[roles[spec.name]].astype(spec.dtype)
        for spec in specs
    }
