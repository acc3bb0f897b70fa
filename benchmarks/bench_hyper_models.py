"""Quality of whole models: hyper, plain and calibrated, against integer rounding and GPTQ.

    python benchmarks/bench_hyper_models.py --data FOLDER [--minilm MINILM.onnx] [--windows 60]

FOLDER is laid out as for the other benchmarks. The language model (lm/tinyllama_ref.onnx, windows
of 256 tokens, not overlapping) is judged by the Kullback-Leibler divergence of its predictions from
the dense model's, by agreement of the most probable token, and by perplexity; MiniLM by STS-B
development pairs. Calibration data: lm/calib.npy, and sentences of the STS-B training set; no
sentence of either evaluation is among them. All models compress the same tensors.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from bench_minilm import embed, make_batches, quality, read_pairs
from integer_rounding import gptq_model, round_model
from results import RESULTS, print_table, write_results
from tokenizers import Tokenizer

import onnxcomp
from onnxcomp.passes.calibrate import Stats, collect, split_batches
from onnxcomp.passes.canonicalize import canonicalize
from onnxcomp.passes.graph import load
from onnxcomp.passes.sites import find_sites

Array = npt.NDArray[Any]
Judge = Callable[[Path], dict[str, float]]
CONTEXT, BATCH = 256, 4
SETS = ("books", "shakespeare")
TRAINING_PAIRS = 1500


def _log_probabilities(session: Any, tokens: Array) -> Iterator[Array]:
    """Natural logarithms of predictions, float32 ``(batch, context, vocabulary)``."""
    for start in range(0, len(tokens), BATCH):
        logits = session.run(None, {"input_ids": tokens[start : start + BATCH]})[0]
        logits = logits.astype(np.float32)
        logits -= logits.max(axis=-1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


class LanguageModel:
    """Judges forms of the language model by the dense one.

    Args:
        model: The dense model.
        folder: Where the token files are.
        windows: Windows of each set.
    """

    def __init__(self, model: Path, folder: Path, windows: int) -> None:
        self.model = model
        self.tokens: dict[str, tuple[Array, Array]] = {}
        for name in SETS:
            ids = np.load(folder / f"eval_{name}.npy").astype(np.int64).reshape(-1)
            count = min(windows, (len(ids) - 1) // CONTEXT)
            shape = (count, CONTEXT)
            used = count * CONTEXT
            self.tokens[name] = ids[:used].reshape(shape), ids[1 : used + 1].reshape(shape)
        session = onnxruntime.InferenceSession(model)
        self.dense = {
            name: np.concatenate(list(_log_probabilities(session, fed)))
            for name, (fed, _) in self.tokens.items()
        }

    def __call__(self, path: Path) -> dict[str, float]:
        """Divergence, agreement and perplexity on each set."""
        session = onnxcomp.InferenceSession(path)
        result: dict[str, float] = {}
        for name, (fed, wanted) in self.tokens.items():
            divergence = surprise = 0.0
            agreeing = 0
            for index, found in enumerate(_log_probabilities(session, fed)):
                part = slice(index * BATCH, index * BATCH + len(found))
                exact, targets = self.dense[name][part], wanted[part]
                divergence += float((np.exp(exact) * (exact - found)).sum(dtype=np.float64))
                agreeing += int((exact.argmax(-1) == found.argmax(-1)).sum())
                picked = np.take_along_axis(found, targets[..., None], -1)
                surprise -= float(picked.sum(dtype=np.float64))
            result[f"{name}_kl"] = divergence / wanted.size
            result[f"{name}_agreement"] = agreeing / wanted.size
            result[f"{name}_perplexity"] = float(np.exp(surprise / wanted.size))
        result["kl"] = float(np.mean([result[f"{name}_kl"] for name in SETS]))
        return result


class SentenceModel:
    """Judges forms of MiniLM by STS-B and by the dense model."""

    def __init__(self, model: Path, data: Path) -> None:
        self.model = model
        self.tokenizer = Tokenizer.from_file(str(data / "models" / "minilm_tokenizer.json"))
        sentences, self.scores = read_pairs(data)
        self.batches = make_batches(self.tokenizer, sentences)
        self.dense = embed(onnxruntime.InferenceSession(model), self.batches)

    def __call__(self, path: Path) -> dict[str, float]:
        """Spearman correlation and mean 1 - cosine."""
        found = embed(onnxcomp.InferenceSession(path), self.batches)
        return quality(found, self.dense, self.scores)

    def calibration(self, data: Path) -> list[dict[str, Array]]:
        """Training sentences that are not among the evaluated ones."""
        evaluated = set(read_pairs(data)[0])
        file = data / "eval" / "stsb" / "stsb-en-train.csv"
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines))
        step = max(1, len(rows) // TRAINING_PAIRS)
        sentences = [text for row in rows[::step] for text in row[:2]]
        unseen = list(dict.fromkeys(text for text in sentences if text not in evaluated))
        return [feed for _, feed in make_batches(self.tokenizer, unseen)]


def statistics(model: Path, feeds: list[dict[str, Array]]) -> dict[str, Stats]:
    """Second moments of the dense model, by name of the MatMul node."""
    loaded = load(model)
    canonicalize(loaded)
    found = {}
    for stats in collect(loaded, feeds, find_sites(loaded).sites):
        found.update({use.node: stats for use in stats.site.uses if use.op_type == "MatMul"})
    return found


def compile_hyper(model: Path, output: Path, bits: int, data: Any, **options: Any) -> int:
    """Write the model with hyper; return its bytes."""
    result = onnxcomp.optimize(
        model, output, method="hyper", bits=bits, data=data, verify=False, **options
    )
    return result.report.output.bytes


def forms(
    model: Path, folder: Path, feeds: list[dict[str, Array]], best: bool
) -> Iterator[tuple[str, Path, int]]:
    """Name, file and bytes of every form of a model, one after the other."""
    for bits, symmetric in ((4, True), (4, False), (2, False)):
        path = folder / f"rounded{bits}{symmetric}.onnx"
        kind = "symmetric" if symmetric else "asymmetric"
        yield f"RTN int{bits}, {kind}", path, round_model(model, path, bits, symmetric=symmetric)
    stats = statistics(model, feeds)
    for bits in (4, 2):
        path = folder / f"gptq{bits}.onnx"
        yield f"GPTQ int{bits} (numpy), asymmetric", path, gptq_model(model, path, bits, stats)
    del stats
    for bits in (4, 3, 2):
        path = folder / f"plain{bits}.onnx"
        yield f"hyper {bits}", path, compile_hyper(model, path, bits, None)
        path = folder / f"calibrated{bits}.onnx"
        yield f"hyper {bits}, calibrated", path, compile_hyper(model, path, bits, feeds)
        if best:
            path = folder / f"best{bits}.onnx"
            size = compile_hyper(model, path, bits, feeds, set_=".*:state_bits=12")
            yield f"hyper {bits}, calibrated, 12 state bits", path, size


def compare(
    judge: LanguageModel | SentenceModel, feeds: list[dict[str, Array]], best: bool
) -> list[dict[str, Any]]:
    """One row for each form, the dense model first."""
    size = judge.model.stat().st_size
    rows: list[dict[str, Any]] = [{"name": "dense", "bytes": size, **judge(judge.model)}]
    with tempfile.TemporaryDirectory() as folder:
        for name, path, size in forms(judge.model, Path(folder), feeds, best):
            rows.append({"name": name, "bytes": size, **judge(path)})
            print(rows[-1], flush=True)
    return rows


def bars(rows: list[dict[str, Any]], key: str) -> dict[str, bool]:
    """Which of the promised comparisons hold; the smaller `key` the better."""
    loss = {row["name"]: row[key] for row in rows}
    rounding = min(loss["RTN int4, symmetric"], loss["RTN int4, asymmetric"])
    gptq = loss["GPTQ int4 (numpy), asymmetric"]
    two = min(loss["RTN int2, asymmetric"], loss["GPTQ int2 (numpy), asymmetric"])
    return {
        "hyper 4 at most half of RTN int4": loss["hyper 4"] <= rounding / 2,
        "hyper 4, calibrated, at most half of RTN int4": loss["hyper 4, calibrated"]
        <= rounding / 2,
        "hyper 4, calibrated, not above GPTQ int4": loss["hyper 4, calibrated"] <= gptq,
        "hyper 3, calibrated, not above RTN int4": loss["hyper 3, calibrated"] <= rounding,
        "hyper 2, calibrated, below a third of the best int2": loss["hyper 2, calibrated"]
        < two / 3,
    }


def show(title: str, rows: list[dict[str, Any]], key: str) -> dict[str, bool]:
    """Print one table and the comparisons."""
    columns = [name for name in rows[0] if name not in ("name", "bytes")]
    print(f"\n{title}")
    cells = [
        [row["name"], row["bytes"], f"{rows[0]['bytes'] / row['bytes']:.2f}"]
        + [f"{row[column]:.5f}" for column in columns]
        for row in rows
    ]
    print_table(("model", "bytes", "ratio", *columns), cells)
    held = bars(rows, key)
    for text, met in held.items():
        print(f"{'met   ' if met else 'MISSED'}  {text}")
    return held


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path, help="leave away to skip MiniLM")
    parser.add_argument("--windows", type=int, default=60, help="of each set; 0 skips the model")
    parser.add_argument("--best", action="store_true", help="also with 12 state bits")
    options = parser.parse_args()
    results = earlier_results()
    if options.windows:
        folder = options.data / "lm"
        language = LanguageModel(folder / "tinyllama_ref.onnx", folder, options.windows)
        tokens = np.load(folder / "calib.npy").astype(np.int64)
        feeds = split_batches([{"input_ids": tokens}], {"input_ids": ("batch", "tokens")})
        rows = compare(language, [dict(feed) for feed in feeds], options.best)
        held = show("language model", rows, "kl")
        results["language_model"] = {"windows": options.windows, "rows": rows, "bars": held}
        write_results("hyper_models", results)
    if options.minilm is not None:
        sentences = SentenceModel(options.minilm, options.data)
        rows = compare(sentences, sentences.calibration(options.data), options.best)
        held = show("MiniLM", rows, "one_minus_cosine")
        results["minilm"] = {"rows": rows, "bars": held}
    print(write_results("hyper_models", results))


def earlier_results() -> dict[str, Any]:
    """What an earlier run has found, to be replaced part by part."""
    if not (RESULTS / "hyper_models.json").exists():
        return {}
    document = json.loads((RESULTS / "hyper_models.json").read_text(encoding="utf-8"))
    return {name: document[name] for name in ("language_model", "minilm") if name in document}


if __name__ == "__main__":
    main()
