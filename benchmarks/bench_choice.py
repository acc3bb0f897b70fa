"""What plans for time choose: MiniLM with `--objective latency`, beside the forms they choose from.

    bench_choice.py --out choice_avx512
    mask_cpuid/masked.py bench_choice.py --out choice_avx2

Every plan is made for the inputs that it runs on, at 4 bits for this machine, without calibration.
Processor time of one thread, all forms in turns; errors are those of the sentence embeddings, the
worse of two inputs that the plan has not seen. MiniLM is looked for in ONNXCOMP_MINILM.
"""

from __future__ import annotations

import argparse
import collections
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bench_latency import Feed, sentences
from bench_matmul import cpu_name
from results import print_table, write_results

import onnxcomp
from onnxcomp.ops import register
from onnxcomp.passes.config.values import Target
from onnxcomp.passes.driver.rivals import DYNAMIC, dynamic_integers
from onnxcomp.runtime.bench import bench
from onnxcomp.runtime.machine import current_isa, look, target_of

SHAPES = ((1, 8), (1, 32), (1, 128), (8, 64))


def embeddings(path: Path, feed: Feed) -> np.ndarray:
    """The first output."""
    options = onnxruntime.SessionOptions()
    register(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    given = {"token_type_ids": np.zeros_like(feed["input_ids"]), **feed}
    return np.asarray(session.run(None, {n: a for n, a in given.items() if n in names})[0])


def unseen(batch: int, length: int) -> list[Feed]:
    """Inputs of the same size with other tokens."""
    feeds = [sentences(batch, length) for _ in range(2)]
    for number, feed in enumerate(feeds, 1):
        rng = np.random.default_rng(number)
        feed["input_ids"] = rng.integers(1000, 30000, (batch, length))
    return feeds


def measure(dense: Path, folder: Path, batch: int, length: int, seconds: float) -> dict[str, Any]:
    """One record: speeds and errors of all forms, and what the plan chose."""
    target: Target = target_of(current_isa(look())) or "any"
    feed = sentences(batch, length)
    options: dict[str, Any] = {"bits": 4, "target": target, "verify": False, "calibration": "off"}
    options |= {"cache": folder / "cache", "force": True}
    plain, fast, rival = (folder / f"{name}.onnx" for name in ("plain", "fast", "rival"))
    if not plain.exists():
        onnxcomp.optimize(dense, plain, **options)
        dynamic_integers(dense, rival)
    found = onnxcomp.optimize(dense, fast, objective="latency", data=[feed], **options)
    weights = [site.method for site in found.report.sites if "MatMul" in site.uses]
    files = {"float32": dense, DYNAMIC: rival, "4 bits": plain, "4 bits, for latency": fast}
    document = bench(list(files.values()), data=[feed], threads=1, seconds=seconds)
    times = {name: row["cpu_ms"] for name, row in zip(files, document["models"], strict=True)}
    errors = dict.fromkeys(files, 0.0)
    for other in unseen(batch, length):
        right = embeddings(dense, other)
        for name, path in files.items():
            error = np.linalg.norm(embeddings(path, other) - right) / np.linalg.norm(right)
            errors[name] = max(errors[name], float(error))
    return {
        "shape": f"{batch}x{length}",
        "load_average": round(os.getloadavg()[0], 1),
        "chosen": dict(collections.Counter(weights)),
        "forms": {
            name: {
                "cpu_ms": times[name],
                "over_float32": round(times["float32"] / times[name], 4),
                "error": round(errors[name], 4),
                "file_bytes": path.stat().st_size,
            }
            for name, path in files.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each form")
    parser.add_argument("--out", default="choice_avx512", help="name of the result file")
    options = parser.parse_args()
    dense = Path(os.environ["ONNXCOMP_MINILM"])
    with tempfile.TemporaryDirectory() as folder:
        records = [measure(dense, Path(folder), *shape, options.seconds) for shape in SHAPES]
    rows = [
        (record["shape"], name, f"{form['over_float32']:.2f}", f"{form['error']:.4f}")
        for record in records
        for name, form in record["forms"].items()
    ]
    print_table(("inputs", "form", "x float32", "error"), rows)
    isa = current_isa(look())
    write_results(options.out, {"cpu": cpu_name(), "isa": isa, "records": records})


if __name__ == "__main__":
    main()
