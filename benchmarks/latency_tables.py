"""Tables of what whole models take, one for each class of machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from page_parts import markdown, read

__all__ = ["headline_latency", "merged_products", "planned_for_time", "whole_models"]

# Result files, and the codes for their machines.
CLASSES: Mapping[str, str] = {
    "latency_avx2": "structured",
    "latency_avx2_zen4": "structured",
    "latency_avx512": "winding",
}

MODELS = {
    "minilm": "MiniLM",
    "smollm2": "SmolLM2-135M",
    "vit-s16": "ViT-S/16",
    "whisper-base-encoder": "Whisper base, encoder",
    "resnet20": "ResNet20",
    "mobilenetv2": "MobileNetV2",
    "silero-vad": "Silero VAD",
}

# Headings of forms; what has no column here is in the result files.
FORMS = {
    "ONNX Runtime dynamic int8": "dynamic int8",
    "MatMulNBits int4": "MatMulNBits int4",
    "MatMulNBits int8": "int8 blocks",
    "onnxcomp, 4 bits, winding": "4 bits, winding",
    "onnxcomp, 4 bits, structured": "4 bits, structured",
    "onnxcomp, 3 bits, winding": "3, winding",
    "onnxcomp, 3 bits, structured": "3, structured",
    "onnxcomp, 2 bits, winding": "2, winding",
    "onnxcomp, 2 bits, structured": "2, structured",
    "onnxcomp, 4 bits, --max-slowdown 1": "4, `--max-slowdown 1`",
}

# What the README shows: a model and its inputs.
HEADLINES = (
    ("minilm", "1x8"),
    ("minilm", "1x128"),
    ("smollm2", "decode, context 64"),
    ("smollm2", "prompt of 128"),
    ("vit-s16", "1x3x224x224"),
)


def case_text(record: Mapping[str, Any]) -> str:
    """A model with its inputs."""
    return f"{MODELS[record['model']]}, {record['shape']}"


def speed_text(record: Mapping[str, Any], form: str) -> str:
    """Times as fast as float32; a dash where there is no such form."""
    found = record["forms"].get(form)
    return "-" if found is None else f"{found['over_float32']:.2f}"


def memory_text(record: Mapping[str, Any], form: str) -> str:
    """Resident memory of a process that has run a form."""
    return f"{record['forms'][form]['rss_bytes'] / 1e6:.0f}"


def whole_models() -> Iterator[str]:
    """Speed and memory of whole models on each class of machine."""
    yield (
        "Speed of whole models against float32 in ONNX Runtime (1.00), without calibration:\n"
        "processor time of one thread, or with two the best tenth by the clock. Forms are ONNX\n"
        "Runtime's dynamic int8, MatMulNBits with blocks of 128 and int8 activations (look-ups\n"
        "and a tied head stay dense there), and codes of 4, 3 and 2 bits. ViT and Whisper have\n"
        "random weights of the real shapes; convolutions and recurrent layers are dense while\n"
        "they run:\n"
        "`benchmarks/bench_latency.py`.\n"
    )
    for name in CLASSES:
        results = read(name)
        for threads in (1, 2):
            records = [row for row in results["records"] if row["threads"] == threads]
            if records:
                yield class_text(results, records)
                yield speed_table(records, threads)
        yield memory_table([row for row in results["records"] if row["threads"] == 1])
        missed = [bar for bar in results["bars"] if not bar["met"]]
        texts = [f"{bar['what']}: {bar['found']:.2f} of {bar['must']}" for bar in missed]
        goals = f"Of {len(results['bars'])} goals, set for AVX2, missed: "
        yield f"{goals}{'; '.join(texts) or 'none'}.\n"


def machine_name(results: Mapping[str, Any]) -> str:
    """The processor, and that it has AVX2 only where it was not made so by a mask."""
    real = results["isa"].startswith("avx2") and "masking" not in results["cpu"]
    return f"{results['cpu']}, which has AVX2 only" if real else str(results["cpu"])


def class_text(results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Which machine, and how busy it was."""
    loads = [row["load_average"] for row in records]
    threads = records[0]["threads"]
    unit = "One thread" if threads == 1 else "Two threads"
    return (
        f"{unit} of an {machine_name(results)}, two processors with a load of {min(loads):.0f} to\n"
        f"{max(loads):.0f}; ONNX Runtime {results['environment']['onnxruntime']}.\n"
    )


