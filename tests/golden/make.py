"""Make the golden files of this folder: python tests/golden/make.py.

Each file holds a weight, what the hyper codec stores for it, and what decoding gives; the numpy
reference makes them. They pin the storage format and the encoder's decisions: a change that alters
them breaks files written before, or at least the promise that equal input gives equal bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper import viterbi as hyper_viterbi
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.structured import STRUCTURES, code
from onnxcomp.passes.weight import Array

FOLDER = Path(__file__).parent

# (bits, state_bits, group, rows, length): every bit width, state size and group; padding in rows,
# in columns and in both.
CASES = (
    (1, 7, 64, 17, 64),
    (2, 6, 32, 16, 70),
    (2, 7, 128, 5, 256),
    (3, 7, 128, 18, 130),
    (4, 7, 128, 16, 128),
    (4, 7, 32, 3, 100),
    (4, 12, 64, 16, 64),
    (5, 8, 256, 4, 300),
    (6, 8, 128, 2, 128),
    (6, 10, 32, 19, 33),
)

# The same with structured tables: (bits, group, rows, length).
STRUCTURED = ((2, 64, 18, 130), (3, 32, 5, 100), (4, 128, 17, 128))


def weight_of(rows: int, length: int, seed: int) -> Array:
    """Heavy tails, and one row of zeros where there are more than two."""
    weight = np.random.default_rng(seed).standard_t(4, (rows, length)).astype(np.float32)
    if rows > 2:
        weight[2] = 0
    return weight * np.float32(0.02)


def make(
    bits: int, state_bits: int, group: int, rows: int, length: int, kind: str = "winding"
) -> dict[str, Array]:
    """Everything a golden file holds, by name."""
    weight = weight_of(rows, length, seed=bits * 100 + state_bits)
    values, reach, passes, _ = code(bits, state_bits, kind)
    geometry = GroupLayout(bits, state_bits, group, rows, length)
    codes, scales = hyper_viterbi.encode(weight, geometry, values, reach, passes=passes)
    decoded = hyper_format.decode(codes, scales, values, (rows, length), group)
    parameters = np.array([bits, state_bits, group], np.int64)
    return {
        "parameters": parameters,
        "weight": weight,
        "codes": codes,
        "scales": scales,
        "table": values,
        "decoded": decoded,
    }


def main() -> None:
    for old in FOLDER.glob("hyper_*.npz"):
        old.unlink()
    for case in CASES:
        bits, state_bits, group, rows, length = case
        path = FOLDER / f"hyper_k{bits}_L{state_bits}_g{group}_{rows}x{length}.npz"
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")
    for bits, group, rows, length in STRUCTURED:
        state_bits = STRUCTURES[bits].state_bits
        path = FOLDER / f"hyper_structured_k{bits}_L{state_bits}_g{group}_{rows}x{length}.npz"
        content = make(bits, state_bits, group, rows, length, "structured")
        np.savez_compressed(path, allow_pickle=False, **content)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
