"""HyperMatMul against what ONNX Runtime has for the same product, interleaved in one process.

Every variant is a graph of one or more independent products with random weights of their own. For
few rows of activations the graph holds so many that no cache can keep them, as in a real model
(`--cold-mb`); for many rows it holds one. All variants take turns; the figure is the median of the
CPU time of a run divided by the number of products. One thread: CPU time of the calling thread.
`--threads 1,2` adds sessions of two threads: CPU time of the process, without spinning. For weights
that no cache holds it also says which share of the speed of reading memory they reach: bytes of the
weight over what as many threads read that do nothing else, both by CPU time of a thread.

A run replaces the records it makes again and keeps the others, so that long series can be split;
the README's figures are those of

    bench_matmul.py --shapes 768x3072          and 4096x4096, and 4096x11008; then each with
    bench_matmul.py --threads 1,2 --rows 1,128 --only nbits4-b128,hyper-k4-L7 --shapes ...

of two to six minutes each on one core. Structured tables have a file of their own. Our kernels are
kept to AVX2 there, while those of ONNX Runtime take what the machine has:

    bench_matmul.py --shapes 4096x4096 --rows 1,2,4,8,16,128 --cold-mb 60 --only nbits4-b128,
        dynamic,avx2-hyper-k4-L7-int8,avx2-hyper-k3-L7,avx2-hyper-k2-L7,hyper-k4-L7-int8,
        hyper-k3-L7-int8,hyper-k2-L7-int8,avx2-hyper-k4-structured-exact and every
        (avx2-|avx2vnni-|)hyper-k(4|3|2)-structured-int8 --out benchmarks/results/matmul_avx2.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from read_speed import Reader

from onnxcomp.ops import register
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.structured import state_bits_of
from onnxcomp.runtime.machine import can_run

RESULTS = Path(__file__).parent / "results"
BEST_ISA = os.environ.get("ONNXCOMP_ISA", "")  # the best one where it is empty
Array = np.ndarray[Any, Any]


class Product(NamedTuple):
    """Nodes and initializers of one product ``y{i} = x W``."""

    nodes: list[onnx.NodeProto]
    tensors: dict[str, Array]


Maker = Callable[[np.random.Generator, int, int, int], Product]


class Variant(NamedTuple):
    """A way to make a product, and the instruction set of our kernels ("" for the best one)."""

    make: Maker
    isa: str = ""


def float_product(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
    """MatMul in float32."""
    weight = rng.standard_normal((length, rows), np.float32)
    return Product([helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"])], {f"w{i}": weight})


def nbits_product(bits: int, block: int) -> Maker:
    """MatMulNBits, accuracy level 4 (int8 activations)."""

    def make(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
        blocks = length // block
        codes = rng.integers(0, 256, (rows, blocks, block * bits // 8), np.uint8)
        scales = rng.random(rows * blocks, np.float32)
        node = helper.make_node(
            "MatMulNBits",
            ["x", f"w{i}", f"s{i}"],
            [f"y{i}"],
            domain="com.microsoft",
            K=length,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=4,
        )
        return Product([node], {f"w{i}": codes, f"s{i}": scales})

    return make


def dynamic_product(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
    """DynamicQuantizeLinear and MatMulInteger, the form that quantize_dynamic writes."""
    tensors = {
        f"w{i}": rng.integers(-127, 128, (length, rows)).astype(np.int8),
        f"z{i}": np.zeros((), np.int8),
        f"s{i}": np.float32(0.01).reshape(()),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], [f"q{i}", f"a{i}", f"b{i}"]),
        helper.make_node("MatMulInteger", [f"q{i}", f"w{i}", f"b{i}", f"z{i}"], [f"m{i}"]),
        helper.make_node("Cast", [f"m{i}"], [f"c{i}"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"a{i}", f"s{i}"], [f"t{i}"]),
        helper.make_node("Mul", [f"c{i}", f"t{i}"], [f"y{i}"]),
    ]
    return Product(nodes, tensors)


def hyper_product(
    bits: int, states: int, group: int, precision: int, kind: str = "winding"
) -> Maker:
    """HyperMatMul on random codes."""

    def make(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
        states_here = state_bits_of(bits, states, kind)
        geometry = hyper_format.GroupLayout(bits, states_here, group, rows, length)
        shared = hyper_format.shared_tensors(bits, states_here, group, rows, length, kind)
        names = hyper_format.NODE_INPUTS
        tensors = {f"s{i}": rng.random(geometry.scales_shape).astype(np.float16)}
        tensors |= dict(zip(names[2:], shared.values(), strict=True))
        tensors[f"w{i}"] = rng.integers(0, 256, geometry.codes_shape, np.uint8)
        node = helper.make_node(
            "HyperMatMul",
            ["x", f"w{i}", f"s{i}", *names[2:]],
            [f"y{i}"],
            domain="com.onnxcomp",
            extent=[rows, length],
            group=group,
            dtype=TensorProto.FLOAT,
            precision=precision,
        )
        return Product([node], tensors)

    return make


def variants(wanted: str) -> dict[str, Variant]:
    """Variants by name that run here; `wanted`: beginnings of names with commas, or empty."""
    result = {
        "fp32": Variant(float_product),
        "nbits4-b128": Variant(nbits_product(4, 128)),
        "nbits4-b32": Variant(nbits_product(4, 32)),
        "nbits2-b128": Variant(nbits_product(2, 128)),
        "dynamic-int8": Variant(dynamic_product),
        "hyper-k4-L7-int8": Variant(hyper_product(4, 7, 128, 1)),
        "hyper-k3-L7-int8": Variant(hyper_product(3, 7, 128, 1)),
        "hyper-k2-L7-int8": Variant(hyper_product(2, 7, 128, 1)),
        "hyper-k2-L6-int8": Variant(hyper_product(2, 6, 128, 1)),
        "hyper-k4-L12-int8": Variant(hyper_product(4, 12, 128, 1)),
        "hyper-k2-L12-int8": Variant(hyper_product(2, 12, 128, 1)),
        "hyper-k4-L7-exact": Variant(hyper_product(4, 7, 128, 0)),
        "hyper-k2-L7-exact": Variant(hyper_product(2, 7, 128, 0)),
        "avx2-hyper-k4-L7-int8": Variant(hyper_product(4, 7, 128, 1), "avx2"),
        "avx2-hyper-k3-L7-int8": Variant(hyper_product(3, 7, 128, 1), "avx2"),
        "avx2-hyper-k2-L7-int8": Variant(hyper_product(2, 7, 128, 1), "avx2"),
        "avx2-hyper-k4-L12-int8": Variant(hyper_product(4, 12, 128, 1), "avx2"),
        "avx2-hyper-k4-L7-exact": Variant(hyper_product(4, 7, 128, 0), "avx2"),
    }
    for isa in ("", "avx2", "avx2vnni"):
        for bits in (4, 3, 2):
            name = "-".join(filter(None, (isa, f"hyper-k{bits}-structured")))
            for precision, word in ((1, "int8"), (0, "exact")):
                product = hyper_product(bits, 7, 128, precision, "structured")
                result[f"{name}-{word}"] = Variant(product, isa)
    kept = [name for name in wanted.split(",") if name]
    return {
        name: variant
        for name, variant in result.items()
        if not kept or name == "fp32" or any(name.startswith(part) for part in kept)
        if not variant.isa or can_run(variant.isa)
    }


def build(make: Maker, length: int, rows: int, cold_bytes: int) -> tuple[onnx.ModelProto, int, int]:
    """A graph of enough products to exceed `cold_bytes`: model, products, bytes of one weight."""
    rng = np.random.default_rng(length * 31 + rows)
    products: list[Product] = []
    size = 0
    while not products or len(products) * size < cold_bytes:
        products.append(make(rng, len(products), length, rows))
        own = [array for name, array in products[-1].tensors.items() if name[-1].isdigit()]
        size = sum(array.nbytes for array in own)
    return assemble(products, length), len(products), size


def assemble(products: Sequence[Product], length: int) -> onnx.ModelProto:
    """A graph of products of one input; tensors of one name are one tensor."""
    tensors = {name: array for product in products for name, array in product.tensors.items()}
    graph = helper.make_graph(
        [node for product in products for node in product.nodes],
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, length])],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None)
            for i in range(len(products))
        ],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    domains = ("", "com.microsoft", "com.onnxcomp")
    opsets = [helper.make_opsetid(name, 17 if name == "" else 1) for name in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def open_session(model: onnx.ModelProto, threads: int, mapped: bool, isa: str = "") -> Any:
    """A session on the model; `mapped` keeps weights in an external file, memory-mapped."""
    import onnxruntime

    os.environ["ONNXCOMP_ISA"] = isa or BEST_ISA
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    register(options)
    providers = ["CPUExecutionProvider"]
    if not mapped:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.onnx")
        onnx.save(model, path, save_as_external_data=True, size_threshold=65536)
        return onnxruntime.InferenceSession(path, options, providers=providers)


class Bench(NamedTuple):
    """One variant, ready to run."""

    session: Any
    products: int
    weight_bytes: int
    isa: str


Benches = dict[tuple[str, int], Bench]  # by name of the variant and threads


def interleave(benches: Benches, feeds: Mapping[str, Array], repeats: int) -> dict[Any, float]:
    """Median CPU seconds of one product for every variant, all taking turns."""
    alone = all(threads == 1 for _, threads in benches)
    clock = time.thread_time if alone else time.process_time
    times: dict[tuple[str, int], list[float]] = {key: [] for key in benches}
    for turn in range(repeats + 1):
        for key, bench in benches.items():
            start = clock()
            bench.session.run(None, feeds)
            if turn > 0:
                times[key].append((clock() - start) / bench.products)
    return {key: statistics.median(values) for key, values in times.items()}


def open_benches(options: argparse.Namespace, length: int, rows: int, budget: int) -> Benches:
    """Sessions of all variants and numbers of threads for one shape."""
    benches: Benches = {}
    for name, variant in variants(options.only).items():
        model, count, size = build(variant.make, length, rows, budget)
        for threads in options.threads:
            session = open_session(model, threads, options.mapped, variant.isa)
            benches[name, threads] = Bench(session, count, size, variant.isa or BEST_ISA or "auto")
    return benches


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each variant, shape, number of rows and number of threads."""
    for shape in options.shapes.split(","):
        length, rows = (int(size) for size in shape.split("x"))
        for cold in (True, False):
            batches = [m for m in options.rows if (m <= options.cold_rows) == cold]
            if not batches:
                continue
            benches = open_benches(options, length, rows, int(options.cold_mb * 1e6 * cold))
            for m in batches:
                facts = {"length": length, "rows": rows, "m": m, "cold": cold}
                yield from measure_batch(options, benches, facts)


