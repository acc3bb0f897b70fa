"""HyperMatMul against what ONNX Runtime has for the same product, interleaved in one process.

Every variant is a graph of one or more independent products with random weights of their own. For
few rows of activations the graph holds so many that no cache can keep them, as in a real model
(`--cold-mb`); for many rows it holds one. All variants take turns; the figure is the median of the
CPU time of a run divided by the number of products. One thread: CPU time of the calling thread.
More threads: CPU time of the process, without spinning.

    python benchmarks/bench_matmul.py --shapes 4096x4096,768x3072 --rows 1,4,16,128
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.ops import register
from onnxcomp.passes.codecs import hyper_format

RESULTS = Path(__file__).parent / "results"
Array = np.ndarray[Any, Any]


class Product(NamedTuple):
    """Nodes and initializers of one product ``y{i} = x W``."""

    nodes: list[onnx.NodeProto]
    tensors: dict[str, Array]


Maker = Callable[[np.random.Generator, int, int, int], Product]


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


def hyper_product(bits: int, states: int, group: int, precision: int) -> Maker:
    """HyperMatMul on random codes."""

    def make(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
        geometry = hyper_format.Geometry(bits, states, group, rows, length)
        shared = hyper_format.shared_tensors(bits, states, group, rows, length)
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


def variants(wanted: str) -> dict[str, Maker]:
    """Variants by name; `wanted` is a comma-separated list of beginnings of names, or empty."""
    result: dict[str, Maker] = {
        "fp32": float_product,
        "nbits4-b128": nbits_product(4, 128),
        "nbits4-b32": nbits_product(4, 32),
        "nbits2-b128": nbits_product(2, 128),
        "dynamic-int8": dynamic_product,
        "hyper-k4-L7-int8": hyper_product(4, 7, 128, 1),
        "hyper-k3-L7-int8": hyper_product(3, 7, 128, 1),
        "hyper-k2-L7-int8": hyper_product(2, 7, 128, 1),
        "hyper-k2-L6-int8": hyper_product(2, 6, 128, 1),
        "hyper-k4-L12-int8": hyper_product(4, 12, 128, 1),
        "hyper-k4-L7-exact": hyper_product(4, 7, 128, 0),
        "hyper-k2-L7-exact": hyper_product(2, 7, 128, 0),
    }
    kept = [name for name in wanted.split(",") if name]
    return {
        name: make
        for name, make in result.items()
        if not kept or name == "fp32" or any(name.startswith(part) for part in kept)
    }


def build(make: Maker, length: int, rows: int, cold_bytes: int) -> tuple[onnx.ModelProto, int, int]:
    """A graph of enough products to exceed `cold_bytes`: model, products, bytes of one weight."""
    rng = np.random.default_rng(length * 31 + rows)
    nodes: list[onnx.NodeProto] = []
    tensors: dict[str, Array] = {}
    count = size = 0
    while count == 0 or count * size < cold_bytes:
        product = make(rng, count, length, rows)
        nodes += product.nodes
        tensors |= product.tensors
        own = [array for name, array in product.tensors.items() if name[-1].isdigit()]
        size = sum(array.nbytes for array in own)
        count += 1
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, length])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(count)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    domains = ("", "com.microsoft", "com.onnxcomp")
    opsets = [helper.make_opsetid(name, 17 if name == "" else 1) for name in domains]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), count, size


def open_session(model: onnx.ModelProto, threads: int, mapped: bool) -> Any:
    """A session on the model; `mapped` keeps weights in an external file, memory-mapped."""
    import onnxruntime

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


def run_once(bench: Bench, feeds: Mapping[str, Array], threads: int) -> float:
    """CPU seconds of one product."""
    clock = time.thread_time if threads == 1 else time.process_time
    start = clock()
    bench.session.run(None, feeds)
    return (clock() - start) / bench.products


def interleave(
    benches: Mapping[str, Bench], feeds: Mapping[str, Array], repeats: int, threads: int
) -> dict[str, float]:
    """Median CPU seconds of one product for every variant, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in benches}
    for turn in range(repeats + 1):
        for name, bench in benches.items():
            seconds = run_once(bench, feeds, threads)
            if turn > 0:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each variant, shape and number of rows."""
    for shape in options.shapes.split(","):
        length, rows = (int(size) for size in shape.split("x"))
        for cold in (True, False):
            batches = [m for m in options.rows if (m <= options.cold_rows) == cold]
            if not batches:
                continue
            budget = int(options.cold_mb * 1e6) if cold else 0
            benches = {}
            for name, make in variants(options.only).items():
                model, count, size = build(make, length, rows, budget)
                session = open_session(model, options.threads, options.mapped)
                benches[name] = Bench(session, count, size)
            for m in batches:
                yield from measure_batch(options, benches, length, rows, m, cold)


def measure_batch(
    options: argparse.Namespace,
    benches: Mapping[str, Bench],
    length: int,
    rows: int,
    m: int,
    cold: bool,
) -> Iterator[dict[str, Any]]:
    """Records of one shape and one number of rows."""
    x = np.random.default_rng(m).standard_normal((m, length), np.float32)
    times = interleave(benches, {"x": x}, options.repeats, options.threads)
    for name, seconds in times.items():
        yield {
            "variant": name,
            "length": length,
            "rows": rows,
            "m": m,
            "cold": cold,
            "weight_bytes": benches[name].weight_bytes,
            "us": seconds * 1e6,
            "gigaweights_per_s": length * rows / seconds / 1e9,
            "gigabytes_per_s": benches[name].weight_bytes / seconds / 1e9,
            "over_fp32": times["fp32"] / seconds,
            "over_nbits4": times["nbits4-b128"] / seconds if "nbits4-b128" in times else None,
        }


def show(record: Mapping[str, Any]) -> None:
    """Print one line of the table."""
    over = record["over_nbits4"]
    shape = f"{record['length']}x{record['rows']}"
    print(
        f"{shape:>11} M={record['m']:<4}{'cold' if record['cold'] else 'warm'} "
        f"{record['variant']:<18}{record['us']:10.1f} us {record['gigaweights_per_s']:7.2f} Gw/s "
        f"{record['gigabytes_per_s']:6.1f} GB/s {record['over_fp32']:6.2f}x fp32 "
        f"{'' if over is None else f'{over:6.2f}x nbits4'}",
        flush=True,
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,768x3072", help="length x rows, ...")
    parser.add_argument("--rows", default="1,4,16,128", help="rows of activations, ...")
    parser.add_argument("--only", default="", help="beginnings of variant names, ...")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cold-mb", type=float, default=100, help="weights of one variant, MB")
    parser.add_argument("--cold-rows", type=int, default=16, help="cold up to this many rows")
    parser.add_argument("--mapped", action="store_true", help="weights in memory-mapped files")
    parser.add_argument("--out", type=Path, default=RESULTS / "matmul.json")
    options = parser.parse_args(arguments)
    options.rows = [int(m) for m in options.rows.split(",")]
    return options


def cpu_name() -> str:
    """Model name and family of the processor where the system tells, else the architecture."""
    found = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", platform.machine())
    return f"{name} family {found.get('cpu family', '?')} model {found.get('model', '?')}"


def main() -> None:
    import onnxruntime

    options = parse()
    records = []
    for record in measure(options):
        show(record)
        records.append(record)
    summary = {
        "onnxruntime": onnxruntime.__version__,
        "cpu": cpu_name(),
        "load_average": os.getloadavg()[0],
        "isa": os.environ.get("ONNXCOMP_ISA", "auto"),
        "threads": options.threads,
        "mapped": options.mapped,
        "records": records,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
