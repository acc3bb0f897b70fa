"""Processor time and memory of the compiler on decoders of 1 GB and more.

    python benchmarks/bench_scale.py [--sizes 1 4] [--commands plain verify] [--folder DIR]
                                     [--huge] [--windows 16] [--threads 2] [--memory 1GB]
                                     [--workers 3]

Writes synthetic decoders (`scale_models.py`), runs each command in a process of its own, and
prints CPU seconds, weights per CPU second and the peak of resident memory, of each phase as well.
Rows of other sizes and commands in ``results/scale.json`` stay. What is said of 7B and 70B is
computed from the rows and not measured. A size of N takes about 2 N GB of the disk. With --workers
one process and two workers of Dask take turns instead, so many times, for
plain and data (``results/scale_workers.json``).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_killed
import numpy as np
from results import RESULTS, print_table, write_results
from scale_models import SIZES, Decoder, write_decoder
from scale_workers import CALIBRATED_WAYS, WAYS, in_turns, stages_watched

# What is given to `optimize`; the other commands need its first result.
COMMANDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"bits": 4},
    "ratio": {"ratio": 8.0},
    "data": {"bits": 4, "data": "tokens.npz", "tune": 0},
    "lowrank": {"method": "lowrank", "ratio": 8.0},
    "prune": {"bits": 4, "prune_ratio": 0.2},
    "verify": {},
    "expand": {},
    "killed": {"bits": 4, "data": "tokens.npz"},
}

# Runs with --data that are killed at random moments before one that ends, and how long they live at
# most, as a share of a whole run: what one has done the next one does not do again.
KILLS, _LONGEST = 10, 0.22

TOKENS = 256

# Weights of Llama 7B and 70B, and of their largest tensor.
REAL = {"7B": (6.74e9, 32000 * 4096), "70B": (68.98e9, 32000 * 8192)}


def processor() -> str:
    """Its name, and the kernels that are chosen on it."""
    from onnxcomp.runtime.machine import current_isa, look

    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {current_isa(look())}"
    return current_isa(look())


def watched(phases: dict[str, dict[str, float]]) -> None:
    """Let phases of runs note their processor time and the peak of their memory."""
    from onnxcomp.passes.driver.run import Run
    from onnxcomp.runtime.memory import peak_rss

    original = Run.stage

    @contextlib.contextmanager
    def stage(self: Run, name: str) -> Iterator[None]:
        forget_peak()
        start = time.process_time()
        with original(self, name):
            yield
        found = phases.setdefault(name, {"cpu_seconds": 0.0, "peak_rss_bytes": 0})
        found["cpu_seconds"] = round(found["cpu_seconds"] + time.process_time() - start, 2)
        found["peak_rss_bytes"] = max(found["peak_rss_bytes"], peak_rss())

    Run.stage = stage  # type: ignore[method-assign]


def forget_peak() -> None:
    """Let the kernel count the peak of resident memory anew; without effect where it cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def work(task: Mapping[str, Any]) -> dict[str, Any]:
    """One command, in this process."""
    import onnxcomp
    from onnxcomp.runtime.memory import peak_rss

    phases: dict[str, dict[str, float]] = {}
    watched(phases)
    stages: list[list[float]] = []
    if task["options"].get("data") and task["options"].get("scheduler"):
        stages_watched(stages)
    start, wall, base = time.process_time(), time.perf_counter(), peak_rss()
    model, small, files = task["model"], task["small"], ()
    if task["command"] == "verify":
        verdict = onnxcomp.verify(model, small)
        extra = {"layer_by_layer": list(verdict.layer_by_layer), "passed": verdict.passed}
    elif task["command"] == "expand":
        extra = {"bytes": onnxcomp.expand(small, task["output"]).bytes}
    else:
        result = onnxcomp.optimize(
            model, task["output"], verify=False, jobs=task["threads"], **task["options"]
        )
        output = result.report.output
        files = output.files
        extra = {
            "bytes": output.bytes, "met": result.plan.met, "seconds": result.report.seconds,
        }  # fmt: skip
    peaks = [peak_rss(), *(int(phase["peak_rss_bytes"]) for phase in phases.values())]
    found = {
        **extra,
        "cpu_seconds": round(time.process_time() - start, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "children_cpu_seconds": round(sum(os.times()[2:4]), 1),
        "base_rss_bytes": base,
        "peak_rss_bytes": max(peaks),
        "phases": phases,
        **({"stages": stages} if stages else {}),
    }
    return {**found, "sha256": hashes(files)} if files else found  # not counted


def hashes(files: Sequence[str]) -> str:
    """A hash of all files of a model."""
    digest = hashlib.sha256()
    for file in files:
        with Path(file).open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def run(task: Mapping[str, Any], limit: str | None) -> dict[str, Any]:
    """One command in a process of its own."""
    environment = {**os.environ, **({"ONNXCOMP_MEMORY": limit} if limit else {})}
    words = [sys.executable, __file__, "--work", json.dumps(task)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{task['command']} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def killed(task: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs that are killed, and one that ends: fails where that gives other bytes or strays."""
    options = task["options"]
    words = ["--bits", str(options["bits"]), "--data", options["data"], "--tune", "0"]
    words += ["--jobs", str(task["threads"])]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        runs = bench_killed.measure(Path(task["model"]), Path(place), KILLS, words, _LONGEST)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "runs": runs,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "base_rss_bytes": 0,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "phases": {},
    }


def measure(
    size: str, decoder: Decoder, given: argparse.Namespace, folder: Path
) -> Iterator[dict[str, Any]]:
    """All commands on one model."""
    model, small = folder / f"decoder{size}.onnx", folder / f"small{size}.onnx"
    if not model.exists():
        write_decoder(decoder, model)
    written = sum(path.stat().st_size for path in folder.glob(f"{model.name}*"))
    write_tokens(decoder, given.windows, folder)
    names = list(given.commands)
    if {"verify", "expand"} & set(names) and "plain" not in names and not small.exists():
        names = ["plain", *names]
    for command in names:
        output = small if command == "plain" else folder / f"{command}{size}.onnx"
        options = dict(COMMANDS[command])
        if "data" in options:
            options["data"] = str(folder / options["data"])
        task = {
            "command": command, "model": str(model), "small": str(small), "output": str(output),
            "options": options, "threads": given.threads,
        }  # fmt: skip
        limit = given.memory if command == "verify" else None
        found = killed(task, folder) if command == "killed" else run(task, limit)
        if output != small:
            for written_file in folder.glob(f"{output.name}*"):
                written_file.unlink()
        row = {
            "size": size, "command": command, "threads": given.threads,
            "type": "float16" if decoder.half else "float32", "model_bytes": written,
            "weights": decoder.parameters, "largest_weights": largest(decoder),
            **({"windows": given.windows} if "data" in options else {}),
            **({"memory": limit} if limit else {}), **found,
        }  # fmt: skip
        show([row])
        yield row


def measure_workers(given: argparse.Namespace, folder: Path) -> None:
    """One process and workers of Dask in turns, on each model."""
    path = RESULTS / "scale_workers.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    ways = {"plain": WAYS, "data": CALIBRATED_WAYS}
    for size, command in itertools.product(given.sizes, ways):
        if command not in given.commands:
            continue
        model = folder / f"decoder{size}.onnx"
        if not model.exists():
            write_decoder(SIZES[size], model)
        options = dict(COMMANDS[command])
        if "data" in options:
            options["data"] = write_tokens(SIZES[size], given.windows, folder)
        task = {
            "command": command, "model": str(model), "small": "",
            "output": str(folder / f"workers{size}.onnx"), "options": options,
        }  # fmt: skip
        rows = in_turns(lambda one: run(one, None), task, given.workers, ways[command])
        for row in rows:
            names = ("way", "wall_seconds", "cpu_seconds", "path_seconds", "staged_path_seconds")
            print_table(names, [[row[name] for name in names]])
        facts = {"size": size, "command": command, "weights": SIZES[size].parameters}
        facts |= {"windows": given.windows} if "data" in options else {}
        fresh = [{**facts, **row} for row in rows]
        key = (size, command)
        known = [r for r in known if (r["size"], r.get("command", "plain")) != key] + fresh
        known.sort(key=lambda row: (float(row["size"]), row.get("command", "plain") == "data"))
        write_results("scale_workers", {"processor": processor(), "rows": known})


def write_tokens(decoder: Decoder, windows: int, folder: Path) -> str:
    """Write inputs of `TOKENS` random tokens each; the path."""
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary, (windows, TOKENS))
    np.savez(folder / "tokens.npz", input_ids=ids)
    return str(folder / "tokens.npz")


def largest(decoder: Decoder) -> int:
    """Weights of the largest tensor."""
    return max(math.prod(shape) for shape in decoder.weights.values())


def show(rows: list[dict[str, Any]]) -> None:
    """Print some rows, with what each phase took."""
    for row in rows:
        phases = ", ".join(
            f"{name} {phase['cpu_seconds']:.0f} s {phase['peak_rss_bytes'] / 1e9:.2f} GB"
            for name, phase in row["phases"].items()
        )
        cells = (
            f"{row['model_bytes'] / 1e9:.1f} GB {row['type']}",
            row["command"],
            f"{row['cpu_seconds']:.0f}",
            f"{row['weights'] / 1e6 / row['cpu_seconds']:.1f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            phases,
        )
        print_table(("model", "command", "CPU s", "M weights / CPU s", "peak", "phases"), [cells])


def merged(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the file with these in the place of those for the same."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return row["size"], row["command"], row["threads"], row.get("memory")

    path = RESULTS / "scale.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {key(row): row for row in (*known, *new)}
    order = [*COMMANDS]
    return sorted(fresh.values(), key=lambda r: (float(r["size"]), order.index(r["command"])))


def expected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Real models, computed: time by the weights, memory beyond the base by the largest tensor.

    For each command, time is computed from the largest model that was measured, and memory from the
    one with the largest tensor. What has another law is left out: time of factors, which grows with
    the sides of matrices, memory of --data, which grows with its inputs, and verification in whole
    sessions.
    """
    found = []
    for command in COMMANDS:
        known = [row for row in rows if row["command"] == command]
        if command == "verify":
            known = [row for row in known if row["layer_by_layer"]]
        if command in ("lowrank", "killed") or not known:
            continue
        timed = max(known, key=lambda row: float(row["size"]))
        wide = max(known, key=lambda row: (row["largest_weights"], float(row["size"])))
        grown = wide["peak_rss_bytes"] - wide["base_rss_bytes"]
        for name, (weights, tensor) in REAL.items():
            peak = wide["base_rss_bytes"] + grown * tensor / wide["largest_weights"]
            found.append(
                {
                    "model": name,
                    "command": command,
                    "from_size": timed["size"],
                    "memory_from_size": wide["size"],
                    "cpu_seconds": round(timed["cpu_seconds"] * weights / timed["weights"]),
                    "peak_rss_bytes": None if command == "data" else round(peak),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES], default=["1"])
    parser.add_argument("--commands", nargs="+", choices=[*COMMANDS], default=[*COMMANDS])
    parser.add_argument("--huge", action="store_true", help="130 GB, in a sparse file")
    parser.add_argument("--windows", type=int, default=16, help="of --data, 256 tokens each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", help="what verify may take, such as 1GB")
    parser.add_argument("--workers", type=int, metavar="TIMES", help="compare with Dask workers")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work(json.loads(given.work))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        folder = given.folder or Path(made)
        if given.workers:
            measure_workers(given, folder)
            return
        for size in [*given.sizes, *(["130"] if given.huge else [])]:
            for row in measure(size, SIZES[size], given, folder):
                rows.append(row)
                everything = merged(rows)
                write_results(
                    "scale",
                    {
                        "processor": processor(),
                        "rows": everything,
                        "expected": expected(everything),
                    },
                )


if __name__ == "__main__":
    main()
