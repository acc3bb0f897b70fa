"""How much slower, or faster, a compressed model runs than its original: measured, in turns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Slowdown", "measure_slowdown"]

# Seconds that each model runs, and inputs it gets.
_SECONDS, _FEEDS = 1.5, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Slowdown:
    """Times of one run of both models.

    Attributes:
        dense_ms: Median of the original, in milliseconds.
        compressed_ms: Median of the compressed model.
        max_slowdown: How many times as long it may take.
    """

    dense_ms: float
    compressed_ms: float
    max_slowdown: float

    @property
    def factor(self) -> float:
        """How many times as long it takes."""
        return self.compressed_ms / max(self.dense_ms, 1e-9)

    @property
    def passed(self) -> bool:
        """Whether that is accepted."""
        return self.factor <= self.max_slowdown

    @property
    def failure(self) -> str:
        """What is wrong, on one line."""
        return f"it runs {self.factor:.3g} times as long, {self.max_slowdown:.3g} are allowed"

    def to_json(self) -> dict[str, Any]:
        """Times and the verdict."""
        return {
            "dense_ms": self.dense_ms,
            "compressed_ms": self.compressed_ms,
            "slowdown": round(self.factor, 4),
            "max_slowdown": self.max_slowdown,
            "passed": self.passed,
        }


def measure_slowdown(
    reference: Path,
    compressed: Path,
    max_slowdown: float,
    data: Any = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
) -> Slowdown:
    """Run both models on one thread, each in a process of its own, taking turns.

    Args:
        reference: The original.
        compressed: The compressed model; it runs with the operator library.
        max_slowdown: How many times as long it may take.
        data: Inputs; None to make one up.
        shapes: Sizes of made-up inputs.
        seed: Of made-up inputs.

    Raises:
        ModelError: A model cannot be run.
    """
    from onnxcomp.runtime.bench import bench
    from onnxcomp.runtime.inputs import load_inputs

    feeds = None if data is None else load_inputs(data, reference)[:_FEEDS]
    found = bench(
        [os.fspath(reference), os.fspath(compressed)],
        data=feeds,
        shapes=shapes,
        threads=1,
        seed=seed,
        seconds=_SECONDS,
    )["models"]
    return Slowdown(found[0]["median_ms"], found[1]["median_ms"], max_slowdown)
