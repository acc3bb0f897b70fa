"""Tables of the speed of products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from page_parts import markdown, read

__all__ = ["experts", "products", "shared_products", "sparse_products", "structured_products"]

SPEED_NAMES = {
    "fp32": "ONNX Runtime MatMul, float32",
    "dynamic-int8": "DynamicQuantizeLinear and MatMulInteger, int8",
    "nbits4-b128": "MatMulNBits int4, block 128, accuracy level 4",
    "nbits4-b32": "MatMulNBits int4, block 32, accuracy level 4",
    "nbits2-b128": "MatMulNBits int2, block 128, accuracy level 4",
}

# Instruction sets that a variant's name begins with.
ISAS = {"avx2": "AVX2 only", "avx2vnni": "AVX2 with VNNI"}


def speed_name(variant: str) -> str:
    """A row's name."""
    isa, _, rest = variant.partition("-")
    if isa in ISAS:
        return f"{rest}, {ISAS[isa]}"
    return SPEED_NAMES.get(variant, variant)


def speed_rows(records: Sequence[Any], cells: Sequence[tuple[int, int, int]]) -> list[list[str]]:
    """Speeds over float32 of every variant, by (length, rows, m)."""
    speed = {(r["variant"], r["length"], r["rows"], r["m"]): r["over_fp32"] for r in records}
    variants = [v for v in dict.fromkeys(r["variant"] for r in records) if v != "fp32"]
    return [
        [speed_name(variant), *(f"{speed[(variant, *cell)]:.2f}" for cell in cells)]
        for variant in variants
    ]


def products() -> Iterator[str]:
    """Speed of one product."""
    results = read("matmul")
    alone = [row for row in results["records"] if row["of_one_thread"] is None]
    loads = [row["load_average"] for row in results["records"]]
    yield (
        "Speed of one product with a 4096x4096 weight, by rows of activations, against float32\n"
        f"in ONNX Runtime {results['onnxruntime']} (1.00): CPU time of one thread of an\n"
        f"{results['cpu']}, a machine with a load of {min(loads):.0f} to {max(loads):.0f};\n"
        "weights are not in the cache at few rows. `k4-L7` is 4 bits and 2^7 states:\n"
        "`benchmarks/bench_matmul.py`.\n"
    )
    heights = sorted({row["m"] for row in alone})
    cells = [(4096, 4096, m) for m in heights]
    columns = ("product", *(f"{m} row" + "s" * (m > 1) for m in heights))
    yield markdown(columns, speed_rows(alone, cells))
    yield "The same with weights of other shapes, at 1, 16 and 128 rows.\n"
    shapes = ((768, 3072), (4096, 11008))
    cells = [(*shape, m) for shape in shapes for m in (1, 16, 128)]
    columns = ("product", *(f"{length}x{rows}, {m}" for length, rows, m in cells))
    yield markdown(columns, speed_rows(alone, cells))
    yield from two_threads(results["records"])
    missed = [bar for bar in results["bars"] if not bar["met"]]
    texts = [
        f"{bar['what']}: {bar['found']:.2f} where {bar['must']} was the goal" for bar in missed
    ]
    goals = len(results["bars"])
    yield (
        f"Of {goals} goals for the weight of 4096x4096 (`bars` in `results/matmul.json`), missed:\n"
        f"{'; '.join(texts) or 'none'}.\n"
    )


def structured_products() -> Iterator[str]:
    """Speed of one product with a structured table."""
    results = read("matmul_avx2")
    yield (
        "Speed of one product with a 4096x4096 weight, by rows of activations, against float32\n"
        f"in ONNX Runtime {results['onnxruntime']} (1.00): {machine_text(results)}\n"
        "ONNX Runtime is kept to AVX2 as well (`benchmarks/mask_cpuid`); `structured` are the\n"
        "tables for such machines: `benchmarks/bench_matmul.py`.\n"
    )
    yield from square_products("matmul_avx2")
    real = read("matmul_avx2_zen4")
    yield f"The same on a machine that has no AVX-512: {machine_text(real)}\n"
    yield from square_products("matmul_avx2_zen4")
    wide = read("matmul_avx512")
    yield (
        f"The same with AVX-512, where windings are the default: {machine_text(wide)}\n"
        "Weights by length and rows, and rows of activations.\n"
    )
    cells = [(*shape, m) for shape in ((4096, 4096), (768, 3072)) for m in (1, 4, 16, 128)]
    columns = ("product", *(f"{length}x{rows}, {m}" for length, rows, m in cells))
    yield markdown(columns, speed_rows(wide["records"], cells))


def square_products(name: str) -> Iterator[str]:
    """Products of one file with a weight of 4096x4096."""
    results = read(name)
    every = [row for row in results["records"] if row["length"] == row["rows"] == 4096]
    square = [row for row in every if row["of_one_thread"] is None]
    heights = sorted({row["m"] for row in square})
    cells = [(4096, 4096, m) for m in heights]
    columns = ("product", *(f"{m} row" + "s" * (m > 1) for m in heights))
    yield markdown(columns, speed_rows(square, cells))
    yield from of_memory(every)
    missed = [bar for bar in results["bars"] if not bar["met"]]
    texts = [
        f"{bar['what']}: {bar['found']:.2f} where {bar['must']} was the goal" for bar in missed
    ]
    yield (
        f"Of {len(results['bars'])} goals (`bars` in `results/{name}.json`), missed:\n"
        f"{'; '.join(texts) or 'none'}.\n"
    )


