"""How much smaller archives are than compressed models, and what that takes.

    python benchmarks/bench_archive.py FOLDER MINILM [--smollm2 FOLDER]

FOLDER holds models/*.onnx and lm/*.onnx; MINILM is all-MiniLM-L6-v2 as ONNX. Models are compressed
at some numbers of bits without data, archived, and restored; what comes back has to be what was
there. `xz` is the .onnx file with its data through LZMA as a whole. Times are CPU time. Rows that
the JSON has already are not measured again unless `--again` asks for it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.runtime.machine import look

MODELS = ("resnet20_cifar10", "squeezenet_fp16", "silero_vad", "mobilenetv2_224_tf2ptq_fp32")

# Bits of codes; None for the model as it is.
BITS = (None, 4, 3, 2)

COLUMNS = ("model", "bits", "file", "archive", "xz", "write", "restore")


def measure(name: str, model: Path, bits: int | None, folder: Path) -> dict[str, Any]:
    """One form of a model."""
    small = model
    if bits is not None:
        small = folder / "small.onnx"
        onnxcomp.optimize(model, small, bits=bits, verify=False, force=True)
    start = time.process_time()
    made = onnxcomp.archive(small, folder / "archive", force=True)
    between = time.process_time()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        onnxcomp.restore(folder / "archive", Path(place) / "restored")
        end = time.process_time()
        for file in made.files:
            if not filecmp.cmp(small.parent / file, Path(place) / "restored" / file, shallow=False):
                raise SystemExit(f"{name}: {file} came back otherwise")
    encoder = lzma.LZMACompressor(preset=6)
    whole = 0
    for file in made.files:
        with (small.parent / file).open("rb") as stream:
            while piece := stream.read(1 << 22):
                whole += len(encoder.compress(piece))
    return {
        "model": name,
        "bits": bits,
        "bytes": made.model_bytes,
        "archive": made.bytes,
        "xz": whole + len(encoder.flush()),
        "streams": made.streams,
        "write_seconds": between - start,
        "restore_seconds": end - between,
    }


def earlier() -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    path = RESULTS / "archive.json"
    rows: list[dict[str, Any]] = []
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else rows


def main() -> None:
    """Measure all models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = parser.parse_args()
    models = {name: options.folder / "models" / f"{name}.onnx" for name in MODELS}
    models["tinyllama_ref"] = options.folder / "lm" / "tinyllama_ref.onnx"
    models["minilm_l6_v2_embed"] = options.minilm
    if options.smollm2 is not None:
        models["SmolLM2-135M"] = options.smollm2 / "model.onnx"
    rows = [] if options.again else earlier()
    known = {(row["model"], row["bits"]) for row in rows}
    wanted = [(name, bits) for name in models for bits in BITS if (name, bits) not in known]
    with tempfile.TemporaryDirectory() as folder:
        for name, bits in wanted:
            rows.append(measure(name, models[name], bits, Path(folder)))
            print(rows[-1], flush=True)
            write_results("archive", {"processor": look().processor, "runs": rows})
    print_table(
        COLUMNS,
        [
            (
                row["model"],
                row["bits"] or "dense",
                row["bytes"],
                *(f"{100 * row[key] / row['bytes']:.1f} %" for key in ("archive", "xz")),
                *(f"{row[key]:.1f} s" for key in ("write_seconds", "restore_seconds")),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
