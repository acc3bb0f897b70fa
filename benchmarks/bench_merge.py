"""Products that share their input: apart, and as one product over all rows with a Split behind.

    bench_merge.py --out merge_avx512
    mask_cpuid/masked.py bench_merge.py --out merge_avx2

Gated and attention products of SmolLM2-135M and MiniLM; the graph holds many, so that weights are
not in the second-level cache. CPU time of one thread, variants in turns, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import bench_matmul
import numpy as np
from bench_matmul import Product, assemble, cpu_name, hyper_product, open_session
from onnx import helper
from results import print_table, write_results

# Name, length, rows of each product, rows of activations.
CASES = (
    ("SmolLM2 q, k, v", 576, (576, 192, 192), (1, 128)),
    ("SmolLM2 gate, up", 576, (1536, 1536), (1, 128)),
    ("MiniLM q, k, v", 384, (384, 384, 384), (8, 32, 128)),
)
COPIES = 24


def apart(rng: np.random.Generator, i: int, length: int, rows: Sequence[int], kind: str) -> Product:
    """One product for each weight."""
    make = hyper_product(4, 7, 128, 1, kind)
    parts = [make(rng, 10 * i + j, length, own) for j, own in enumerate(rows)]
    tensors: dict[str, Any] = {}
    for part in parts:
        tensors |= part.tensors
    return Product([node for part in parts for node in part.nodes], tensors)


def merged(
    rng: np.random.Generator, i: int, length: int, rows: Sequence[int], kind: str
) -> Product:
    """One product and a Split."""
    product = hyper_product(4, 7, 128, 1, kind)(rng, 10 * i, length, sum(rows))
    product.nodes[0].output[0] = f"all{i}"
    outputs = [f"y{10 * i + j}" for j in range(len(rows))]
    split = helper.make_node("Split", [f"all{i}", "rows"], outputs, axis=-1)
    tensors = {**product.tensors, "rows": np.array(rows, np.int64)}
    return Product([*product.nodes, split], tensors)


def model_of(products: Sequence[Product], length: int) -> Any:
    """All products side by side."""
    model = assemble(products, length)
    del model.graph.output[:]
    names = [name for product in products for node in product.nodes for name in node.output]
    for name in (name for name in names if name.startswith("y")):
        model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    return model


def measure(case: tuple[Any, ...], kind: str, repeats: int) -> list[dict[str, Any]]:
    """Microseconds of the products of one layer, both ways."""
    name, length, rows, heights = case
    sessions = {}
    for way, make in (("apart", apart), ("merged", merged)):
        rng = np.random.default_rng(0)
        products = [make(rng, i, length, rows, kind) for i in range(COPIES)]
        sessions[way] = open_session(model_of(products, length), 1, False, bench_matmul.BEST_ISA)
    found = []
    for height in heights:
        x = np.random.default_rng(1).standard_normal((height, length), np.float32)
        times: dict[str, list[float]] = {way: [] for way in sessions}
        for turn in range(repeats + 1):
            for way, session in sessions.items():
                start = time.thread_time()
                session.run(None, {"x": x})
                if turn:
                    times[way].append((time.thread_time() - start) / COPIES * 1e6)
        us = {way: round(statistics.median(values), 2) for way, values in times.items()}
        found.append({"case": name, "kind": kind, "m": height, **us})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", default="merge_avx512")
    options = parser.parse_args()
    kinds = ("structured",) if os.environ.get("ONNXCOMP_MASKED") else ("winding",)
    records = [r for case in CASES for kind in kinds for r in measure(case, kind, options.repeats)]
    rows = [
        (r["case"], r["m"], f"{r['apart']:.1f}", f"{r['merged']:.1f}",
         f"{r['apart'] / r['merged']:.3f}")
        for r in records
    ]  # fmt: skip
    print_table(("products", "rows", "apart, us", "merged, us", "apart / merged"), rows)
    write_results(options.out, {"cpu": cpu_name(), "records": records})


if __name__ == "__main__":
    main()
