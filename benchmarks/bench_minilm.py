"""MiniLM sentence encoder: size, retrieval quality and cost at 4, 3 and 2 bits.

    python benchmarks/bench_minilm.py MINILM.onnx --data FOLDER

FOLDER holds eval/stsb/stsb-en-dev.csv and models/minilm_tokenizer.json. Quality is the Spearman
correlation of cosine similarities with the human scores of the STS-B development set, and the mean
of 1 - cosine between the embeddings of the compressed and the dense model. The baseline is ONNX
Runtime's own round-to-nearest int4 with blocks of 128 on the same tensors: MatMulNBits for the
products, the same rounding for the tables of Gather.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime
from results import compile_model, print_table, write_results
from scipy.stats import spearmanr
from tokenizers import Tokenizer

import onnxcomp

Embeddings = npt.NDArray[np.float32]
BATCH = 64


def read_pairs(data: Path) -> tuple[list[str], npt.NDArray[np.float64]]:
    """First and second sentences, one list after the other, and the scores."""
    with (data / "eval" / "stsb" / "stsb-en-dev.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    sentences = [row[0] for row in rows] + [row[1] for row in rows]
    return sentences, np.array([float(row[2]) for row in rows])


def make_batches(tokenizer: Tokenizer, sentences: list[str]) -> list[tuple[list[int], dict]]:
    """Feeds of up to `BATCH` sentences of similar length, with the sentences' numbers."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    batches = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        tokens = np.zeros((len(chosen), len(ids[chosen[-1]])), np.int64)
        mask = np.zeros_like(tokens)
        for row, number in enumerate(chosen):
            tokens[row, : len(ids[number])] = ids[number]
            mask[row, : len(ids[number])] = 1
        batches.append((chosen, {"input_ids": tokens, "attention_mask": mask}))
    return batches


def one_thread() -> onnxruntime.SessionOptions:
    """Options that make results independent of the machine's load and number of processors."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session without the operator library."""
    return onnxruntime.InferenceSession(path, one_thread())


def embed(session: Any, batches: list[tuple[list[int], dict]]) -> Embeddings:
    """Embeddings ``(sentences, 384)`` of length 1."""
    parts = {}
    for chosen, feed in batches:
        parts.update(zip(chosen, session.run(None, feed)[0], strict=True))
    rows = np.stack([parts[number] for number in range(len(parts))])
    normed: Embeddings = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return normed


def quality(
    embeddings: Embeddings, dense: Embeddings, scores: npt.NDArray[np.float64]
) -> dict[str, float]:
    """Spearman correlation with the scores, and mean 1 - cosine to the dense embeddings."""
    first, second = np.split(embeddings.astype(np.float64), 2)
    rho = spearmanr((first * second).sum(1), scores).statistic
    return {
        "spearman": float(rho),
        "one_minus_cosine": float(np.mean(1 - (embeddings * dense).sum(1, dtype=np.float64))),
    }


def rounded_int4(table: npt.NDArray[np.float32], block: int = 128) -> npt.NDArray[np.float32]:
    """A table ``(rows, length)`` after ONNX Runtime's symmetric int4 rounding along its rows."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    rows, length = table.shape
    blocks = -(-length // block)
    columns = np.zeros((blocks * block, rows), np.float32)
    columns[:length] = table.T
    codes = np.zeros((rows, blocks, block // 2), np.uint8)
    scales, zeros = np.zeros(rows * blocks, np.float32), np.zeros((rows, -(-blocks // 2)), np.uint8)
    quantize_matmul_4bits(codes, columns, scales, zeros, block, rows, length, True)
    values = np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, blocks, block)
    dense = (values.astype(np.float32) - 8) * scales.reshape(rows, blocks, 1)
    return dense.reshape(rows, -1)[:, :length]


def int4_baseline(model: Path, tables: list[str], output: Path) -> int:
    """Write the model with MatMulNBits and rounded tables.

    Returns:
        Bytes of the file if the tables, too, were stored as int4 with float32 block scales.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)
    proto = onnx.load(model)
    saved = 0
    for tensor in proto.graph.initializer:
        if tensor.name in tables:
            table = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(rounded_int4(table), tensor.name))
            blocks = table.shape[0] * -(-table.shape[1] // 128)
            saved += table.nbytes - blocks * (64 + 4)
    config = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True)
    quantizer = MatMulNBitsQuantizer(proto, algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=False)
    return output.stat().st_size - saved


