"""Make the golden files of the codec sparse: python tests/golden/make_sparse.py.

Each file holds a weight, its element type, what is stored for it, and what decoding gives.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcomp.passes.codecs.sparse.codec import SparseCodec, SparseParams
from onnxcomp.passes.codecs.sparse.format import count_kept
from onnxcomp.passes.weight import DTYPES, Array, WeightSite

FOLDER = Path(__file__).parent

# Element type, extent and share of zeros: whole and odd bytes, rows without any element.
CASES = (
    ("float32", (16, 24), 0.5),
    ("float32", (7, 33), 0.9),
    ("float16", (5, 70), 0.75),
    ("bfloat16", (9, 13), 0.4),
)


def make(dtype: str, extent: tuple[int, int], zeros: float) -> dict[str, Array]:
    """Everything a golden file holds, by name; 16-bit floats as their bits."""
    rng = np.random.default_rng(extent[0])
    weight = rng.standard_t(4, extent).astype(np.float32).astype(DTYPES[dtype])
    weight[rng.random(extent) < zeros] = 0
    weight[1] = 0
    weight[2, 3] = 1
    site = WeightSite("w", extent, dtype, (), "", *extent, False)
    codec = SparseCodec()
    wide = weight.astype(np.float32)
    payload = codec.encode(site, wide, SparseParams(count_kept(weight)))
    # A negative zero among what is kept: encoders leave it out now, and decoders read it.
    place = 1 + np.count_nonzero(weight.flat[: 2 * extent[1] + 3])
    wide[2, 3] = payload.tensors["values"][place] = -0.0
    bits = np.uint32 if dtype == "float32" else np.uint16
    return {
        "weight": wide,
        "dtype": np.array(dtype),
        "mask": payload.tensors["mask"],
        "values": payload.tensors["values"].view(bits),
        "decoded": codec.decode(site, payload),
    }


def name_of(dtype: str, extent: tuple[int, int], zeros: float) -> str:
    """Name of a golden file."""
    return f"sparse_{dtype}_z{round(100 * zeros)}_{extent[0]}x{extent[1]}.npz"


def main() -> None:
    for case in CASES:
        path = FOLDER / name_of(*case)
        np.savez_compressed(path, allow_pickle=False, **make(*case))
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
