"""Make the golden files of the codec sparse+int: python tests/golden/make_sparse_int.py.

Each file holds a weight, its settings, what is stored for it, and what decoding gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.sparse.int_codec import SparseIntCodec, SparseIntParams
from onnxcomp.passes.weight import Array, WeightSite

FOLDER = Path(__file__).parent

# Bits, group, whether two of four are kept, and extent: whole and odd bytes, groups and fours.
CASES = (
    (8, 128, 0, (5, 200)),
    (4, 64, 0, (7, 33)),
    (4, 128, 1, (6, 150)),
    (8, 64, 1, (3, 65)),
)


def pruned(extent: tuple[int, int], paired: int) -> Array:
    """A weight with zeros: any half of it, or two of every four elements."""
    rng = np.random.default_rng(extent[0])
    weight = rng.standard_t(4, extent).astype(np.float32)
    if not paired:
        weight[rng.random(extent) < 0.5] = 0
        return weight
    wide = np.pad(weight, ((0, 0), (0, -extent[1] % 4))).reshape(extent[0], -1, 4)
    np.put_along_axis(wide, np.argsort(np.abs(wide), axis=-1)[..., :2], 0, axis=-1)
    return np.ascontiguousarray(wide.reshape(extent[0], -1)[:, : extent[1]])


def make(bits: int, group: int, paired: int, extent: tuple[int, int]) -> dict[str, Array]:
    """Everything a golden file holds, by name."""
    weight = pruned(extent, paired)
    site = WeightSite("w", extent, "float32", (), "", *extent, False)
    codec = SparseIntCodec()
    params = SparseIntParams(bits, group, paired, int(np.count_nonzero(weight)))
    payload = codec.encode(site, weight, params)
    settings = {"settings": np.array([bits, group, paired], np.int64)}
    return {"weight": weight, **settings, **payload.tensors, "decoded": codec.decode(site, payload)}


def name_of(bits: int, group: int, paired: int, extent: tuple[int, int]) -> str:
    """Name of a golden file."""
    pattern = "paired" if paired else "any"
    return f"sparseint_b{bits}_{pattern}_g{group}_{extent[0]}x{extent[1]}.npz"


def main() -> None:
    for case in CASES:
        path = FOLDER / name_of(*case)
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
