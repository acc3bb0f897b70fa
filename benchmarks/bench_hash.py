"""Products with shared weights against the dense product, and the error of matched chunks.

Speed: HashMatMul on memories of several sizes, ONNX Runtime's float32 MatMul and HyperMatMul at 4
bits take turns in one process; figures are medians of the CPU time of one thread. The dense and the
hyperfunction weights of few rows of activations come from memory, as in a real model (100 MB of
them); a shared memory is one for the whole model, here of 16 products (one product of many rows),
so that it stays in whatever cache holds it.

`--matched` prints the relative errors behind `predict` of the codec instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from bench_matmul import (
    Bench,
    Benches,
    Product,
    assemble,
    build,
    cpu_name,
    float_product,
    hyper_product,
    interleave,
    open_session,
)
from onnx import TensorProto, helper
from results import print_table, write_results

from onnxcomp.passes.codecs.hash import format as hash_format
from onnxcomp.passes.codecs.hash.codec import HashCodec, HashParams
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing
from onnxcomp.passes.weight import Use, WeightSite

# Names of variants, element types and bytes of their memories; what they are called for a
# 4096 x 4096 weight.
POOLS = (
    ("float32, 256 KB", np.float32, 1 << 18),
    ("float32, 1 MB", np.float32, 1 << 20),
    ("float32, 4 MB", np.float32, 1 << 22),
    ("float32, 8 MB", np.float32, 1 << 23),
    ("float32, 16 MB", np.float32, 1 << 24),
    ("float16, 4 MB", np.float16, 1 << 22),
    ("int8, 256 KB", np.int8, 1 << 18),
    ("int8, 1 MB", np.int8, 1 << 20),
    ("int8, 4 MB", np.int8, 1 << 22),
)
COLD_ROWS, COLD_BYTES = 16, 100e6
SHARERS = 16  # products that share a memory


def hash_products(
    dtype: Any, size: int, length: int, rows: int, count: int
) -> tuple[onnx.ModelProto, int]:
    """Products that share a random memory of `size` bytes; rounded activations where it is int8.

    Returns:
        The model, and the bytes of its memory.
    """
    rng = np.random.default_rng(0)
    slots = size // np.dtype(dtype).itemsize // hash_format.TILE
    memory = rng.standard_normal((slots, hash_format.TILE)).astype(np.float32)
    if dtype is np.int8:
        memory = np.clip(memory * 40, -127, 127)
    geometry = ChunkLayout(rows, length)
    products = []
    for i in range(count):
        sharing = Sharing(slots, *hash_format.seeds(0), base=i * geometry.tiles)
        shared = hash_format.shared_tensors(geometry, sharing)
        tensors = {f"{key.split('.')[1]}{i}": array for key, array in shared.items()}
        tensors |= {"scale": np.ones(1, np.float32), "codes": np.zeros((1, 1, 1), np.uint8)}
        tensors["memory"] = memory.astype(dtype)
        names = [n if n in tensors else f"{n}{i}" for n in hash_format.NODE_INPUTS]
        node = helper.make_node(
            *("HashMatMul", ["x", *names], [f"y{i}"]),
            domain="com.onnxcomp",
            extent=[rows, length],
            dtype=TensorProto.FLOAT,
            precision=int(dtype is np.int8),
        )
        products.append(Product([node], tensors))
    return assemble(products, length), tensors["memory"].nbytes


def open_benches(length: int, rows: int, cold: bool) -> Benches:
    """Sessions of all variants for one shape."""
    budget, benches = int(COLD_BYTES * cold), Benches()
    for name, make in (("float32 MatMul", float_product), ("hyper", hyper_product(4, 7, 128, 1))):
        model, count, size = build(make, length, rows, budget)
        benches[name, 1] = Bench(open_session(model, 1, False), count, size, "")
    count = SHARERS if cold else 1
    for name, dtype, bytes_ in POOLS:
        model, size = hash_products(dtype, bytes_, length, rows, count)
        benches[name, 1] = Bench(open_session(model, 1, False), count, size, "")
    return benches


def speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each variant and number of rows of activations."""
    length, rows = (int(size) for size in options.shape.split("x"))
    for cold in (True, False):
        batches = [m for m in options.rows if (m <= COLD_ROWS) == cold]
        benches = open_benches(length, rows, cold) if batches else {}
        for m in batches:
            x = np.random.default_rng(m).standard_normal((m, length), np.float32)
            times = interleave(benches, {"x": x}, options.repeats)
            for (name, _), seconds in times.items():
                dense = times["float32 MatMul", 1]
                record = {"variant": name, "m": m, "us": seconds * 1e6, "over": dense / seconds}
                print(
                    f"M={m:<4}{name:<20}{seconds * 1e6:10.1f} us {dense / seconds:6.2f}x",
                    flush=True,
                )
                yield record


def matched_errors() -> None:
    """Relative error of the map `matched` on 2^18 normal weights, by chunk and compression."""
    site = WeightSite(
        "w", (256, 1024), "float32", (Use("n", "MatMul", 1, "matmul"),), "", 256, 1024, False
    )
    weight = np.random.default_rng(0).standard_normal((256, 1024), np.float32)
    codec, rows = HashCodec(), []
    for chunk in (4, 8, 16):
        row: list[object] = [chunk]
        for compression in (2, 4, 8, 16):
            params = HashParams(compression, "matched", chunk, "float32")
            decoded = codec.decode(site, codec.encode(site, weight, params))
            row.append(f"{np.linalg.norm(decoded - weight) / np.linalg.norm(weight):.4f}")
        rows.append(row)
    print_table(["chunk", "2x", "4x", "8x", "16x"], rows)


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4096x4096", help="length x rows")
    parser.add_argument("--rows", default="1,16,128", help="rows of activations, ...")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--matched", action="store_true", help="errors of matched chunks")
    options = parser.parse_args()
    if options.matched:
        matched_errors()
        return
    options.rows = [int(m) for m in options.rows.split(",")]
    records = list(speed(options))
    names = list(dict.fromkeys(record["variant"] for record in records))
    over = {(record["variant"], record["m"]): record["over"] for record in records}
    columns = ["memory", *(f"{m} rows" for m in options.rows)]
    print_table(columns, [[n, *(f"{over[n, m]:.2f}x" for m in options.rows)] for n in names])
    facts = {"cpu": cpu_name(), "onnxruntime": onnxruntime.__version__, "shape": options.shape}
    write_results("hash", {**facts, "records": records})


if __name__ == "__main__":
    main()