def measure(
    model: Path, bits: int, folder: Path, context: tuple[Any, Embeddings, Any]
) -> dict[str, Any]:
    """Compile at some bits and evaluate the library, portable and expanded forms."""
    batches, dense, scores = context
    small, expanded = folder / f"minilm_{bits}.onnx", folder / f"minilm_{bits}_dense.onnx"
    report = compile_model(model, small, "--bits", str(bits), "--no-verify")
    exact = folder / f"minilm_{bits}_exact.onnx"
    compile_model(model, exact, "--bits", str(bits), "--no-verify", "--precision", "exact")
    onnxcomp.expand(small, expanded)
    sessions = {
        "library": onnxcomp.InferenceSession(small, session_options=one_thread()),
        "library, exact": onnxcomp.InferenceSession(exact, session_options=one_thread()),
        "portable": open_session(small),
        "expanded": open_session(expanded),
    }
    embeddings = {name: embed(session, batches) for name, session in sessions.items()}
    gap = np.abs(embeddings["library, exact"] - embeddings["portable"]).max()
    return {
        "bits": bits,
        "exit_code": report["exit_code"],
        "bytes": report["output"]["bytes"],
        "ratio": report["ratio"],
        "coverage": report["coverage"],
        "seconds": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
        "exact_library_against_portable_max_abs": float(gap),
        "forms": {name: quality(rows, dense, scores) for name, rows in embeddings.items()},
    }


def table_names(model: Path) -> list[str]:
    """Initializers that Gather looks rows up in, of 16 KiB or more."""
    graph = onnx.load(model).graph
    sizes = {t.name: len(t.raw_data) for t in graph.initializer}
    names = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    return sorted(name for name in names if sizes.get(name, 0) >= 16384)


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    options = parser.parse_args()
    sentences, scores = read_pairs(options.data)
    tokenizer = Tokenizer.from_file(str(options.data / "models" / "minilm_tokenizer.json"))
    batches = make_batches(tokenizer, sentences)
    dense = embed(open_session(options.model), batches)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = (batches, dense, scores)
        runs = []
        for bits in options.bits:
            runs.append(measure(options.model, bits, folder, context))
            print(f"{bits} bits: {json.dumps(runs[-1]['forms'])}", flush=True)
        baseline = folder / "int4.onnx"
        size = int4_baseline(options.model, table_names(options.model), baseline)
        int4 = quality(embed(open_session(baseline), batches), dense, scores)
    results = {
        "dense": {"bytes": options.model.stat().st_size, **quality(dense, dense, scores)},
        "int4_block_128": {"bytes": size, **int4},
        "runs": runs,
    }
    print_results(results)
    print(write_results("minilm", results))


def print_results(results: dict[str, Any]) -> None:
    """Print one line for each model."""
    original = results["dense"]["bytes"]
    columns = ("model", "bytes", "ratio", "Spearman", "1 - cosine", "seconds", "peak RSS")
    rows: list[tuple[object, ...]] = [
        ("dense", original, "1.00", f"{results['dense']['spearman']:.4f}", "0", "", "")
    ]
    int4 = results["int4_block_128"]
    rows.append(
        (
            "MatMulNBits int4, block 128",
            int4["bytes"],
            f"{original / int4['bytes']:.2f}",
            f"{int4['spearman']:.4f}",
            f"{int4['one_minus_cosine']:.5f}",
            "",
            "",
        )
    )
    for run in results["runs"]:
        for form, score in run["forms"].items():
            rows.append(
                (
                    f"{run['bits']} bits, {form}",
                    run["bytes"],
                    f"{run['ratio']:.2f}",
                    f"{score['spearman']:.4f}",
                    f"{score['one_minus_cosine']:.5f}",
                    f"{run['seconds']['total']:.1f}",
                    f"{run['peak_rss_bytes'] / 1e9:.3f} GB",
                )
            )
    print_table(columns, rows)


if __name__ == "__main__":
    main()
