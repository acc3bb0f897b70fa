"""Make the golden files of the integer codec: python tests/golden/make_integer.py.

Each file holds a weight, the tensors that are stored for it, and what decoding gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.weight import Array, Need, Use, WeightSite

FOLDER = Path(__file__).parent

# Bits, block, zero points, rows, length, and whether products use the weight.
CASES = (
    (4, 32, 1, 3, 100, True),
    (4, 128, 0, 5, 70, True),
    (4, 64, 1, 6, 64, False),
    (8, 32, 1, 3, 100, True),
    (8, 64, 0, 4, 130, True),
    (8, 64, 1, 4, 96, False),
)


def site_of(rows: int, length: int, products: bool) -> WeightSite:
    """A float32 weight with one use."""
    need: Need = "matmul" if products else "gather"
    use = Use("n", "MatMul" if products else "Gather", 1, need)
    return WeightSite("w", (rows, length), "float32", (use,), "", rows, length, False)


def make(
    bits: int, block: int, zero_points: int, rows: int, length: int, products: bool
) -> dict[str, Array]:
    """Everything a golden file holds, by name."""
    rng = np.random.default_rng(bits * 1000 + block)
    weight = rng.standard_t(4, (rows, length)).astype(np.float32)
    weight[1, :32] = 0
    site, codec = site_of(rows, length, products), IntegerCodec()
    payload = codec.encode(site, weight, IntegerParams(bits, block, zero_points))
    settings = np.array([bits, block, zero_points, products], np.int64)
    stored = {f"tensor_{key}": tensor for key, tensor in payload.tensors.items()}
    return {"settings": settings, "weight": weight, "decoded": codec.decode(site, payload)} | stored


def main() -> None:
    for case in CASES:
        bits, block, zero_points, rows, length, _ = case
        path = FOLDER / f"int_b{bits}_g{block}_z{zero_points}_{rows}x{length}.npz"
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
