"""Tables of the hyperfunction codec: the value of every state, for each (bits, state_bits)."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.codecs.codec import Array

__all__ = ["WINDINGS", "table"]

# (bits, state_bits) -> (A, Q) of spec.md section 3.
WINDINGS: Mapping[tuple[int, int], tuple[int, float]] = {
    (bits, state_bits): (multiplier, 34.0)
    for bits in range(1, 7)
    for state_bits, multiplier in ((6, 0x17), (7, 0x9), (8, 0xAF), (10, 0x3BB), (12, 0x783))
    if state_bits >= bits + 2
}


@functools.cache
def table(bits: int, state_bits: int) -> Array:
    """Value of each state: int8 ``(2**state_bits,)``, read-only.

    Args:
        bits: Bits per weight, 1..6.
        state_bits: Bits of a state: 6, 7, 8, 10 or 12, and at least ``bits + 2``.
    """
    multiplier, quantum = WINDINGS[bits, state_bits]
    states = 1 << state_bits
    normal = statistics.NormalDist()
    quantile = np.array([normal.inv_cdf((u + 0.5) / states) for u in range(states)])
    values = np.clip(np.rint(quantum * quantile), -127, 127).astype(np.int8)
    winding = (multiplier * np.arange(states) + (multiplier - 1) // 2) % states
    result = values[winding]
    result.flags.writeable = False
    return result