def of_memory(records: Sequence[Any]) -> Iterator[str]:
    """How much of the speed of memory products with one row reach."""
    share = {
        (row["variant"], row["threads"]): f"{100 * row['of_read_speed']:.0f} %"
        for row in records
        if row.get("of_read_speed") is not None and row["m"] == 1
    }
    threads = sorted({number for _, number in share})
    yield (
        "Bytes of weights that products with one row read per second, as a share of what as many\n"
        "threads read that do nothing else.\n"
    )
    rows = [
        [speed_name(variant), *(share[variant, number] for number in threads)]
        for variant in dict.fromkeys(variant for variant, _ in share)
    ]
    yield markdown(("product", *(f"{n} thread" + "s" * (n > 1) for n in threads)), rows)


def machine_text(results: Mapping[str, Any]) -> str:
    """The processor, and how busy the machine was."""
    loads = [row["load_average"] for row in results["records"]]
    return (
        f"CPU time of one thread\nof an {results['cpu']},\n"
        f"a machine with a load of {min(loads):.0f} to {max(loads):.0f}."
    )


def two_threads(records: Sequence[Any]) -> Iterator[str]:
    """What two threads cost together, in CPU time of one."""
    both = [row for row in records if row["threads"] == 2]
    share = {(r["variant"], r["length"], r["rows"], r["m"]): r["of_one_thread"] for r in both}
    cells = list(dict.fromkeys((r["length"], r["rows"], r["m"]) for r in both))
    rows = [
        [SPEED_NAMES.get(variant, variant), *(f"{share[(variant, *cell)]:.2f}" for cell in cells)]
        for variant in dict.fromkeys(r["variant"] for r in both)
    ]
    yield "CPU time of two threads together, in times of one thread.\n"
    yield markdown(("product", *(f"{length}x{n}, {m}" for length, n, m in cells)), rows)


def shared_products() -> Iterator[str]:
    """Speed of products with shared weights."""
    results = read("hash")
    over = {(row["variant"], row["m"]): row["over"] for row in results["records"]}
    heights = sorted({m for _, m in over})
    names = {"hyper": "hyper, 4 bits, int8"}
    rows = [
        (names.get(name, name), *(f"{over[name, m]:.2f}" for m in heights))
        for name in dict.fromkeys(name for name, _ in over)
    ]
    yield (
        "The same product with a weight that was trained as signed copies of a memory, by\n"
        "element type and size of the memory that all layers share; a dense weight of float32\n"
        "has 67 MB: `benchmarks/bench_hash.py`.\n"
    )
    yield markdown(("memory", *(f"{m} row" + "s" * (m > 1) for m in heights)), rows)


SPARSE_NAMES = {
    "fp32": "ONNX Runtime MatMul, float32",
    "nbits8": "MatMulNBits, 8 bits for all, block 128",
    "nbits4": "MatMulNBits, 4 bits for all, block 128",
    "sparse-int8": "any half, 8 bits",
    "sparse-int4": "any half, 4 bits",
    "paired-int8": "two of four, 8 bits",
    "paired-int4": "two of four, 4 bits",
}


def sparse_products() -> Iterator[str]:
    """Speed of products with weights of which half is zero."""
    results = read("matmul_sparse")
    loads = [row["load_average"] for row in results["records"]]
    yield (
        "A 4096x4096 weight of which half is zero (`sparse+int`), against dense ones: bits for\n"
        "each weight, and the speed by rows of activations against float32 (1.00): CPU time of\n"
        f"one thread of an {results['cpu']} with a load of {min(loads):.0f} to {max(loads):.0f};\n"
        "activations in int8, weights not in the cache: `benchmarks/bench_sparse_matmul.py`.\n"
    )
    records = {(row["variant"], row["m"]): row for row in results["records"]}
    heights = sorted({m for _, m in records})
    rows = []
    for variant in dict.fromkeys(name for name, _ in records):
        isa, _, rest = variant.partition("-")
        name = f"{SPARSE_NAMES[rest]}, {ISAS[isa]}" if isa in ISAS else SPARSE_NAMES[variant]
        speeds = [f"{records[variant, m]['over_fp32']:.2f}" for m in heights]
        rows.append([name, f"{records[variant, 1]['bits_per_weight']:.2f}", *speeds])
    columns = ("weight", "bits", *(f"{m} row" + "s" * (m > 1) for m in heights))
    yield markdown(columns, rows)


def experts() -> Iterator[str]:
    """Time and memory of a layer of which a token chooses some experts."""
    results = read("experts")
    count, (width, inner) = results["experts"], results["widths"]
    yield (
        f"A layer of {count} experts, {width} to {inner} and back, for one token: processor time\n"
        f"of one thread of an {results['cpu']} in turns, against Gather and MatMul of ONNX\n"
        "Runtime, and what a session takes (`benchmarks/bench_experts.py`). Without the library,\n"
        "chosen experts are decoded at every run.\n"
    )
    found: dict[str, list[Any]] = {}
    for row in results["rows"]:
        name = row["form"]
        found.setdefault(name, [f"{row['file'] / 1e6:.1f} MB", f"{row['memory'] / 1e6:.0f} MB"])
        found[name].append(f"{row['ms']:.2f} ms ({row['faster']:.2f}x)")
    chosen = dict.fromkeys(row["chosen"] for row in results["rows"])
    columns = ("weights", "file", "session", *(f"{n} of {count}" for n in chosen))
    yield markdown(columns, [[name, *cells] for name, cells in found.items()])
