"""Tables of the hyperfunction codec: the value of every state, for each (bits, state_bits)."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = [
    "GROUP_GAIN",
    "NORMAL_SQNR",
    "PASSES",
    "WINDINGS",
    "Winding",
    "level_bits",
    "quantiles",
    "spread",
    "table",
    "winding_table",
]


class Winding(NamedTuple):
    """How the states of a trellis stand on the normal distribution.

    Attributes:
        multiplier: A of spec.md section 3, odd.
        quantum: Q of spec.md section 3: table units per standard deviation.
        spread: Root mean square of the encoder's targets in table units. It is not part of the
            format: the scale of a group is refitted after every search.
    """

    multiplier: int
    quantum: float
    spread: float


# Searches of the encoder: an open one, then two that close the cycle.
PASSES = 3

# (bits, state_bits) -> winding; found by benchmarks/search_hyper_tables.py.
WINDINGS: Mapping[tuple[int, int], Winding] = {
    (1, 6): Winding(0x1D, 76.17, 76.66),
    (2, 6): Winding(0x13, 52.53, 49.56),
    (3, 6): Winding(0x1D, 52.53, 43.43),
    (4, 6): Winding(0x17, 52.53, 40.53),
    (1, 7): Winding(0x3B, 69.23, 75.25),
    (2, 7): Winding(0x1D, 47.74, 45.04),
    (3, 7): Winding(0xF, 47.74, 42.63),
    (4, 7): Winding(0x9, 47.74, 39.79),
    (5, 7): Winding(0x2F, 47.74, 36.17),
    (1, 8): Winding(0x77, 63.82, 69.37),
    (2, 8): Winding(0x47, 48.41, 45.67),
    (3, 8): Winding(0x61, 44.01, 39.3),
    (4, 8): Winding(0x51, 44.01, 36.68),
    (5, 8): Winding(0x6F, 44.01, 36.24),
    (6, 8): Winding(0x5F, 44.01, 34.17),
    (1, 10): Winding(0x1E7, 55.01, 59.8),
    (2, 10): Winding(0x109, 44.01, 41.52),
    (3, 10): Winding(0x7B, 44.01, 39.3),
    (4, 10): Winding(0x3D, 44.01, 39.87),
    (5, 10): Winding(0x15F, 38.52, 32.1),
    (6, 10): Winding(0x19D, 38.52, 32.37),
    (1, 12): Winding(0x743, 44.01, 52.0),
    (2, 12): Winding(0x3E3, 44.01, 45.13),
    (3, 12): Winding(0x609, 44.01, 39.29),
    (4, 12): Winding(0xF9, 44.01, 39.86),
    (5, 12): Winding(0x681, 34.62, 31.47),
    (6, 12): Winding(0x439, 34.62, 31.47),
}

# Signal to quantisation noise on normal data, dB, group 128; bench_hyper_quality.py --constants.
NORMAL_SQNR: Mapping[tuple[int, int], float] = {
    (bits, state_bits): decibels
    for state_bits, row in {
        6: (5.39, 10.97, 16.56, 22.30),
        7: (5.47, 11.24, 17.02, 22.71, 28.27),
        8: (5.54, 11.34, 17.23, 22.93, 28.68, 34.08),
        10: (5.61, 11.52, 17.45, 23.28, 29.14, 34.85),
        12: (5.65, 11.62, 17.57, 23.47, 29.49, 35.24),
    }.items()
    for bits, decibels in enumerate(row, start=1)
}


# What a group has over one of 128 on normal data, dB, by (bits, group); same script. The seam of
# the shortest strings costs more than their own scale gains.
GROUP_GAIN: Mapping[tuple[int, int], float] = {
    (bits, group): decibels
    for bits, row in {
        1: (-0.21, -0.01, 0.0, -0.01),
        2: (0.06, 0.06, 0.0, -0.04),
        3: (0.22, 0.10, 0.0, -0.07),
        4: (0.32, 0.14, 0.0, -0.09),
        5: (0.38, 0.16, 0.0, -0.12),
        6: (0.37, 0.17, 0.0, -0.11),
    }.items()
    for group, decibels in zip((32, 64, 128, 256), row, strict=True)
}


@functools.cache
def quantiles(levels: int) -> Array:
    """``Phi^-1((v + 1/2) / 2**levels)`` for every v: float64 ``(2**levels,)``."""
    count = 1 << levels
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((v + 0.5) / count) for v in range(count)])


def level_bits(bits: int, state_bits: int) -> int:
    """log2 of the number of levels on the winding: neighbours on it may share a value.

    Up to four bits per weight, 2^8 levels are nearly as good as more (0.09 dB at 4 bits, 0.03 dB at
    3), and kernels look them up several times as fast.
    """
    return min(state_bits, 8) if bits <= 4 else state_bits


def winding_table(winding: Winding, state_bits: int, levels: int) -> Array:
    """Value of each state on a winding of ``2**levels`` levels: int8 ``(2**state_bits,)``."""
    states = 1 << state_bits
    values = np.clip(np.rint(winding.quantum * quantiles(levels)), -127, 127).astype(np.int8)
    multiplier = winding.multiplier
    places = (multiplier * np.arange(states) + (multiplier - 1) // 2) % states
    result: Array = values[places >> (state_bits - levels)]
    return result


@functools.cache
def table(bits: int, state_bits: int) -> Array:
    """The table of the format: int8 ``(2**state_bits,)``, read-only.

    Args:
        bits: Bits per weight, 1..6.
        state_bits: Bits of a state: 6, 7, 8, 10 or 12, and at least ``bits + 2``.
    """
    levels = level_bits(bits, state_bits)
    result = winding_table(WINDINGS[bits, state_bits], state_bits, levels)
    result.flags.writeable = False
    return result


def spread(bits: int, state_bits: int) -> float:
    """Root mean square, in table units, that the encoder brings its targets to."""
    return WINDINGS[bits, state_bits].spread
