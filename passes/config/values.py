"""The smallest checks: one word of several, a regular expression, a size; and the words themselves.

Nothing here imports codecs or numpy, so that the command line can show its help without them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from onnxcomp.errors import UsageError
from onnxcomp.passes.suggest import suggest

__all__ = [
    "MODES",
    "SCORES",
    "TARGET_NAMES",
    "CalibrationMode",
    "ExternalData",
    "Functions",
    "ModeChoice",
    "Objective",
    "Precision",
    "PruneScore",
    "Rest",
    "Target",
    "check_pattern",
    "one_of",
    "parse_size",
]

CalibrationMode = Literal["sequential", "parallel", "off"]
ExternalData = Literal["auto", "always", "never"]
Functions = Literal["local", "inline", "inline-unfoldable"]
ModeChoice = Literal["auto", "fused", "folded", "decode"]
Objective = Literal["size", "latency"]
Precision = Literal["int8", "exact"]
PruneScore = Literal["obs", "numerical", "wanda", "flap", "magnitude"]
Rest = Literal["keep", "fp16", "exact"]
Target = Literal["any", "avx2", "avx512", "neon", "cuda"]

MODES: tuple[ModeChoice, ...] = get_args(ModeChoice)
TARGET_NAMES: tuple[Target, ...] = get_args(Target)
SCORES: tuple[PruneScore, ...] = get_args(PruneScore)

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: float | str) -> int:
    """Bytes of a size such as ``"120MB"``, ``"1.5 GiB"`` or ``4096``.

    KB, MB and GB are powers of 1000, so that a target is met whichever way it was meant; KiB, MiB
    and GiB are powers of 1024.

    Raises:
        UsageError: The text is not a size.
    """
    if isinstance(value, int | float):
        return int(value)
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{value!r} is not a size", hint="write for example 120MB, 16KiB or 4096")
    return int(float(match.group(1)) * unit)


def check_pattern(pattern: str) -> None:
    """Refuse what is not a regular expression.

    Raises:
        UsageError: It is not one.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}",
            hint="write a dot as \\. and a bracket as \\[",
        ) from error


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is not among those known.

    Raises:
        UsageError: It is not; the hint names the closest one.
    """
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown", hint=suggest(value, known))
