"""Make the golden files of the winding codec: python tests/golden/make_winding.py.

Each file holds a weight, what is stored for it, the trajectory, and what decoding gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.winding.codec import WindingCodec, WindingParams
from onnxcomp.passes.weight import Array, WeightSite

FOLDER = Path(__file__).parent

# Settings and extent: every grid, classes and groups, whole and odd numbers of weights.
CASES = (
    (WindingParams(5, "sheared", 3), (16, 24)),
    (WindingParams(4, "sheared", 3, 0.05, 225), (7, 9)),
    (WindingParams(3, "pi", 2), (5, 33)),
    (WindingParams(4, "lattice", 0, group=48), (9, 40)),
)


def make(params: WindingParams, extent: tuple[int, int]) -> dict[str, Array]:
    """Everything a golden file holds, by name."""
    weight = np.random.default_rng(params.bits).standard_t(4, extent).astype(np.float32)
    weight *= np.float32(0.02)
    site = WeightSite("w", extent, "float32", (), "", *extent, False)
    codec = WindingCodec()
    payload = codec.encode(site, weight, params)
    shared = {key.split(".")[1]: array for key, array in payload.shared.items()}
    decoded = codec.decode(site, payload)
    return {"weight": weight, **payload.tensors, **shared, "decoded": decoded}


def name_of(params: WindingParams, extent: tuple[int, int]) -> str:
    """Name of a golden file."""
    return f"winding_b{params.bits}_{params.grid}_g{params.group}_{extent[0]}x{extent[1]}.npz"


def main() -> None:
    for case in CASES:
        path = FOLDER / name_of(*case)
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
