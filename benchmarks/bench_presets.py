"""What the presets mean on four models: bytes of the file, and the loss on real inputs.

    python benchmarks/bench_presets.py MINILM.onnx --data FOLDER [--only NAME ...]

FOLDER holds models/, lm/ and eval/. Losses are disagreements with the dense model: of the class of
photographs (SqueezeNet, a float16 model, 200 images), of the decision about speech (Silero VAD, one
recording), of the likeliest next token (a language model, 10 windows of 256), and 1 - cosine of
embeddings (MiniLM, 256 sentences). Nothing is calibrated. Rows that were measured before are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_minilm import embed, make_batches, read_pairs
from bench_models import agreement, follow_speech
from inputs import CLASSIFIERS
from results import RESULTS, compile_model, print_table, write_results

import onnxcomp
from onnxcomp.passes.config.presets import PRESETS

Loss = Callable[[Any, Any, Path], float]

NAME = "presets"


def classes(name: str, batches: int) -> Loss:
    """Share of inputs with another class."""

    def loss(dense: Any, small: Any, data: Path) -> float:
        inputs = itertools.islice(CLASSIFIERS[name](data), batches)
        return 1 - agreement({"dense": dense, "small": small}, inputs)["agree_small"]

    return loss


def speech(dense: Any, small: Any, data: Path) -> float:
    """Share of frames with another decision."""
    exact, found = (np.array(follow_speech(session, data)) > 0.5 for session in (dense, small))
    return float(np.mean(exact != found))


def sentences(dense: Any, small: Any, data: Path) -> float:
    """Mean of 1 - cosine between the embeddings."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "models" / "minilm_tokenizer.json"))
    batches = make_batches(tokenizer, read_pairs(data)[0][:256])
    one, two = embed(dense, batches), embed(small, batches)
    return float(np.mean(1 - (one * two).sum(1, dtype=np.float64)))


MODELS: dict[str, tuple[str, Loss]] = {
    "SqueezeNet float16": ("models/squeezenet_fp16.onnx", classes("squeezenet_fp16", 200)),
    "Silero VAD": ("models/silero_vad_16k_op15.onnx", speech),
    "language model": ("lm/tinyllama_ref.onnx", classes("tinyllama_ref", 10)),
    "MiniLM": ("", sentences),
}


def measure(name: str, preset: str, path: Path, data: Path, folder: Path) -> dict[str, Any]:
    """Bytes and loss of one model with one preset."""
    small = folder / f"{preset}.onnx"
    report = compile_model(path, small, "--preset", preset, "--no-verify")
    if "error" in report:
        raise SystemExit(f"{name}, {preset}: {report['error']['message']}")
    sessions = onnxcomp.InferenceSession(path), onnxcomp.InferenceSession(small)
    return {
        "model": name,
        "preset": preset,
        "ratio": round(report["ratio"], 3),
        "bytes": report["output"]["bytes"],
        "loss": round(max(0.0, MODELS[name][1](*sessions, data)), 5),
    }


def earlier() -> list[dict[str, Any]]:
    """Rows of the last run."""
    path = RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def told(rows: list[dict[str, Any]], preset: str) -> str:
    """What `onnxcomp.passes.config.file.presets` says of a preset."""
    own = [row for row in rows if row["preset"] == preset]
    return "; ".join(f"{r['model']} {r['ratio']:.1f}x, {100 * r['loss']:.1f} %" for r in own)


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minilm", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), help="only these models")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--anew", action="store_true", help="measure them even if that was done")
    options = parser.parse_args()
    wanted = options.only or list(MODELS)
    rows = [
        row
        for row in earlier()
        if not (options.anew and row["model"] in wanted and row["preset"] in options.presets)
    ]
    done = {(row["model"], row["preset"]) for row in rows}
    for name, preset in itertools.product(wanted, options.presets):
        if (name, preset) in done:
            continue
        file = MODELS[name][0]
        path = options.data / file if file else options.minilm
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, preset, path, options.data, Path(folder)))
        rows.sort(key=lambda row: (list(MODELS).index(row["model"]), row["preset"]))
        write_results(NAME, {"rows": rows})
    lines = [
        [r["model"], r["preset"], f"{r['ratio']:.2f}x", f"{100 * r['loss']:.2f} %"] for r in rows
    ]
    print_table(("model", "preset", "smaller", "loss"), lines)
    for preset in PRESETS:
        print(f"{preset}: {told(rows, preset)}")


if __name__ == "__main__":
    main()
