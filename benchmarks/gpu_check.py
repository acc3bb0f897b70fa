"""Check the CUDA kernels on a GPU, and time them: one table and benchmarks/results/gpu_check.json.

Runs on whatever has Python 3.10, torch with CUDA, numpy and onnx; benchmarks/gpu_check.sh builds
the library first. With `--emulated` the comparisons run on the CPU, with emulated kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_compare
import gpu_decoder
import gpu_sessions
import gpu_timing
from gpu_calls import Calls
from gpu_memory import GpuMemory, HostMemory, Memory
from results import print_table, write_results

NO_GPU = 6  # the exit code of onnxcomp for what is missing on a machine
_SANITIZERS = ("memcheck", "racecheck")
_LEAST_FOR_SANITIZERS = 20.0  # seconds


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="libonnxcomp_ops.so with CUDA kernels")
    parser.add_argument("--emulated", action="store_true", help="compare on the CPU, time nothing")
    parser.add_argument("--quick", action="store_true", help="few settings, no times")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="run it in sessions"
    )
    parser.add_argument("--models", type=Path, help="a folder of models to run in sessions")
    parser.add_argument(
        "--seconds", type=float, default=150.0, help="leave out what would end later"
    )
    parser.add_argument("--name", default="gpu_check", help="of the JSON in benchmarks/results")
    return parser.parse_args(given)


def gpu_name() -> str:
    """The GPU that torch sees.

    Raises:
        SystemExit: With code 6 when there is none.
    """
    try:
        import torch
    except ImportError:
        refuse("torch is not installed")
    if not torch.cuda.is_available():
        refuse("torch finds no GPU")
    return str(torch.cuda.get_device_name(0))


def refuse(reason: str) -> None:
    print(f"no GPU found: {reason}; run this on a machine with an NVIDIA GPU", file=sys.stderr)
    raise SystemExit(NO_GPU)


def compare(calls: Calls, memory: Callable[[], Memory], options: argparse.Namespace) -> list[Any]:
    """Run all comparisons and print the worst of each kernel.

    Raises:
        SystemExit: With code 4 when a kernel is wrong.
    """
    found = list(gpu_compare.compare(calls, memory, quick=options.quick, seed=options.seed))
    worst: dict[str, gpu_compare.Comparison] = {}
    for one in found:
        if one.kernel not in worst or one.error > worst[one.kernel].error:
            worst[one.kernel] = one
    rows = [
        (kernel, sum(one.kernel == kernel for one in found), f"{one.error:.2f}", one.setting)
        for kernel, one in worst.items()
    ]
    print_table(("kernel", "comparisons", "largest error / tolerance", "where"), rows)
    wrong = [one for one in found if not one.error <= 1.0]
    for one in wrong[:20]:
        print(f"WRONG: {one.kernel}, {one.setting}: {one.error}", file=sys.stderr)
    if wrong:
        raise SystemExit(4)
    return [dataclasses.asdict(one) for one in worst.values()]


def sanitize(library: Path, seed: int, deadline: float) -> dict[str, str]:
    """Repeat quick comparisons under compute-sanitizer; "clean", or why it did not run."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return dict.fromkeys(_SANITIZERS, "compute-sanitizer is not installed")
    verdicts = {}
    for tool in _SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__]
        command += [str(library), "--quick", "--seed", str(seed)]
        left = deadline - time.monotonic()
        if left < _LEAST_FOR_SANITIZERS:
            verdicts[tool] = "no time left"
            continue
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            verdicts[tool] = f"not done after {left:.0f} s"
            continue
        verdicts[tool] = "clean" if run.returncode == 0 else f"exit {run.returncode}"
        if run.returncode != 0:
            print(run.stdout[-4000:] + run.stderr[-2000:], file=sys.stderr)
    return verdicts


def times(calls: Calls, deadline: float) -> tuple[list[gpu_timing.Row], gpu_timing.Floor]:
    """All times, as a table; shapes that would be measured after `deadline` are left out."""
    rows = []
    floor = gpu_timing.floor()
    launch = "unknown" if floor.launch_us is None else f"{floor.launch_us:.2f} us"
    print(f"an empty launch: {launch}; a copy moves {floor.copy_bandwidth / 1e6:.2f} TB/s")
    for shape in gpu_timing.SHAPES:
        if time.monotonic() > deadline:
            print(f"no time left for weights of {shape[0]}x{shape[1]}")
            continue
        rows += gpu_timing.matmul_rows(calls, shape, gpu_timing.BATCHES)
        rows += gpu_timing.decode_rows(calls, shape)
    print_times(rows, floor)
    return rows, floor


