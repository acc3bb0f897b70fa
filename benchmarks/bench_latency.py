"""Whole models: what they take as they are, as ONNX Runtime's integers, and as our codes.

    bench_latency.py FOLDER [--only minilm,smollm2] [--threads 1,2] [--out NAME]
    mask_cpuid/masked.py bench_latency.py FOLDER --out latency_avx2

FOLDER keeps the forms of the models, so that a second run, of another instruction set, measures the
same files. MiniLM is looked for in ONNXCOMP_MINILM, SmolLM2-135M in ONNXCOMP_SMOLLM2, others in
ONNXCOMP_DATA; those that are not there are left out. ViT-S/16 and the encoder of Whisper base have
random weights. Inputs are made up: time does not depend on them.

Every form has a process of its own, and all take turns. With one thread the figure is processor
time, with two the time by the clock: the best tenth, since other programs run as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import latency_models
import numpy as np
from bench_matmul import cpu_name
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.errors import CompressionError
from onnxcomp.passes.driver.rivals import DYNAMIC, block_integers, dynamic_integers
from onnxcomp.runtime.bench import bench
from onnxcomp.runtime.machine import current_isa, look

Feed = dict[str, np.ndarray]
AS_FAST = "onnxcomp, 4 bits, --max-slowdown 1"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with one shape of inputs."""

    model: str
    shape: str
    feed: Callable[[], Feed]


def sentences(batch: int, length: int) -> Feed:
    """Tokens of a sentence encoder."""
    ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones((batch, length), np.int64)}


def tokens(count: int, past: int) -> Feed:
    """Tokens of SmolLM2-135M behind a context."""
    rng = np.random.default_rng(0)
    feed: Feed = {
        "input_ids": rng.integers(0, 49000, (1, count)),
        "attention_mask": np.ones((1, past + count), np.int64),
        "position_ids": np.arange(past, past + count)[None],
    }
    for layer in range(30):
        for part in ("key", "value"):
            cache = rng.standard_normal((1, 3, past, 64), np.float32)
            feed[f"past_key_values.{layer}.{part}"] = cache
    return feed


def normal(name: str, *shape: int) -> Feed:
    """One input of normal values."""
    return {name: np.random.default_rng(0).standard_normal(shape, np.float32)}


