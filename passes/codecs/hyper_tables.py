"""Tables of the hyperfunction codec: the value of every state, for each (bits, state_bits)."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from onnxcomp.passes.codecs.codec import Array

__all__ = ["NORMAL_SQNR", "WINDINGS", "Winding", "quantiles", "spread", "table", "winding_table"]


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


# (bits, state_bits) -> winding; found by benchmarks/search_hyper_tables.py.
WINDINGS: Mapping[tuple[int, int], Winding] = {
    (1, 6): Winding(0x1D, 76.17, 76.17),
    (2, 6): Winding(0x13, 52.53, 47.76),
    (3, 6): Winding(0x1D, 52.53, 43.78),
    (4, 6): Winding(0x17, 52.53, 38.91),
    (1, 7): Winding(0x3B, 69.23, 76.92),
    (2, 7): Winding(0x1D, 52.52, 47.74),
    (3, 7): Winding(0xF, 47.74, 43.4),
    (4, 7): Winding(0x9, 47.74, 39.79),
    (5, 7): Winding(0x2F, 47.74, 35.37),
    (1, 8): Winding(0x77, 63.82, 70.91),
    (2, 8): Winding(0x47, 48.41, 44.01),
    (3, 8): Winding(0x61, 44.01, 40.01),
    (4, 8): Winding(0x51, 44.01, 36.68),
    (5, 8): Winding(0x71, 44.01, 36.68),
    (6, 8): Winding(0x5F, 44.01, 32.6),
    (1, 10): Winding(0x1DD, 55.85, 62.06),
    (2, 10): Winding(0x2F9, 38.0, 35.0),
    (3, 10): Winding(0x281, 38.0, 33.0),
    (4, 10): Winding(0x3BB, 38.0, 33.0),
    (5, 10): Winding(0x29F, 38.0, 33.0),
    (6, 10): Winding(0x2A5, 38.0, 33.0),
    (1, 12): Winding(0x89F, 36.0, 36.0),
    (2, 12): Winding(0xC21, 36.0, 33.0),
    (3, 12): Winding(0x22F, 36.0, 33.0),
    (4, 12): Winding(0x783, 36.0, 33.0),
    (5, 12): Winding(0xF9, 36.0, 33.0),
    (6, 12): Winding(0xFBD, 36.0, 33.0),
}

# Signal to quantisation noise on normal data, dB, group 128; benchmarks/bench_hyper_sqnr.py.
NORMAL_SQNR: Mapping[tuple[int, int], float] = {
    (bits, state_bits): decibels
    for state_bits, row in {
        6: (5.39, 10.97, 16.57, 22.26),
        7: (5.47, 11.24, 17.00, 22.71, 28.25),
        8: (5.54, 11.33, 17.23, 22.92, 28.68, 34.08),
        10: (5.60, 11.40, 17.30, 23.20, 29.00, 34.50),
        12: (5.60, 11.50, 17.40, 23.40, 29.30, 35.00),
    }.items()
    for bits, decibels in enumerate(row, start=1)
}


@functools.cache
def quantiles(state_bits: int) -> Array:
    """``Phi^-1((u + 1/2) / 2**state_bits)`` for every u: float64 ``(2**state_bits,)``."""
    states = 1 << state_bits
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((u + 0.5) / states) for u in range(states)])


def winding_table(winding: Winding, state_bits: int) -> Array:
    """Value of each state on a winding: int8 ``(2**state_bits,)``."""
    states = 1 << state_bits
    values = np.clip(np.rint(winding.quantum * quantiles(state_bits)), -127, 127).astype(np.int8)
    multiplier = winding.multiplier
    return values[(multiplier * np.arange(states) + (multiplier - 1) // 2) % states]


@functools.cache
def table(bits: int, state_bits: int) -> Array:
    """The table of the format: int8 ``(2**state_bits,)``, read-only.

    Args:
        bits: Bits per weight, 1..6.
        state_bits: Bits of a state: 6, 7, 8, 10 or 12, and at least ``bits + 2``.
    """
    result = winding_table(WINDINGS[bits, state_bits], state_bits)
    result.flags.writeable = False
    return result


def spread(bits: int, state_bits: int) -> float:
    """Root mean square, in table units, that the encoder brings its targets to."""
    return WINDINGS[bits, state_bits].spread