def print_times(rows: list[gpu_timing.Row], floor: gpu_timing.Floor) -> None:
    cells = []
    for row in rows:
        shape = f"{row.shape[0]}x{row.shape[1]}"
        bars = ("-", "-") if row.must is None else (f"{row.must:g}", f"{row.aim:g}")
        int4 = "-" if row.int4_us is None else f"{row.int4_us:.1f}"
        us = (f"{row.us:.1f}", f"{row.rival_us:.1f}", int4)
        share = f"{row.share(floor):.2f}" if row.read else "-"
        cells.append((row.kernel, shape, row.batch or "-", *us, f"{row.ratio:.2f}", share, *bars))
    columns = (
        "kernel", "weight", "rows of x", "us", "cuBLAS or copy, us", "torch int4, us", "ratio",
        "of bandwidth", "must", "aim",
    )  # fmt: skip
    print_table(columns, cells)


def decoders(options: argparse.Namespace, deadline: float) -> list[dict[str, Any]]:
    """A decoder of twelve layers in ONNX Runtime, where that has the CUDA execution provider."""
    try:
        import onnxruntime
    except ImportError:
        return []
    if gpu_sessions.CUDA not in onnxruntime.get_available_providers():
        return []
    rows = gpu_decoder.time_decoders(options.library, deadline)
    cells = [
        (row.form, row.batch, f"{row.us:.0f}", f"{row.tokens_per_second:.0f}", f"{row.ratio:.2f}")
        for row in rows
    ]
    print_table(("decoder", "rows of x", "us", "tokens per second", "ratio to dense"), cells)
    return [dataclasses.asdict(row) for row in rows]


def sessions(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Models in ONNX Runtime, where it has the CUDA execution provider."""
    try:
        import onnxruntime
    except ImportError:
        return []
    if gpu_sessions.CUDA not in onnxruntime.get_available_providers():
        print("sessions: this ONNX Runtime has no CUDA execution provider")
        return []
    models = list(options.model)
    if options.models is not None:
        models += sorted(options.models.glob("*.onnx"))
    with tempfile.TemporaryDirectory() as folder:
        rows = gpu_sessions.compare_models(models, gpu_sessions.CUDA, options.library, Path(folder))
    cells = [tuple(dataclasses.asdict(row).values()) for row in rows]
    print_table([field.name for field in dataclasses.fields(gpu_sessions.SessionRow)], cells)
    return [dataclasses.asdict(row) for row in rows]


def main(given: list[str] | None = None) -> None:
    start = time.monotonic()
    options = arguments(given)
    gpu = "emulated" if options.emulated else gpu_name()
    calls = Calls(options.library)
    print(f"{gpu}; kernels for {calls.architectures}; seed {options.seed}", flush=True)
    memory = HostMemory if options.emulated else GpuMemory
    comparisons = compare(calls, memory, options)
    if options.quick:
        return
    results: dict[str, Any] = {
        "gpu": gpu,
        "architectures": calls.architectures,
        "seed": options.seed,
        "comparisons": comparisons,
    }
    if not options.emulated:
        results["kernels"] = calls.kernels()
        results["date"] = time.strftime("%Y-%m-%d")
        deadline = start + options.seconds
        # Of what is left after comparisons: times first, then the decoder, then the sanitizers.
        rows, floor = times(calls, deadline - 0.4 * options.seconds)
        results["floor"] = dataclasses.asdict(floor)
        results["times"] = [
            {**dataclasses.asdict(row), "ratio": row.ratio, "share": row.share(floor)}
            for row in rows
        ]
        results["decoders"] = decoders(options, deadline - 0.2 * options.seconds)
        results["sessions"] = sessions(options)
        results["sanitizers"] = sanitize(options.library, options.seed, deadline)
        print("; ".join(f"{tool}: {verdict}" for tool, verdict in results["sanitizers"].items()))
    print(f"wrote {write_results(options.name, results)}")


if __name__ == "__main__":
    main()