def speed_table(records: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Speeds of all forms."""
    key = "cpu_ms" if threads == 1 else "p10_ms"
    rows = [
        [
            case_text(row),
            f"{row['forms']['float32'][key]:.3g}",
            *(speed_text(row, form) for form in FORMS),
        ]
        for row in records
    ]
    return markdown(("model and inputs", "float32, ms", *FORMS.values()), rows)


def memory_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Resident memory in MB, once for each model."""
    first = {row["model"]: row for row in reversed(records)}
    forms = ("float32", *list(FORMS)[:2], "onnxcomp, 4 bits, winding", "onnxcomp, 2 bits, winding")
    rows = [
        [MODELS[name], *(memory_text(row, form) if form in row["forms"] else "-" for form in forms)]
        for name, row in reversed(list(first.items()))
    ]
    columns = ("memory of the process, MB", "float32", "dynamic int8", "MatMulNBits int4")
    return markdown((*columns, "4 bits", "2 bits"), rows)


def headline_latency() -> Iterator[str]:
    """A short table for each class of machine."""
    for name, kind in CLASSES.items():
        results = read(name)
        records = {(r["model"], r["shape"]): r for r in results["records"] if r["threads"] == 1}
        ours = [f"onnxcomp, {bits} bits, {kind}" for bits in (4, 2)]
        target = "--target avx2" if kind == "structured" else "the default"
        rows = [
            [
                case_text(records[case]),
                *(speed_text(records[case], form) for form in (*list(FORMS)[:2], *ours)),
            ]
            for case in HEADLINES
            if case in records
        ]
        yield (
            f"Times as fast as float32 on an {machine_name(results)}, one thread\n"
            f"({target}; `benchmarks/bench_latency.py`):\n"
        )
        columns = ("model and inputs", "dynamic int8", "MatMulNBits int4", "4 bits", "2 bits")
        yield markdown(columns, rows)


def planned_for_time() -> Iterator[str]:
    """What `--objective latency` chooses for MiniLM."""
    yield (
        "MiniLM at 4 bits, without calibration, and with `--objective latency`, which chooses for\n"
        "each product between codes, dynamic int8 and the dense weight: times as fast as float32,\n"
        "one thread, and in brackets the relative error of the embeddings on inputs that the plan\n"
        "has not seen. The last column counts the products that became int8\n"
        "(`benchmarks/bench_choice.py`).\n"
    )
    rows = []
    for name in ("choice_avx2", "choice_avx512"):
        for record in read(name)["records"]:
            forms = list(record["forms"].values())[1:]
            chosen = record["chosen"]
            rows.append([
                f"{'AVX2 only' if name.endswith('avx2') else 'AVX-512'}, {record['shape']}",
                *(f"{form['over_float32']:.2f} ({form['error']:.2f})" for form in forms),
                f"{chosen.get('dynamic', 0)} of {sum(chosen.values())}",
            ])  # fmt: skip
    columns = ("machine and inputs", "ONNX Runtime dynamic int8", "4 bits", "for latency", "int8")
    yield markdown(columns, rows)


def merged_products() -> Iterator[str]:
    """What it would gain to make one product of those that share their input."""
    names = {"merge_avx2": "AVX2 only", "merge_avx512": "AVX-512"}
    found = {name: read(name)["records"] for name in names}
    rows = [
        [
            f"{row['case']}, {row['m']} row" + "s" * (row["m"] > 1),
            *(
                f"{r['apart']:.1f} / {r['merged']:.1f}"
                for r in (records[i] for records in found.values())
            ),
        ]
        for i, row in enumerate(found["merge_avx2"])
    ]
    yield (
        "Products that share their input, 4 bits: microseconds apart, and as one product with a\n"
        "Split behind (`benchmarks/bench_merge.py`).\n"
    )
    yield markdown(("products", *names.values()), rows)
    yield (
        "Merging gate and up gains nothing. Merging q, k and v would save\n"
        f"{merge_gains(found)} of a run of the whole model. It is not done: one weight in the\n"
        "place of three would lose the names that rules, plans and `expand` know them by.\n"
    )


# Cases of bench_merge.py by the layers of their model and the case of bench_latency.py.
MERGED = {
    ("SmolLM2 q, k, v", 1): (30, ("smollm2", "decode, context 64")),
    ("MiniLM q, k, v", 32): (6, ("minilm", "1x32")),
    ("MiniLM q, k, v", 128): (6, ("minilm", "1x128")),
}


def merge_gains(found: Mapping[str, Any]) -> str:
    """What whole models would gain by one product for q, k and v: the range over cases."""
    shares = []
    for name, records in found.items():
        latency = read(name.replace("merge", "latency"))
        kind = "structured" if "avx2" in name else "winding"
        times = {
            (r["model"], r["shape"]): r["forms"][f"onnxcomp, 4 bits, {kind}"]["cpu_ms"]
            for r in latency["records"]
            if r["threads"] == 1
        }
        for record in records:
            layers, case = MERGED.get((record["case"], record["m"]), (0, None))
            if layers:
                saved = layers * (record["apart"] - record["merged"]) / 1000
                shares.append(saved / times[case])
    return f"{100 * min(shares):.1f} to {100 * max(shares):.1f} %"
