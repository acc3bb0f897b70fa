"""Search the windings of passes/codecs/hyper/tables.py: python benchmarks/search_hyper_tables.py.

For every (bits, state_bits): all odd multipliers A are tried on one Gaussian sample, the best few
with several table scales Q and spreads on a second sample, and the winner is scored on a third.
Prints the lines of `WINDINGS`, with the score as a comment. Takes some ten minutes on one core;
needs the native encoder.
"""

from __future__ import annotations

import argparse
import itertools

import numpy as np

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.tables import (
    WINDINGS,
    Winding,
    level_bits,
    quantiles,
    winding_table,
)
from onnxcomp.passes.weight import Array

GROUP = 128

# Table units per standard deviation over the targets' root mean square, near its best value.
REACH = {1: 0.92, 2: 1.06, 3: 1.12, 4: 1.2, 5: 1.32, 6: 1.4}


def sqnr(winding: Winding, bits: int, state_bits: int, weight: Array) -> float:
    """Signal to quantisation noise of the codec on `weight`, in dB."""
    geometry = GroupLayout(bits, state_bits, GROUP, *weight.shape)
    table = winding_table(winding, state_bits, level_bits(bits, state_bits))
    codes, scales = native.hyper_encode(weight, geometry, table, winding.spread)
    error = native.hyper_decode(codes, scales, table, geometry) - weight
    return float(10 * np.log10(np.square(weight).sum() / np.square(error).sum()))


def gaussian(seed: int, weights: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((weights // 1024, 1024), np.float32)


def full_range(bits: int, state_bits: int) -> float:
    """Largest Q that clips nothing."""
    return 127.0 / float(quantiles(level_bits(bits, state_bits)).max())


def search(bits: int, state_bits: int, budget: int) -> tuple[Winding, float]:
    """Best winding and its score on data that took no part in the choice."""
    weights = max(16 * 1024, min(1 << 18, budget >> state_bits))
    quantum = full_range(bits, state_bits)
    first = gaussian(1, weights)
    start = [Winding(a, quantum, quantum / REACH[bits]) for a in range(3, 1 << (state_bits - 1), 2)]
    start.sort(key=lambda w: sqnr(w, bits, state_bits, first), reverse=True)
    second = gaussian(2, 4 * weights)
    wider = (1.0, 1.1, 1.25, 1.45, 1.7, 2.0)
    reach = [REACH[bits] * factor for factor in (0.85, 0.92, 1.0, 1.08, 1.16, 1.25)]
    tried = [
        Winding(w.multiplier, round(quantum * wide, 2), round(quantum * wide / far, 2))
        for w, wide, far in itertools.product(start[:6], wider, reach)
    ]
    best = max(tried, key=lambda w: sqnr(w, bits, state_bits, second))
    return best, sqnr(best, bits, state_bits, gaussian(3, 8 * weights))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="*", help="only these bits per weight")
    parser.add_argument("--state-bits", type=int, nargs="*", help="only these state sizes")
    parser.add_argument("--budget", type=int, default=1 << 25, help="states x weights of a trial")
    arguments = parser.parse_args()
    for bits, state_bits in sorted(WINDINGS, key=lambda pair: (pair[1], pair[0])):
        if arguments.state_bits and state_bits not in arguments.state_bits:
            continue
        if arguments.bits and bits not in arguments.bits:
            continue
        best, score = search(bits, state_bits, arguments.budget)
        text = f"Winding({best.multiplier:#x}, {best.quantum}, {best.spread})"
        print(f"    ({bits}, {state_bits}): {text},  # {score:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
