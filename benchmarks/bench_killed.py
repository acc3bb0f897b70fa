"""kill -9 at ten random moments of compiling a model of 300 MB, and the run that finishes it.

    python benchmarks/bench_killed.py [--kills 10] [--megabytes 300] [--bits 2]

Prints for every run how long it lived and how many weights the cache held after it; fails where
the last run gives other bytes than a run that nobody disturbed, or leaves stray files.
`bench_scale.py` does the same with ``--data``.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from results import print_table, write_results

# Rows and columns of every weight: 4.2 MB.
_SIDE = 1024

# What a cache holds when a run has ended.
_KEPT = (".payload", ".calibrated")


def write_model(path: Path, megabytes: int) -> None:
    """A chain of products with random weights, in a file with external data."""
    count = max(1, megabytes * 10**6 // (4 * _SIDE**2))
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(
            rng.standard_normal((_SIDE, _SIDE), dtype=np.float32) / 45, f"weight{number}"
        )
        for number in range(count)
    ]
    nodes = []
    for n in range(count):  # Relu keeps the products apart, which would be folded into one
        nodes.append(helper.make_node("MatMul", [f"x{n}", f"weight{n}"], [f"y{n}"], name=f"p{n}"))
        nodes.append(helper.make_node("Relu", [f"y{n}"], [f"x{n + 1}"], name=f"r{n}"))
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x0", kind, ["n", _SIDE])],
        [helper.make_tensor_value_info(f"x{count}", kind, ["n", _SIDE])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def start(
    model: Path, output: Path, cache: Path, options: Sequence[str]
) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    words = ["optimize", str(model), "-o", str(output), "--no-verify", "-q", *options]
    return subprocess.Popen([sys.executable, "-m", "onnxcomp", *words, "--cache", str(cache)])


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files, hidden ones and folders included by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.iterdir())
    }


def measure(
    model: Path, folder: Path, kills: int, options: Sequence[str], longest: float = 1.0
) -> list[dict[str, Any]]:
    """Kill runs, let the last one end, and compare.

    Args:
        model: What is compiled.
        folder: For outputs and caches; empty.
        kills: How many runs are killed.
        options: Of the runs.
        longest: How long they live at most, as a share of the time of an undisturbed run.
    """
    rows: list[dict[str, Any]] = []
    begun = time.perf_counter()
    for name in ("undisturbed", "killed"):
        (folder / name).mkdir()
    if start(model, folder / "undisturbed/out.onnx", folder / "cache0", options).wait():
        raise SystemExit("the undisturbed run failed")
    whole = time.perf_counter() - begun
    shutil.rmtree(folder / "cache0")
    rng, cache = random.Random(0), folder / "cache"
    for number in range(kills + 1):
        run = start(model, folder / "killed/out.onnx", cache, options)
        begun = time.perf_counter()
        try:
            code = run.wait(None if number == kills else rng.uniform(0.1, longest) * whole)
        except subprocess.TimeoutExpired:
            run.kill()
            code = run.wait()
        lived = round(time.perf_counter() - begun, 2)
        kept = [path.suffix for path in cache.iterdir()] if cache.exists() else []
        row = {"seconds": lived, "code": code, "payloads": kept.count(".payload")}
        if "--data" in options:
            row["calibrated"] = kept.count(".calibrated")
        rows.append(row)
    if not any(row["code"] for row in rows):
        raise SystemExit("no run was killed: the machine has become faster since the first one")
    if hashes(folder / "killed") != hashes(folder / "undisturbed"):
        raise SystemExit("the files differ, or stray ones are left")
    if strays := [path.name for path in cache.iterdir() if path.suffix not in _KEPT]:
        raise SystemExit(f"the cache holds {strays}")
    return rows


def main() -> None:
    """Make the model, and kill."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--bits", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model.onnx", options.megabytes)
        words = ["--bits", str(options.bits), "-m", "hyper"]
        rows = measure(folder / "model.onnx", folder, options.kills, words)
    print_table(
        ("run", "seconds", "exit code", "weights in the cache"),
        [(n, row["seconds"], row["code"], row["payloads"]) for n, row in enumerate(rows, 1)],
    )
    write_results("killed", {"megabytes": options.megabytes, "runs": rows})


if __name__ == "__main__":
    main()
