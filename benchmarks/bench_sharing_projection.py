"""What is left of models that were not trained to share, when their weights are made to.

    python benchmarks/bench_sharing_projection.py             # two minutes on one core
    python benchmarks/bench_sharing_projection.py --minilm MINILM.onnx

A perceptron of three layers (64 - 256 - 256 - 10) is trained on digits of 8 x 8 pixels. Its layers,
but for the last one, are then stored by `--method hash` as bucket means, by least squares on the
inputs of 2,000 training images, and with matched chunks; and by `hyper` at as many bytes. The error
is |y' - y| / |y| of the logits of 2,000 other images. With `--minilm` the table of word vectors of
the sentence encoder is stored at 4 times fewer bytes, and judged by the similarities of
STS-B pairs, of which the first 400 are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_lorita import accuracy
from bench_minilm import embed, make_batches, quality, read_pairs
from bench_sharing_training import NETWORKS, train
from networks import Split, digits, small_perceptron
from results import RESULTS, print_table, write_results
from tokenizers import Tokenizer

import onnxcomp
from onnxcomp.models import export

DATA = Path(os.environ.get("ONNXCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
PAIRS = 400

# Times fewer bytes, what it is called, settings, and whether it is fitted to inputs.
RULES = (
    (8, "fold, bucket mean", "method=hash,map=fold,compression=2,memory=int8", False),
    (8, "fold, least squares", "method=hash,map=fold,compression=2,memory=int8", True),
    (8, "matched", "method=hash,map=matched,chunk=4,compression=4,memory=int8", True),
    (8, "hyper", "method=hyper,bits=4", True),
    (16, "fold, bucket mean", "method=hash,map=fold,compression=4,memory=int8", False),
    (16, "fold, least squares", "method=hash,map=fold,compression=4,memory=int8", True),
    (16, "matched", "method=hash,map=matched,chunk=8,compression=8,memory=int8", True),
    (16, "hyper", "method=hyper,bits=2", True),
)
TABLES = (
    ("fold, bucket mean", "method=hash,map=fold,compression=2,memory=float16"),
    ("matched", "method=hash,map=matched,chunk=4,compression=3,memory=float16"),
    ("hyper", "method=hyper,bits=6"),
)


def rule(settings: str) -> str:
    """For all weights, and whatever is left of them."""
    return f".*:{settings}" + (",limit=2" if "hash" in settings else "")


def stored(result: Any, name: str = "") -> float:
    """Dense bytes of compressed weights over their stored bytes."""
    sites = [s for s in result.report.sites if s.method in ("hash", "hyper") and name in s.name]
    return sum(s.bytes_before for s in sites) / sum(s.bytes_after for s in sites)


def logits(path: Path, images: torch.Tensor) -> Any:
    """What a model says of images."""
    session = onnxcomp.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def perceptron(folder: Path) -> tuple[Path, Split, float]:
    """A trained model, its images and its accuracy."""
    torch.manual_seed(0)
    plan, split = NETWORKS["digits"], digits(DATA / "eval", 8000)
    model = small_perceptron()
    train(model, split, plan.epochs, plan.rate, plan.crops)
    path = folder / "digits.onnx"
    export(model, (split.images[:2],), path, dynamic_shapes=({0: torch.export.Dim("n")},))
    return path, split, accuracy(model, split)


def digit_rows(folder: Path) -> list[dict[str, Any]]:
    """Errors and accuracies of the perceptron."""
    path, split, right = perceptron(folder)
    session = onnxcomp.InferenceSession(path)
    np.savez(folder / "x.npz", **{session.get_inputs()[0].name: split.images[:2000].numpy()})
    exact = logits(path, split.test_images)
    rows = [{"model": "digits", "times": 1, "what": "dense", "ratio": 1.0, "accuracy": right}]
    for times, what, settings, fitted in RULES:
        result = onnxcomp.optimize(
            path, folder / "small.onnx", method="hash", set_=rule(settings), precision="exact",
            data=folder / "x.npz" if fitted else None,
        )  # fmt: skip
        found = logits(folder / "small.onnx", split.test_images)
        row = {"model": "digits", "times": times, "what": what, "ratio": stored(result)}
        row["error"] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
        row["accuracy"] = float((found.argmax(1) == split.test_labels.numpy()).mean())
        print(row, flush=True)
        rows.append(row)
    return rows


def table_rows(path: Path, folder: Path) -> list[dict[str, Any]]:
    """Quality of the sentence encoder with its table of word vectors stored in less."""
    sentences, scores = read_pairs(DATA)
    half = len(sentences) // 2
    sentences = sentences[:PAIRS] + sentences[half : half + PAIRS]
    tokenizer = Tokenizer.from_file(str(DATA / "models" / "minilm_tokenizer.json"))
    batches = make_batches(tokenizer, sentences)
    dense = embed(onnxcomp.InferenceSession(path), batches)
    rows = [{"what": "dense", "ratio": 1.0, **quality(dense, dense, scores[:PAIRS])}]
    for what, settings in TABLES:
        result = onnxcomp.optimize(
            path, folder / "small.onnx", method="hash", set_=rule(settings), verify=False,
            min_size=40_000_000,
        )  # fmt: skip
        row = {"what": what, "ratio": stored(result)}
        row |= {"weight_error": max(s.weight_error or 0.0 for s in result.report.sites)}
        session = onnxcomp.InferenceSession(folder / "small.onnx")
        row |= quality(embed(session, batches), dense, scores[:PAIRS])
        print(row, flush=True)
        rows.append(row)
    return [{"model": "minilm", "times": 4, **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minilm", type=Path, help="the sentence encoder; only its rows are run")
    options = parser.parse_args()
    recorded = RESULTS / "sharing_projection.json"
    rows = json.loads(recorded.read_text())["rows"] if recorded.exists() else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh = table_rows(options.minilm, folder) if options.minilm else digit_rows(folder)
    rows = [row for row in rows if row["model"] != fresh[0]["model"]] + fresh
    rows.sort(key=lambda row: row["model"])
    shown = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in fresh]
    columns = list(fresh[-1])
    print_table(columns, [[*row, *[""] * (len(columns) - len(row))] for row in shown])
    write_results("sharing_projection", {"rows": rows})


if __name__ == "__main__":
    main()
