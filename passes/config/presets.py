"""Presets: sets of settings with a name and a measured meaning, defined here and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.suggest import suggest

__all__ = ["PRESETS", "Preset", "preset_options"]


@dataclasses.dataclass(frozen=True, slots=True)
class Preset:
    """Settings with a name.

    Attributes:
        options: Arguments of `onnxcomp.optimize` by name.
        meaning: What it does, in a line.
        stock: What is different where no operator library may be needed: integers have 4 or 8 bits.
        measured: What came out, on four models, by ``benchmarks/bench_presets.py``.
    """

    options: Mapping[str, Any]
    meaning: str
    stock: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measured: str = ""


PRESETS: Mapping[str, Preset] = {
    "lossless": Preset(
        {"method": "dense", "rest": "exact", "tolerance": 1e-6},
        "no value changes: copies are stored once, zeros left out, and half precision where it is "
        "exact",
        measured=(
            "SqueezeNet float16 1.0x, 0.0 %; Silero VAD 1.1x, 0.0 %; "
            "language model 1.1x, 0.0 %; MiniLM 1.0x, 0.0 %"
        ),
    ),
    "balanced": Preset(
        {"bits": 5, "rest": "fp16"},
        "5 bits per weight (8 with --stock)",
        {"bits": 8},
        measured=(
            "SqueezeNet float16 2.9x, 6.0 %; Silero VAD 3.1x, 0.3 %; "
            "language model 6.4x, 3.6 %; MiniLM 6.2x, 0.5 %"
        ),
    ),
    "small": Preset(
        {"bits": 4, "rest": "fp16"},
        "4 bits per weight",
        measured=(
            "SqueezeNet float16 3.5x, 15.5 %; Silero VAD 3.4x, 1.4 %; "
            "language model 7.8x, 7.6 %; MiniLM 7.6x, 2.1 %"
        ),
    ),
    "max": Preset(
        {"bits": 3, "rest": "fp16"},
        "3 bits per weight (4 with --stock)",
        {"bits": 4},
        measured=(
            "SqueezeNet float16 4.4x, 30.5 %; Silero VAD 3.7x, 1.2 %; "
            "language model 10.0x, 15.1 %; MiniLM 10.0x, 6.9 %"
        ),
    ),
    "web": Preset(
        {"method": "int", "bits": 8, "external_data": "never"},
        "for browsers: integers of 8 bits in one file, which load like a dense model",
        measured=(
            "SqueezeNet float16 1.9x, 2.0 %; Silero VAD 2.6x, 0.1 %; "
            "language model 4.0x, 1.2 %; MiniLM 3.8x, 0.1 %"
        ),
    ),
}


def preset_options(name: str, *, stock: bool = False) -> dict[str, Any]:
    """Arguments of `onnxcomp.optimize` that a preset stands for.

    Args:
        name: Its name.
        stock: Whether no operator library may be needed.

    Raises:
        UsageError: The preset is unknown.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown", hint=suggest(name, PRESETS))
    preset = PRESETS[name]
    return {**preset.options, **(preset.stock if stock else {})}
