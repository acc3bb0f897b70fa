"""Every model of a folder at one setting: size, agreement with the original, load time and memory.

    python benchmarks/bench_models.py FOLDER [--bits 4] [--only NAME ...]

With ``--only`` the rows of other models stay what they were.

FOLDER holds models/*.onnx, lm/*.onnx and eval/. For each model: bytes, ratio, share of the weight
bytes that is compressed, signal-to-noise ratio of the outputs against the original with the
operator library and without, agreement of the top-1 class where the model is a classifier, and
whether inputs, outputs, opset and metadata are what they were. Inputs are real where the folder has
any for the model, else those that the compiler makes up. Load time is CPU time of one thread, and
memory is what the process grows by when it loads a model; each in a process of its own for the
original and for the compressed model with the operator library and without.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from inputs import CLASSIFIERS, REAL, Batches, Feed, speech_frames
from results import RESULTS, compile_model, print_table, write_results

import onnxcomp
from onnxcomp.runtime.session import needs_library

Session = Any


def visible(path: Path, session: Session) -> dict[str, Any]:
    """What a user of the model sees besides its numbers."""
    proto = onnx.load(path, load_external_data=False)
    overridable = [(i.name, i.type, i.shape) for i in session.get_overridable_initializers()]
    return {
        "inputs": [(i.name, i.type, i.shape) for i in session.get_inputs()],
        "outputs": [(o.name, o.type, o.shape) for o in session.get_outputs()],
        "overridable": overridable,
        "opsets": {o.domain: o.version for o in proto.opset_import if o.domain != "com.onnxcomp"},
        "metadata": {entry.key: entry.value for entry in proto.metadata_props},
        "doc": (proto.doc_string, proto.graph.doc_string, proto.producer_name, proto.domain),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what changed."""
    changed = [
        key for key in before if key not in ("metadata", "opsets") and before[key] != after[key]
    ]
    # A rewritten model may say more, but nothing else.
    changed += [
        key
        for key in ("metadata", "opsets")
        if any(after[key].get(name) != value for name, value in before[key].items())
    ]
    return changed


def agreement(sessions: dict[str, Session], batches: Batches) -> dict[str, float]:
    """Share of inputs with the same top-1 class as the dense model, and accuracies."""
    same = dict.fromkeys(sessions, 0)
    right = dict.fromkeys(sessions, 0)
    count = labelled = 0
    for feed, labels in batches:
        classes = {
            name: np.asarray(session.run(None, feed)[0]).squeeze().argmax(-1).reshape(-1)
            for name, session in sessions.items()
        }
        count += classes["dense"].size
        labelled += 0 if labels is None else len(labels)
        for name, guess in classes.items():
            same[name] += int((guess == classes["dense"]).sum())
            right[name] += 0 if labels is None else int((guess == labels).sum())
    numbers = {f"agree_{name}": same[name] / count for name in sessions if name != "dense"}
    if labelled:
        numbers |= {f"accuracy_{name}": right[name] / labelled for name in sessions}
    return {"inputs": count, **numbers}


def signal_to_noise(sessions: dict[str, Session], feeds: Iterable[Feed]) -> dict[str, float]:
    """The lowest ratio among the outputs, over all inputs, in dB, for the compressed forms."""
    power: dict[int, float] = collections.Counter()
    noise = {"library": collections.Counter(), "portable": collections.Counter()}
    for feed in feeds:
        results = {name: session.run(None, feed) for name, session in sessions.items()}
        for index, exact in enumerate(results["dense"]):
            power[index] += float(np.square(exact, dtype=np.float64).sum())
            for form, total in noise.items():
                difference = np.subtract(results[form][index], exact, dtype=np.float64)
                total[index] += float(np.square(difference).sum())
    return {
        form: min(decibel_ratio(power[index], total[index]) for index in power)
        for form, total in noise.items()
    }


