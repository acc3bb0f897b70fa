"""A small trained classifier that ships with the package: Unicode name -> general category.

It reads the name of a character ("GREEK SMALL LETTER ALPHA") as overlapping pairs of letters and
says which of the 30 general categories the character has ("Ll"). The model is a pair embedding
(Gather), two convolutions, a two-layer perceptron on every position (MatMul), a maximum over the
name, and two dense layers (Gemm). README.md beside this file has data, licence and accuracy;
`train.py` is the recipe. This module needs numpy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALPHABET",
    "CATEGORIES",
    "LENGTH",
    "PAIRS",
    "HeldOut",
    "encode_names",
    "held_out",
    "model_path",
]

# Every letter that occurs in character names; code 0 is the padding.
ALPHABET = " -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CATEGORIES = (
    "Cc", "Cf", "Cn", "Co", "Cs", "Ll", "Lm", "Lo", "Lt", "Lu",
    "Mc", "Me", "Mn", "Nd", "Nl", "No", "Pc", "Pd", "Pe", "Pf",
    "Pi", "Po", "Ps", "Sc", "Sk", "Sm", "So", "Zl", "Zp", "Zs",
)  # fmt: skip
PAIRS = (len(ALPHABET) + 1) ** 2
# Pairs per encoded name. 99.6 % of all names are shorter; longer ones are cut.
LENGTH = 64

_CODES = {letter: code for code, letter in enumerate(ALPHABET, start=1)}


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """Characters the model never saw in training.

    Attributes:
        code_points: Unicode code points ``(n,)``.
        pairs: Encoded names ``(n, LENGTH)`` int64, the input of the model.
        categories: Indices into `CATEGORIES`, ``(n,)``.
    """

    code_points: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.categories)


def encode_names(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Encode names as pair numbers ``(n, LENGTH)``: first letter's code * 39 + second letter's."""
    letters = np.zeros((len(names), LENGTH + 1), dtype=np.int64)
    for row, name in enumerate(names):
        codes = [_CODES[letter] for letter in name[:LENGTH]]
        # One leading zero, so that the first letter has a pair of its own.
        letters[row, 1 : len(codes) + 1] = codes
    return letters[:, :-1] * (len(ALPHABET) + 1) + letters[:, 1:]


def model_path() -> Path:
    """The trained model, an ONNX file of 1.5 MB in float32."""
    return Path(str(resources.files(__name__))) / "model.onnx"


def held_out() -> HeldOut:
    """The evaluation set."""
    with np.load(Path(str(resources.files(__name__))) / "held_out.npz") as file:
        pairs = encode_names(str(file["names"]).split("\n"))
        return HeldOut(
            file["code_points"].astype(np.int64), pairs, file["categories"].astype(np.int64)
        )
