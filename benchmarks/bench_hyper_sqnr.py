"""Quality and speed of the hyper codec: python benchmarks/bench_hyper_sqnr.py.

Prints, for every (bits, state_bits), the signal to quantisation noise ratio in dB on normal data
(the constants of `hyper_tables.NORMAL_SQNR`) and the encoding speed of one core in million weights
per second of thread CPU time; then three distributions, the groups, and the decoder.
Takes about two minutes; needs the native encoder.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from onnxcomp.passes.codecs import native
from onnxcomp.passes.codecs.codec import Array
from onnxcomp.passes.codecs.hyper_format import GROUPS, STATE_BITS, Geometry
from onnxcomp.passes.codecs.hyper_tables import WINDINGS, spread, table

# Rate-distortion bound of the normal distribution, dB per bit.
BOUND = 20 * np.log10(2)


def sample(name: str, weights: int) -> Array:
    """Weights (n, 1024) of a distribution."""
    rng = np.random.default_rng(20240917)
    shape = (max(16, weights // 1024), 1024)
    draws = {
        "normal": lambda: rng.standard_normal(shape),
        "laplace": lambda: rng.laplace(size=shape),
        "student4": lambda: rng.standard_t(4, size=shape),
    }
    return draws[name]().astype(np.float32)


def measure(weight: Array, bits: int, state_bits: int, group: int = 128) -> tuple[float, float]:
    """Signal to noise ratio in dB, and encoded weights per second of thread CPU time."""
    geometry = Geometry(bits, state_bits, group, *weight.shape)
    values = table(bits, state_bits)
    start = time.thread_time()
    codes, scales = native.hyper_encode(weight, geometry, values, spread(bits, state_bits))
    seconds = time.thread_time() - start
    error = (native.hyper_decode(codes, scales, values, geometry) - weight).astype(np.float64)
    noise, signal = np.square(error).sum(), np.square(weight.astype(np.float64)).sum()
    return float(10 * np.log10(signal / noise)), weight.size / seconds


def print_trellises(weights: int) -> None:
    print("bits  state_bits    dB  below bound   M weights/s/core")
    for state_bits in STATE_BITS:
        part = sample("normal", weights >> max(0, state_bits - 8))
        for bits in range(1, 7):
            if (bits, state_bits) in WINDINGS:
                decibels, speed = measure(part, bits, state_bits)
                gap = bits * BOUND - decibels
                print(f"{bits:4} {state_bits:11} {decibels:7.3f} {gap:9.2f} {speed / 1e6:14.1f}")


def print_distributions(weights: int) -> None:
    print("\nstate_bits 7, dB        normal  laplace  student4")
    for bits in (2, 3, 4):
        row = [
            measure(sample(name, weights), bits, 7)[0] for name in ("normal", "laplace", "student4")
        ]
        print(f"bits {bits}             ", "  ".join(f"{decibels:7.3f}" for decibels in row))


def print_groups(weights: int) -> None:
    print("\nstate_bits 7, dB by group", *(f"{group:7}" for group in GROUPS))
    for bits in range(1, 6):
        row = [measure(sample("normal", weights), bits, 7, group)[0] for group in GROUPS]
        print(f"bits {bits}                   ", *(f"{decibels:7.3f}" for decibels in row))


def print_decoder() -> None:
    weight = sample("normal", 1 << 21)
    print()
    for bits in (2, 3, 4):
        geometry = Geometry(bits, 7, 128, *weight.shape)
        values = table(bits, 7)
        codes, scales = native.hyper_encode(weight, geometry, values, spread(bits, 7))
        start = time.thread_time()
        native.hyper_decode(codes, scales, values, geometry)
        speed = weight.size / (time.thread_time() - start) / 1e6
        print(f"decoder, bits {bits}, state_bits 7: {speed:.0f} M weights/s/core")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=1 << 20, help="weights of a sample")
    arguments = parser.parse_args()
    print_trellises(arguments.weights)
    print_distributions(arguments.weights)
    print_groups(arguments.weights)
    print_decoder()


if __name__ == "__main__":
    main()
