"""Make the golden files of the codec sparse+hyper: python tests/golden/make_sparse_hyper.py.

Each file holds a weight, its settings, what is stored for it, and what decoding gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.sparse.hyper_codec import SparseHyperCodec, SparseHyperParams
from onnxcomp.passes.weight import Array, WeightSite

FOLDER = Path(__file__).parent

# Bits, whether two of four are kept, rows and columns of blocks, and extent.
CASES = (
    (4, 0, (1, 1), (7, 33)),
    (3, 1, (1, 1), (6, 136)),
    (2, 0, (1, 4), (5, 68)),
    (5, 0, (4, 2), (8, 50)),
)


def pruned(extent: tuple[int, int], paired: int, block: tuple[int, int]) -> Array:
    """A weight with zeros: any half of its blocks, or two of every four elements."""
    rng = np.random.default_rng(extent[0])
    weight = rng.standard_t(4, extent).astype(np.float32)
    if paired:
        fours = weight.reshape(extent[0], -1, 4)
        np.put_along_axis(fours, np.argsort(np.abs(fours), axis=-1)[..., :2], 0, axis=-1)
        return weight
    counts = tuple(size // side for size, side in zip(extent, block, strict=True))
    held = rng.random(counts) < 0.5
    return np.where(np.kron(held, np.ones(block, bool)), weight, np.float32(0))


def params_of(bits: int, paired: int, block: tuple[int, int], weight: Array) -> SparseHyperParams:
    """Settings of a weight."""
    kept = int(np.count_nonzero(weight))
    return SparseHyperParams(bits, 7, 128, paired, *block, kept)


def make(
    bits: int, paired: int, block: tuple[int, int], extent: tuple[int, int]
) -> dict[str, Array]:
    """Everything a golden file holds, by name."""
    weight = pruned(extent, paired, block)
    site = WeightSite("w", extent, "float32", (), "", *extent, False)
    codec = SparseHyperCodec()
    payload = codec.encode(site, weight, params_of(bits, paired, block, weight))
    settings = {"settings": np.array([bits, paired, *block], np.int64)}
    return {"weight": weight, **settings, **payload.tensors, "decoded": codec.decode(site, payload)}


def name_of(bits: int, paired: int, block: tuple[int, int], extent: tuple[int, int]) -> str:
    """Name of a golden file."""
    pattern = "paired" if paired else f"{block[0]}by{block[1]}"
    return f"sparsehyper_b{bits}_{pattern}_{extent[0]}x{extent[1]}.npz"


def main() -> None:
    for case in CASES:
        path = FOLDER / name_of(*case)
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