def read_speeds(options: argparse.Namespace, cold: bool) -> dict[int, float]:
    """Bytes per second that threads read from memory, by their number, where that is the roof."""
    if len(options.threads) == 1 or not cold:
        return {}
    readers = {threads: Reader(threads) for threads in options.threads}
    passes = {
        threads: [reader.bytes_per_second() for _ in range(options.repeats)]
        for threads, reader in readers.items()
    }
    return {threads: statistics.median(found) for threads, found in passes.items()}


def measure_batch(
    options: argparse.Namespace, benches: Benches, facts: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Records of one shape and one number of rows."""
    length, rows, m = facts["length"], facts["rows"], facts["m"]
    x = np.random.default_rng(m).standard_normal((m, length), np.float32)
    reads = read_speeds(options, facts["cold"])
    times = interleave(benches, {"x": x}, options.repeats)
    for (name, threads), seconds in times.items():
        dynamic = times.get(("dynamic-int8", threads))
        bench = benches[name, threads]
        nbits4 = times.get(("nbits4-b128", threads))
        yield {
            "variant": name,
            **facts,
            "threads": threads,
            "isa": bench.isa,
            "mapped": options.mapped,
            "load_average": round(os.getloadavg()[0], 1),
            "weight_bytes": bench.weight_bytes,
            "us": seconds * 1e6,
            "gigaweights_per_s": length * rows / seconds / 1e9,
            "gigabytes_per_s": bench.weight_bytes / seconds / 1e9,
            "over_fp32": times["fp32", threads] / seconds,
            "over_nbits4": None if nbits4 is None else nbits4 / seconds,
            "over_dynamic": None if dynamic is None else dynamic / seconds,
            # Two threads in one process: what they cost together, in times of one thread.
            "of_one_thread": None if len(options.threads) == 1 else seconds / times[name, 1],
            # By one thread's time: what both read together while they run side by side.
            "of_read_speed": None
            if threads not in reads
            else round(bench.weight_bytes * threads / seconds / reads[threads], 4),
        }


def show(record: Mapping[str, Any]) -> None:
    """Print one line of the table."""
    over, share = record["over_nbits4"], record["of_one_thread"]
    read = record["of_read_speed"]
    shape = f"{record['length']}x{record['rows']}"
    print(
        f"{shape:>11} M={record['m']:<4}{'cold' if record['cold'] else 'warm'} "
        f"{record['threads']}T {record['variant']:<23}{record['us']:10.1f} us "
        f"{record['gigaweights_per_s']:7.2f} Gw/s {record['gigabytes_per_s']:6.1f} GB/s "
        f"{record['over_fp32']:6.2f}x fp32 "
        f"{'' if over is None else f'{over:6.2f}x nbits4'}"
        f"{'' if share is None else f'{share:6.2f} of one thread'}"
        f"{'' if read is None else f'{read:6.2f} of the speed of reading'}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", default="768x3072,4096x4096,4096x11008", help="length x rows, ..."
    )
    parser.add_argument("--rows", default="1,4,16,128,512", help="rows of activations, ...")
    parser.add_argument("--only", default="", help="beginnings of variant names, ...")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", default="1", help="threads of a session, ...; 1 among them")
    parser.add_argument("--cold-mb", type=float, default=100, help="weights of one variant, MB")
    parser.add_argument("--cold-rows", type=int, default=16, help="cold up to this many rows")
    parser.add_argument("--mapped", action="store_true", help="weights in memory-mapped files")
    parser.add_argument("--out", type=Path, default=RESULTS / "matmul.json")
    options = parser.parse_args(arguments)
    options.rows = [int(m) for m in options.rows.split(",")]
    options.threads = sorted({int(threads) for threads in options.threads.split(",")} | {1})
    return options


def cpu_name() -> str:
    """Model name and family of the processor where the system tells, else the architecture."""
    found = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    text = f"{name} family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    masked = os.environ.get("ONNXCOMP_MASKED")  # set by mask_cpuid/masked.py
    return f"{text} with {masked}" if masked else text


def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a record is about; threads of a run change the clock, hence `of_one_thread`."""
    names = ("variant", "length", "rows", "m", "threads", "isa", "mapped")
    return (*(record[name] for name in names), record["of_one_thread"] is None)


def merged(path: Path, machine: Mapping[str, Any], records: Iterable[Any]) -> dict[str, Any]:
    """The records of a file of the same machine, with `records` in place of those they repeat."""
    known = {}
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
        if all(document.get(name) == value for name, value in machine.items()):
            known = {key(record): record for record in document["records"]}
    known |= {key(record): record for record in records}
    return {**machine, "records": list(known.values())}


class Bar(NamedTuple):
    """A goal for one figure of one variant: at least, or at most for shares of threads."""

    variant: str
    m: int
    figure: str
    must: float


# What the project set out with for a weight of 4096x4096, by rows of activations.
INT8 = ("hyper-k4-L7-int8", "hyper-k3-L7-int8", "hyper-k2-L7-int8", "hyper-k2-L6-int8")
BARS = (
    Bar("hyper-k4-L7-int8", 1, "over_fp32", 8),
    Bar("hyper-k4-L7-int8", 1, "over_nbits4", 1.15),
    Bar("hyper-k3-L7-int8", 1, "over_fp32", 10),
    Bar("hyper-k2-L7-int8", 1, "over_fp32", 11),
    Bar("hyper-k2-L6-int8", 1, "over_fp32", 11),
    *(Bar(name, 16, "over_fp32", 3.2) for name in INT8),
    *(Bar(name, 16, "over_nbits4", 1.25) for name in INT8),
    *(Bar(name, 128, "over_fp32", 3.4) for name in INT8),
    *(Bar(name, 128, "over_nbits4", 1.7) for name in INT8),
    Bar("hyper-k4-L7-exact", 1, "over_fp32", 3.5),
    Bar("hyper-k4-L7-exact", 128, "over_fp32", 1.0),
    Bar("avx2-hyper-k4-L7-int8", 1, "over_fp32", 2.5),
    Bar("avx2-hyper-k4-structured-int8", 1, "over_fp32", 5.8),
    Bar("avx2-hyper-k4-structured-int8", 1, "over_nbits4", 1.2),
    Bar("avx2-hyper-k3-structured-int8", 1, "over_fp32", 4.6),
    Bar("avx2-hyper-k2-structured-int8", 1, "over_fp32", 5.8),
    Bar("avx2-hyper-k4-structured-int8", 16, "over_fp32", 2.4),
    Bar("avx2-hyper-k4-structured-int8", 16, "over_dynamic", 1.1),
    Bar("avx2-hyper-k4-structured-int8", 128, "over_fp32", 2.0),
    Bar("avx2-hyper-k4-structured-int8", 128, "over_dynamic", 1.0),
    Bar("avx2-hyper-k4-structured-int8", 1, "of_read_speed", 0.6),
    Bar("hyper-k4-L7-int8", 1, "of_one_thread", 1.25),
    Bar("hyper-k4-L7-int8", 128, "of_one_thread", 1.05),
)


def judged(records: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Every bar whose figure is among the records, and whether it is met."""
    square = [record for record in records if record["length"] == record["rows"] == 4096]
    for bar in BARS:
        threads = 2 if bar.figure in ("of_one_thread", "of_read_speed") else 1
        for record in square:
            found = record.get(bar.figure)
            about = (record["variant"], record["m"], record["threads"])
            alone = record["of_one_thread"] is None
            if about != (bar.variant, bar.m, threads) or alone != (threads == 1) or found is None:
                continue
            met = found <= bar.must if bar.figure == "of_one_thread" else found >= bar.must
            what = f"{bar.variant} {bar.figure.replace('_', ' ')} at M={bar.m}"
            yield {"what": what, "found": round(found, 3), "must": bar.must, "met": met}


def main() -> None:
    import onnxruntime

    options = parse()
    records = []
    for record in measure(options):
        show(record)
        records.append(record)
    machine = {"onnxruntime": onnxruntime.__version__, "cpu": cpu_name()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = merged(options.out, machine, records)
    document["bars"] = list(judged(document["records"]))
    for bar in document["bars"]:
        print(
            "met   " if bar["met"] else "MISSED", f"{bar['what']}: {bar['found']} of {bar['must']}"
        )
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