def decibel_ratio(power: float, noise: float) -> float:
    """10 log10 of a ratio; infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(power, 1e-300) / noise)


def follow_speech(session: Session, data: Path) -> list[float]:
    """Probabilities of speech along a recording; the model's state goes from frame to frame."""
    state, rate = np.zeros((2, 1, 128), np.float32), np.array(16000)
    chances = []
    for frame in speech_frames(data):
        chance, state = session.run(None, {"input": frame, "state": state, "sr": rate})
        chances.append(float(chance[0, 0]))
    return chances


def speech_numbers(sessions: dict[str, Session], data: Path) -> dict[str, float]:
    """Agreement of the decisions about speech, and the signal-to-noise ratio of their chances."""
    chances = {name: np.array(follow_speech(s, data)) for name, s in sessions.items()}
    exact = chances["dense"]
    numbers: dict[str, float] = {}
    for form, suffix in (("library", ""), ("portable", "_portable")):
        noise = float(np.square(chances[form] - exact).sum())
        numbers[f"snr_db{suffix}"] = decibel_ratio(float(np.square(exact).sum()), noise)
        numbers[f"agree_{form}"] = float(np.mean((chances[form] > 0.5) == (exact > 0.5)))
    return {"inputs": len(exact), **numbers}


def on_real_inputs(name: str, sessions: dict[str, Session], data: Path) -> dict[str, Any]:
    """Everything that real inputs tell about a model; nothing where there are none."""
    if name.startswith("silero_vad"):
        return {"real": True, **speech_numbers(sessions, data)}
    if name in REAL:
        ratios = signal_to_noise(sessions, REAL[name](data))
        return {"real": True, "snr_db": ratios["library"], "snr_db_portable": ratios["portable"]}
    if name in CLASSIFIERS:
        feeds = (feed for feed, _ in itertools.islice(CLASSIFIERS[name](data), 20))
        ratios = signal_to_noise(sessions, feeds)
        numbers = agreement(sessions, CLASSIFIERS[name](data))
        return {
            "real": True,
            "snr_db": ratios["library"],
            "snr_db_portable": ratios["portable"],
            **numbers,
        }
    return {"real": False}


LOAD = """
import json, sys, time
from onnxcomp.runtime.bench_worker import resident_bytes
from onnxcomp.runtime.session import import_runtime, open_session
path, library = sys.argv[1], sys.argv[2] == "library"
import_runtime()
before, start = resident_bytes()["rss_bytes"], time.process_time()
session = open_session(path, library=library, threads=1)
spent, loaded = time.process_time() - start, resident_bytes()["rss_bytes"]
print(json.dumps({"load_ms": 1e3 * spent, "rss_bytes": loaded - before}))
"""
REPEATS = 3


def loading(path: Path, form: str) -> dict[str, float]:
    """CPU milliseconds to load a model and bytes its session takes; the least of some tries."""
    line = [sys.executable, "-c", LOAD, str(path), form]
    tries = [
        json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
        for _ in range(REPEATS)
    ]
    return {key: round(min(found[key] for found in tries), 1) for key in tries[0]}


def loads(dense: Path, small: Path, library: bool) -> dict[str, dict[str, float]]:
    """`loading` of the original and of both forms of the compressed model."""
    portable = loading(small, "portable")
    return {
        "dense": loading(dense, "dense"),
        "library": loading(small, "library") if library else portable,
        "portable": portable,
    }