def speech() -> Feed:
    """A frame of a speech detector."""
    state = {"state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    return {**normal("input", 1, 576), **state}


CASES = (
    *(
        Case("minilm", f"{batch}x{length}", functools.partial(sentences, batch, length))
        for batch, length in ((1, 8), (1, 32), (1, 128), (8, 64), (32, 128))
    ),
    Case("smollm2", "decode, context 64", functools.partial(tokens, 1, 64)),
    Case("smollm2", "prompt of 128", functools.partial(tokens, 128, 0)),
    Case("vit-s16", "1x3x224x224", functools.partial(normal, "x", 1, 3, 224, 224)),
    Case("whisper-base-encoder", "1x80x3000", functools.partial(normal, "x", 1, 80, 3000)),
    Case("resnet20", "1x3x32x32", functools.partial(normal, "input", 1, 3, 32, 32)),
    Case("mobilenetv2", "1x3x224x224", functools.partial(normal, "input", 1, 3, 224, 224)),
    Case("silero-vad", "1x576", speech),
)

# The case that a form for speed is made for: the middle one.
TYPICAL = {"minilm": "1x32", "smollm2": "decode, context 64"}


def originals(folder: Path) -> dict[str, Path]:
    """Dense models that are here."""
    data = Path(os.environ.get("ONNXCOMP_DATA", "../shared/data")) / "models"
    found = {
        "minilm": Path(os.environ.get("ONNXCOMP_MINILM", "-")),
        "smollm2": Path(os.environ.get("ONNXCOMP_SMOLLM2", "-")) / "model.onnx",
        "vit-s16": folder / "vit-s16.onnx",
        "whisper-base-encoder": folder / "whisper-base-encoder.onnx",
        "resnet20": data / "resnet20_cifar10.onnx",
        "mobilenetv2": data / "mobilenetv2_224_tf2ptq_fp32.onnx",
        "silero-vad": data / "silero_vad_16k_op15.onnx",
    }
    makers = {
        "vit-s16": latency_models.vision_encoder,
        "whisper-base-encoder": latency_models.whisper_encoder,
    }
    for name, make in makers.items():
        if not found[name].exists():
            make(found[name])
    return {name: path for name, path in found.items() if path.exists()}


def compress(model: Path, path: Path, **options: Any) -> None:
    """Our codes, without a check: what is measured is time."""
    onnxcomp.optimize(model, path, verify=False, calibration="off", **options)


def makers(name: str) -> Iterator[tuple[str, str, Callable[[Path, Path], None]]]:
    """Names of forms, parts of their file names, and what writes them."""
    yield DYNAMIC, "dynamic", dynamic_integers
    for bits in (4, 8):
        yield f"MatMulNBits int{bits}", f"nbits{bits}", functools.partial(block_integers, bits=bits)
    for bits in (4, 3, 2):
        for target, kind in (("any", "winding"), ("avx2", "structured")):
            make = functools.partial(compress, bits=bits, target=target)
            yield f"onnxcomp, {bits} bits, {kind}", f"k{bits}-{kind}", make
    isa = current_isa(look())
    cases = [case for case in CASES if case.model == name]
    typical = next((c for c in cases if c.shape == TYPICAL.get(name)), cases[0])
    target = "avx2" if isa.startswith("avx2") else "any"
    make = functools.partial(
        compress, bits=4, target=target, max_slowdown=1.0, data=[typical.feed()], force=True
    )
    yield AS_FAST, f"k4-as-fast-{isa}", make


def forms(name: str, dense: Path, folder: Path) -> dict[str, Path]:
    """Files of all forms of a model by name; those that cannot be made are left out."""
    found = {"float32": dense}
    for form, part, make in makers(name):
        path = folder / f"{name}.{part}.onnx"
        if not path.exists():
            print(f"making {path.name}", flush=True)
            try:
                make(dense, path)
            except (CompressionError, ImportError, RuntimeError, ValueError) as error:
                print(f"left out: {name}, {form}: {error}", flush=True)
                continue
        found[form] = path
    return found


def measure(case: Case, files: Mapping[str, Path], threads: int, seconds: float) -> dict[str, Any]:
    """One record: every form's figures."""
    document = bench(list(files.values()), data=[case.feed()], threads=threads, seconds=seconds)
    rows = dict(zip(files, document["models"], strict=True))
    key = "cpu_ms" if threads == 1 else "p10_ms"
    dense = rows["float32"][key]
    kept = ("load_ms", "median_ms", "p10_ms", "cpu_ms", "rss_bytes", "peak_rss_bytes", "file_bytes")
    return {
        "model": case.model,
        "shape": case.shape,
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
        "forms": {
            name: {k: row[k] for k in kept} | {"over_float32": round(dense / row[key], 4)}
            for name, row in rows.items()
        },
    }


# What is to be reached on a machine with AVX2 only, against float32.
BARS = {
    ("minilm", "1x8"): 2.0,
    ("minilm", "1x32"): 1.9,
    ("minilm", "1x128"): 1.6,
    ("minilm", "8x64"): 1.6,
    ("smollm2", "decode, context 64"): 3.0,
}


def judged(records: Sequence[Mapping[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    """Every goal whose figure was measured, and whether it is met."""
    for record in records:
        must = BARS.get((record["model"], record["shape"]))
        form = record["forms"].get(f"onnxcomp, 4 bits, {kind}")
        if must is None or form is None or record["threads"] != 1:
            continue
        found = form["over_float32"]
        what = f"{record['model']} {record['shape']}, 4 bits, over float32"
        yield {"what": what, "found": found, "must": must, "met": found >= must}
        rival = record["forms"].get("MatMulNBits int4" if record["model"] == "smollm2" else DYNAMIC)
        if rival is not None:
            ratio = round(found / rival["over_float32"], 4)
            must = 1.3 if record["model"] == "smollm2" else 1.0
            name = "MatMulNBits int4" if record["model"] == "smollm2" else "dynamic int8"
            what = f"{record['model']} {record['shape']}, 4 bits, over {name}"
            yield {"what": what, "found": ratio, "must": must, "met": ratio >= must}


def merged(path: Path, machine: Mapping[str, Any], records: Sequence[Any]) -> list[Any]:
    """Records of a file of the same machine, with the new ones in place of those they repeat."""
    known = {}
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
        if all(document.get(name) == value for name, value in machine.items()):
            known = {(r["model"], r["shape"], r["threads"]): r for r in document["records"]}
    known |= {(r["model"], r["shape"], r["threads"]): r for r in records}
    order = [(case.model, case.shape) for case in CASES]
    return sorted(
        known.values(), key=lambda r: (order.index((r["model"], r["shape"])), r["threads"])
    )


def show(record: Mapping[str, Any]) -> None:
    """Print one record."""
    print(f"\n{record['model']} {record['shape']}, {record['threads']} threads, "
          f"load {record['load_average']}")  # fmt: skip
    rows = [
        (name, f"{form['cpu_ms']:.3f}", f"{form['p10_ms']:.3f}", f"{form['over_float32']:.2f}",
         f"{form['rss_bytes'] / 1e6:.0f}", f"{form['file_bytes'] / 1e6:.1f}")
        for name, form in record["forms"].items()
    ]  # fmt: skip
    print_table(("form", "CPU ms", "wall ms", "x float32", "RSS MB", "file MB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="models, ...")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each form")
    parser.add_argument("--out", default="latency_avx512", help="name of the result file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in options.only.split(",") if name]
    isa = current_isa(look())
    machine = {"cpu": cpu_name(), "isa": isa}
    for name, dense in originals(options.folder).items():
        if wanted and name not in wanted:
            continue
        files = forms(name, dense, options.folder)
        for case in (case for case in CASES if case.model == name):
            for threads in map(int, options.threads.split(",")):
                record = measure(case, files, threads, options.seconds)
                show(record)
                path = RESULTS / f"{options.out}.json"
                records = merged(path, machine, [record])
                kind = "structured" if isa.startswith("avx2") else "winding"
                bars = list(judged(records, kind))
                write_results(options.out, {**machine, "records": records, "bars": bars})


if __name__ == "__main__":
    main()
