"""Speed of the hyper codec's encoders and decoder, in million weights per second and core.

    python benchmarks/bench_encode.py [--weights 524288] [--repeat 5] [--only calibrated]

The calibrated encoder is measured on inputs with moments of a few strong columns, in microseconds
a weight: what it makes of the moments once for all rows is left out. With `--only` the other parts
of the JSON stay as they are.

Settings are interleaved, and the best of the repetitions counts: CPU time of the thread, so that
other work on the machine disturbs little. `threads` compares CPU time of the process, so that it
shows what threads cost. Needs the native encoder; a minute or two.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_hyper_quality import sample
from bench_matmul import cpu_name
from results import RESULTS, print_table, write_results

from onnxcomp.errors import CompressionError
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper.feedback import SWEEPS
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.metric import Metric
from onnxcomp.passes.codecs.hyper.structured import STRUCTURES, code
from onnxcomp.passes.codecs.hyper.tables import WINDINGS
from onnxcomp.passes.weight import Array

# What the project promises of the calibrated encoder: microseconds a weight at 4 bits, AVX2.
CALIBRATED_BAR = 0.7
# Lengths and groups: those of a small decoder, and of one with 4096 columns.
CALIBRATED = ((576, 64), (1536, 128), (4096, 128))

# What the project promises for 2^7 states: million weights per second and core, by bits.
BARS = {2: 20.0, 3: 20.0, 4: 12.0}
STATE_BITS = (6, 7, 8, 10, 12)
ISAS = ("avx512", "avx2", "baseline")


def encoder(
    weight: Array, bits: int, state_bits: int, isa: str, threads: int, kind: str = "winding"
) -> Callable[[], Any]:
    """A call that encodes."""
    values, reach, passes, _ = code(bits, state_bits, kind)
    geometry = GroupLayout(bits, len(values).bit_length() - 1, 128, *weight.shape)
    return lambda: native.hyper_encode(
        weight, geometry, values, reach, passes=passes, threads=threads, isa=isa
    )


def runs(isa: str) -> bool:
    """Whether this machine has an instruction set."""
    try:
        encoder(np.ones((16, 128), np.float32), 2, 6, isa, 1)()
    except CompressionError:
        return False
    return True


def fastest(calls: list[Callable[[], Any]], repeat: int, clock: Callable[[], float]) -> list[float]:
    """Least seconds of each call, all of them in turn."""
    best = [float("inf")] * len(calls)
    for _ in range(repeat):
        for index, call in enumerate(calls):
            start = clock()
            call()
            best[index] = min(best[index], clock() - start)
    return best


def encoding(weights: int, repeat: int) -> list[dict[str, Any]]:
    """One row for each (state_bits, bits, isa); no state bits for structured tables."""
    rows, calls = [], []
    for state_bits in STATE_BITS:
        # As much work for each: more states take more time.
        part = sample("normal", max(1 << 14, weights >> max(0, state_bits - 7)))
        for bits in (bits for bits in range(1, 7) if (bits, state_bits) in WINDINGS):
            for isa in filter(runs, ISAS):
                rows.append(
                    {"state_bits": state_bits, "bits": bits, "isa": isa, "weights": part.size}
                )
                calls.append(encoder(part, bits, state_bits, isa, 1))
    for bits in STRUCTURES:
        for isa in filter(runs, ISAS):
            part = sample("normal", weights)
            rows.append({"state_bits": 0, "bits": bits, "isa": isa, "weights": part.size})
            calls.append(encoder(part, bits, 7, isa, 1, "structured"))
    for row, seconds in zip(rows, fastest(calls, repeat, time.thread_time), strict=True):
        row["speed"] = row["weights"] / seconds / 1e6
    return rows


def threading(weights: int, repeat: int) -> list[dict[str, Any]]:
    """CPU time of several threads against that of one."""
    weight, counts = sample("normal", weights), (1, 2, 4)
    calls = [encoder(weight, 4, 7, "auto", threads) for threads in counts]
    seconds = fastest(calls, repeat, time.process_time)
    return [
        {"threads": threads, "cpu_time": used / seconds[0]}
        for threads, used in zip(counts, seconds, strict=True)
    ]


def decoding(weights: int, repeat: int) -> list[dict[str, Any]]:
    """Speed of the compiler's decoder."""
    weight, rows = sample("normal", weights), []
    for bits in (2, 3, 4):
        geometry, made = GroupLayout(bits, 7, 128, *weight.shape), code(bits, 7)
        values = made.table
        codes, scales = native.hyper_encode(weight, geometry, values, made.spread)

        def call(c: Array = codes, s: Array = scales, t: Array = values, g: Any = geometry) -> Any:
            return native.hyper_decode(c, s, t, g)

        seconds = fastest([call], repeat, time.thread_time)[0]
        rows.append({"bits": bits, "speed": weight.size / seconds / 1e6})
    return rows