def open_sessions(dense: Path, small: Path) -> dict[str, Session]:
    """The original, the compressed model with the library, and the same file without it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return {
        "dense": onnxruntime.InferenceSession(dense, options),
        "library": onnxcomp.InferenceSession(small),
        "portable": onnxruntime.InferenceSession(small, options),
    }


def worst_snr(outputs: dict[str, Any]) -> float | None:
    """The lowest signal-to-noise ratio among the outputs, in dB; None where all are exact."""
    numbers = [o["snr_db"] for o in outputs.values() if o["snr_db"] is not None]
    return min(numbers, default=None)


def measure(path: Path, data: Path, folder: Path, bits: int) -> dict[str, Any]:
    """Everything about one model."""
    small = folder / path.name
    report = compile_model(path, small, "--bits", str(bits))
    row: dict[str, Any] = {"name": path.stem, "exit_code": report["exit_code"]}
    if "error" in report:
        return {**row, "error": report["error"]["message"]}
    verify = report["verify"]
    row |= {
        "bytes_before": report["input"]["bytes"],
        "bytes_after": report["output"]["bytes"],
        "ratio": report["ratio"],
        "coverage": report["coverage"],
        "compressed": sum(site["reason"] == "" for site in report["sites"]),
        "kept": sorted({site["reason"] for site in report["sites"] if site["reason"]}),
        "snr_db": worst_snr(verify["outputs"]),
        "snr_db_portable": worst_snr(verify["portable"]["outputs"]),
        "seconds": report["seconds"]["total"],
    }
    if not small.exists():
        return row
    sessions = open_sessions(path, small)
    before, after = (
        visible(p, s) for p, s in ((path, sessions["dense"]), (small, sessions["library"]))
    )
    portable = visible(small, sessions["portable"])
    row["changed"] = sorted({*differences(before, after), *differences(before, portable)})
    row["loads"] = loads(path, small, needs_library(small))
    return {**row, **on_real_inputs(path.stem, sessions, data)}


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print one line for each model."""
    columns = (
        "model",
        "exit",
        "KB before",
        "KB after",
        "ratio",
        "covered",
        "SNR dB",
        "portable",
        "inputs",
    )
    table = []
    for row in rows:
        if "error" in row:
            table.append((row["name"], row["exit_code"], row["error"], *[""] * 9))
            continue
        table.append(
            (
                row["name"],
                row["exit_code"],
                f"{row['bytes_before'] / 1000:.0f}",
                f"{row['bytes_after'] / 1000:.0f}",
                f"{row['ratio']:.2f}",
                f"{100 * row['coverage']:.1f} %",
                decibels(row["snr_db"]),
                decibels(row["snr_db_portable"]),
                "real" if row.get("real") else "made up",
                percent(row.get("agree_library")),
                percent(row.get("agree_portable")),
                ", ".join(row.get("changed", ["not loaded"])) or "same",
                three(row, "load_ms", 1),
                three(row, "rss_bytes", 1e6),
            )
        )
    print_table((*columns, "top-1 agree", "portable", "signature", "load ms", "MB"), table)


def decibels(value: float | None) -> str:
    """A ratio for the table."""
    return "exact" if value is None or math.isinf(value) else f"{value:.1f}"


def three(row: dict[str, Any], key: str, unit: float) -> str:
    """A number of the original and of both forms."""
    return " / ".join(f"{found[key] / unit:.1f}" for found in row.get("loads", {}).values())


def percent(value: float | None) -> str:
    """A share for the table."""
    return "" if value is None else f"{100 * value:.2f} %"


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run, with new ones in their places and behind them."""
    old = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else []
    new = {row["name"]: row for row in rows}
    kept = [new.pop(row["name"], row) for row in old]
    return [*kept, *new.values()]


def main() -> None:
    """Compile every model, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="parts of file names")
    options = parser.parse_args()
    data: Path = options.folder
    paths = sorted([*data.glob("models/*.onnx"), *data.glob("lm/*.onnx")])
    if options.only:
        paths = [path for path in paths if any(part in path.name for part in options.only)]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for path in paths:
            rows.append(measure(path, data, Path(name), options.bits))
            print(f"{path.name}: exit {rows[-1]['exit_code']}", flush=True)
    print_results(rows)
    name = f"models_{options.bits}bit"
    if options.only:
        rows = merged(RESULTS / f"{name}.json", rows)
    print(write_results(name, {"bits": options.bits, "models": rows}))


if __name__ == "__main__":
    main()
