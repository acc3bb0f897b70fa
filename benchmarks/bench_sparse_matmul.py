"""Products with weights of which half is zero, against what ONNX Runtime has for dense ones.

SparseIntMatMul with 8 and 4 bits for what is kept, and MatMulNBits with as many bits for all, its
activations in int8 as well (accuracy level 4); blocks of 128 everywhere. As in `bench_matmul`: all
variants take turns in one process, graphs hold so many weights that no cache can keep them, and the
figure is the median of one thread's CPU time for a product. A run replaces the records it makes
again.

    bench_sparse_matmul.py --rows 1,4,16
    bench_sparse_matmul.py --shapes 1024x4096,4096x1024 --rows 1,16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_matmul import (
    RESULTS,
    Bench,
    Benches,
    Maker,
    Product,
    Variant,
    build,
    cpu_name,
    float_product,
    interleave,
    nbits_product,
    open_session,
)
from onnx import TensorProto, helper

from onnxcomp.passes.codecs.sparse import integers
from onnxcomp.passes.codecs.sparse.integers import ANY, PAIRED, IntLayout

# (variant, what it is compared with, rows of activations, least times as fast, least times smaller)
BARS = (
    ("sparse-int8", "nbits8", 1, 1.05, 1.0),
    ("paired-int4", "nbits4", 1, None, 1 / 0.75),
)


def sparse_product(bits: int, *, paired: bool) -> Maker:
    """SparseIntMatMul on random codes, half of the weight kept: any half, or two of every four."""

    def make(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
        layout = IntLayout(rows, length, bits, 128, paired, 0)
        mask = rng.integers(0, 216 if paired else 256, layout.mask_shape, np.uint8)
        layout = dataclasses.replace(layout, kept=int(np.unpackbits(mask).sum()))
        codes = rng.integers(-127, 128, layout.codes_shape, np.int8).view(np.uint8)
        codes[0] = 0
        scales = rng.random(layout.scales_shape, np.float32).astype(np.float16)
        tensors = {"mask": mask, "codes": codes, "scales": scales}
        own = {"mask": f"w{i}", "codes": f"c{i}", "scales": f"s{i}"}
        shared = integers.shared_tensors(layout)
        named = {key.split(".")[1]: array for key, array in shared.items()}
        node = helper.make_node(
            "SparseIntMatMul",
            ["x", *(own.get(name, name) for name in integers.INT_INPUTS)],
            [f"y{i}"],
            domain="com.onnxcomp",
            extent=[rows, length],
            group=128,
            bits=bits,
            pattern=PAIRED if paired else ANY,
            dtype=TensorProto.FLOAT,
            precision=1,
        )
        return Product([node], named | {own[name]: array for name, array in tensors.items()})

    return make


def variants(wanted: str) -> dict[str, Variant]:
    """Variants by name; `wanted` is a comma-separated list of names, or empty."""
    found = {
        "fp32": Variant(float_product),
        "nbits8": Variant(nbits_product(8, 128)),
        "nbits4": Variant(nbits_product(4, 128)),
    }
    for isa in ("", "avx2"):
        for bits in (8, 4):
            for paired in (False, True):
                name = f"{'paired' if paired else 'sparse'}-int{bits}"
                product = sparse_product(bits, paired=paired)
                found["-".join(filter(None, (isa, name)))] = Variant(product, isa)
    dense = ("fp32", "nbits8", "nbits4")
    kept = [name for name in wanted.split(",") if name]
    return {n: v for n, v in found.items() if not kept or n in dense or n in kept}


def open_benches(wanted: str, length: int, rows: int, budget: int) -> Benches:
    """Sessions of all variants for one shape, with one thread."""
    benches: Benches = {}
    for name, variant in variants(wanted).items():
        model, count, size = build(variant.make, length, rows, budget)
        session = open_session(model, 1, False, variant.isa)
        benches[name, 1] = Bench(session, count, size, variant.isa or "auto")
    return benches


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each variant, shape and number of rows."""
    for shape in options.shapes.split(","):
        length, rows = (int(size) for size in shape.split("x"))
        benches = open_benches(options.only, length, rows, int(options.cold_mb * 1e6))
        for m in (int(part) for part in options.rows.split(",")):
            x = np.random.default_rng(m).standard_normal((m, length), np.float32)
            facts = {"length": length, "rows": rows, "m": m}
            times = interleave(benches, {"x": x}, options.repeats)
            for (name, threads), seconds in times.items():
                bench = benches[name, threads]
                yield {
                    "variant": name,
                    **facts,
                    "isa": bench.isa,
                    "load_average": round(os.getloadavg()[0], 1),
                    "weight_bytes": bench.weight_bytes,
                    "bits_per_weight": 8 * bench.weight_bytes / (length * rows),
                    "us": seconds * 1e6,
                    "over_fp32": times["fp32", 1] / seconds,
                    "over_nbits8": times["nbits8", 1] / seconds,
                    "over_nbits4": times["nbits4", 1] / seconds,
                }


def judged(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every bar whose figures are among the records of 4096 x 4096, and whether it is met."""
    square = {
        (record["variant"], record["m"]): record
        for record in records
        if record["length"] == record["rows"] == 4096
    }
    for name, rival, m, speed, smaller in BARS:
        if (name, m) not in square or (rival, m) not in square:
            continue
        own, other = square[name, m], square[rival, m]
        faster = own[f"over_{rival}"]
        ratio = other["weight_bytes"] / own["weight_bytes"]
        yield {
            "what": f"{name} against {rival} at M={m}",
            "times_as_fast": round(faster, 3),
            "must_be_as_fast": speed,
            "times_smaller": round(ratio, 3),
            "must_be_smaller": round(smaller, 3),
            "met": (speed is None or faster >= speed) and ratio >= smaller,
        }


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is of."""
    return tuple(record[name] for name in ("variant", "length", "rows", "m"))


def main() -> None:
    import onnxruntime

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096", help="length x rows, ...")
    parser.add_argument("--rows", default="1,4,16", help="rows of activations, ...")
    parser.add_argument("--only", default="", help="names of variants beside the dense ones, ...")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cold-mb", type=float, default=100, help="weights of one variant, MB")
    parser.add_argument("--out", type=Path, default=RESULTS / "matmul_sparse.json")
    options = parser.parse_args()
    machine = {"onnxruntime": onnxruntime.__version__, "cpu": cpu_name()}
    known = {}
    if options.out.exists():
        document = json.loads(options.out.read_text(encoding="utf-8"))
        if all(document[name] == value for name, value in machine.items()):
            known = {key(record): record for record in document["records"]}
    for record in measure(options):
        known[key(record)] = record
        print(
            f"{record['length']}x{record['rows']} M={record['m']:<3}{record['variant']:<18}"
            f"{record['us']:9.1f} us {record['bits_per_weight']:6.3f} bits "
            f"{record['over_fp32']:6.2f}x fp32 {record['over_nbits8']:6.2f}x nbits8 "
            f"{record['over_nbits4']:6.2f}x nbits4",
            flush=True,
        )
    records = list(known.values())
    bars = list(judged(records))
    for bar in bars:
        print("met   " if bar["met"] else "MISSED", bar)
    text = json.dumps({**machine, "records": records, "bars": bars}, indent=1)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
