"""Time and memory to load real models: dense, and compressed without and with the library.

    python benchmarks/bench_loading.py MODEL.onnx ... [--rounds 5]

Models are compressed to 4 bits. Every load is a process of its own with one thread; forms take
turns. Memory is what the process grows by at its peak, times are CPU seconds; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import compile_model, print_table, write_results

from onnxcomp.ops import library_path
from onnxcomp.runtime.machine import look

LOADER = """
import json, sys, time
import onnxruntime
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
if sys.argv[2]:
    options.register_custom_ops_library(sys.argv[2])
before, start = memory("VmRSS"), time.process_time()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
seconds = time.process_time() - start
print(json.dumps({"load_s": seconds, "peak_bytes": memory("VmHWM") - before}))
"""


def loaded(model: Path, library: str) -> dict[str, float]:
    """Load a model once, with the operator library at a path, or without one."""
    command = [sys.executable, "-c", LOADER, str(model), library]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def measured(model: Path, rounds: int, folder: Path) -> dict[str, Any]:
    """All forms of one model."""
    small = folder / "small.onnx"
    compile_model(model, small, "--bits", "4", "--no-verify", "--external-data", "never")
    forms = {"dense": (model, ""), "portable": (small, ""), "library": (small, str(library_path()))}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            runs[name].append(loaded(*form))
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    beside = model.with_name(f"{model.name}.data")
    before = sum(path.stat().st_size for path in (model, beside) if path.is_file())
    sizes = {"bytes_before": before, "bytes": small.stat().st_size}
    # Exports of language models are called model.onnx, each in a folder with its name.
    name = model.name if model.stem != "model" else f"{model.parent.name}/{model.name}"
    return {"model": name, **sizes, **medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(model, options.rounds, Path(folder)))
        write_results("loading", {"processor": look().processor, "rows": rows})
    cells = [
        (row["model"], *(_cell(row[form]) for form in ("dense", "portable", "library")))
        for row in rows
    ]
    print_table(("model", "dense", "portable", "library"), cells)


def _cell(found: dict[str, float]) -> str:
    return f"{found['load_s']:.2f} s, {found['peak_bytes'] / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