def calibrating(repeat: int) -> list[dict[str, Any]]:
    """One row for each (kind, bits, length, isa) of the calibrated encoder, on one thread."""
    rows, calls = [], []
    for length, group in CALIBRATED:
        weight = sample("normal", 64 * length).reshape(64, length)
        metric = Metric.of(moments_of(length), group)
        for bits, kind in itertools.product((4, 3, 2), ("winding", "structured")):
            made = code(bits, 7, kind)
            states = len(made.table).bit_length() - 1
            geometry = GroupLayout(bits, states, group, *weight.shape)
            for isa in filter(runs, ISAS):
                rows.append({"kind": kind, "bits": bits, "length": length, "isa": isa})
                calls.append(
                    functools.partial(
                        *(native.hyper_feedback, weight, geometry, metric, made),
                        sweeps=SWEEPS,
                        isa=isa,
                    )
                )
    for row, seconds in zip(rows, fastest(calls, repeat, time.thread_time), strict=True):
        row["microseconds"] = seconds * 1e6 / (64 * row["length"])
    return rows


def moments_of(length: int) -> Array:
    """Second moments of correlated inputs with a few strong columns."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * length, length // 4)) @ rng.standard_normal((length // 4, length))
    x = x / np.sqrt(length) + rng.standard_normal((2 * length, length))
    x[:, :: length // 6] *= 8.0
    return np.asarray(x.T @ x / len(x))


def show_calibrated(rows: list[dict[str, Any]]) -> None:
    """Print the table of the calibrated encoder."""
    print("\ncalibrated encoder, microseconds of CPU a weight, by length and instruction set")
    settings = list(dict.fromkeys((row["kind"], row["bits"]) for row in rows))
    columns = list(dict.fromkeys((row["length"], row["isa"]) for row in rows))
    found = {
        (row["kind"], row["bits"], row["length"], row["isa"]): row["microseconds"] for row in rows
    }
    names = [f"{length} {isa}" for length, isa in columns]
    cells = [
        [f"{bits} bits {kind}", *(f"{found[(kind, bits, *column)]:.2f}" for column in columns)]
        for kind, bits in settings
    ]
    print_table(("code", *names), cells)
    for (kind, bits, length, isa), value in found.items():
        if bits == 4 and isa == "avx2":
            met = "met   " if value <= CALIBRATED_BAR else "MISSED"
            print(f"{met}  {kind}, {length} columns: {value:.2f}, bar {CALIBRATED_BAR}")


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the encoder's table and the promises."""
    found = {(row["state_bits"], row["bits"], row["isa"]): row["speed"] for row in rows}
    isas = [isa for isa in ISAS if any(row["isa"] == isa for row in rows)]
    for isa in isas:
        print(f"\nencoder, {isa}, million weights per second and core, by bits per weight")
        cells = [
            [
                f"2^{s}" if s else "structured",
                *(f"{found[s, b, isa]:.1f}" if (s, b, isa) in found else "" for b in range(1, 7)),
            ]
            for s in (*STATE_BITS, 0)
        ]
        print_table(("states", *map(str, range(1, 7))), cells)
    held = [
        {"bits": bits, "speed": found[7, bits, isas[0]], "bar": bar} for bits, bar in BARS.items()
    ]
    for row in held:
        met = "met   " if row["speed"] >= row["bar"] else "MISSED"
        print(f"{met}  {row['bits']} bits, 2^7 states: {row['speed']:.1f}, bar {row['bar']:.0f}")
    return held


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=1 << 19, help="weights of a sample")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=("calibrated",), help="measure this part only")
    options = parser.parse_args()
    path, results = RESULTS / "encode.json", {}
    if options.only and path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        del results["environment"]
    else:
        results = plain(options.weights, options.repeat)
    rows = calibrating(options.repeat)
    show_calibrated(rows)
    results["calibrated"] = {"cpu": cpu_name(), "rows": rows}
    print(write_results("encode", results))


def plain(weights: int, repeat: int) -> dict[str, Any]:
    """Encoder and decoder without calibration."""
    rows = encoding(weights, repeat)
    held = show(rows)
    threads = threading(weights, repeat)
    print("\nCPU time by threads")
    print_table(("threads", "of one"), [(r["threads"], f"{r['cpu_time']:.2f}") for r in threads])
    decoder = decoding(weights, repeat)
    print("\ndecoder, 2^7 states")
    print_table(("bits", "M weights/s"), [(r["bits"], f"{r['speed']:.0f}") for r in decoder])
    return {"encoder": rows, "bars": held, "threads": threads, "decoder": decoder}


if __name__ == "__main__":
    main()
