"""Architectures of transformers through the exporters: exported, compressed, fused, and generating.

    python benchmarks/bench_exports.py [--only NAME ...] [--exporters NAME ...] [--smollm2 FOLDER]
        [--data FOLDER] [--work FOLDER]

Needs torch and transformers, and optimum for the exporter of that name. Models are small, with
random weights: what is shown is which graphs the exporters make of each architecture and what
becomes of them. SmolLM2-135M alone has weights of its own (`export_smollm2.py`): those of the
model.onnx in its folder ($ONNXCOMP_SMOLLM2). It reads a text of the folder of data
($ONNXCOMP_DATA), and is left out where they are not there. Its exports stay in the last folder and
are taken from there again. Optimum is not asked for it. For each architecture and way out of torch:

* `exported`: relative L2 difference of the graph to the module, on inputs of three sizes;
* `weights`: share of the bytes of weights that are compressed, and `ratio`: bytes before and after;
* `tokens`: of decoders, greedy tokens behind a prompt, in common with the module (the dense graph),
  and of the compressed model with the library in common with its portable form, with
  ``--precision exact``;
* `fused`: the same of the graph after ONNX Runtime's optimizers, with the fused operators it has.

Rows of models that are not asked for stay what they were in ``results/exports.json``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import transformers
from export_smollm2 import (
    SMOLLM2,
    Row,
    common,
    generated,
    measure_smollm2,
    missing,
    outcome,
)
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.errors import CompressionError
from onnxcomp.models import decoder_example, export

WIDTH, HEADS, LAYERS, TOKENS, STEPS = 96, 4, 2, 256, 16
PROMPT = (3, 14, 15, 92, 65, 35, 89)
EXPORTERS = ("dynamo", "torchscript")

# Tasks of optimum's exporter, for other models than decoders.
TASKS = {"ViT": "image-classification", "CLIP": "zero-shot-image-classification"}


def _decoder(kind: str, **options: Any) -> Any:
    shape = {
        "vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 160,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 128,
        "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**shape, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=128,
        initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=TOKENS, d_model=WIDTH, d_kv=24, d_ff=160, num_layers=LAYERS, num_heads=HEADS,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=TOKENS, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=160,
        decoder_ffn_dim=160, num_mel_bins=16, max_source_positions=50, max_target_positions=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def _clip() -> Any:
    tower = {
        "hidden_size": WIDTH, "intermediate_size": 160, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }  # fmt: skip
    text = {"vocab_size": TOKENS, "max_position_embeddings": 32, "eos_token_id": 2, **tower}
    vision = {"image_size": 32, "patch_size": 8, **tower}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
    return transformers.CLIPModel(config)


def _vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=WIDTH, intermediate_size=160, num_hidden_layers=LAYERS, image_size=32,
        num_attention_heads=HEADS, patch_size=8, num_labels=50,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _pictures(model: Any) -> Row:
    del model
    sizes = [{"pixel_values": torch.randn(count, 3, 32, 32)} for count in (2, 1, 3)]
    return _arguments(sizes, {"pixel_values": {0: "batch"}})


def _pairs(model: Any) -> Row:
    del model
    steps = [
        {
            "input_ids": torch.randint(3, TOKENS, (texts, length)),
            "pixel_values": torch.randn(images, 3, 32, 32),
            "attention_mask": torch.ones(texts, length, dtype=torch.int64),
        }
        for texts, length, images in ((2, 5, 2), (1, 8, 3), (3, 2, 1))
    ]
    words = {0: "texts", 1: "length"}
    free = {"input_ids": words, "pixel_values": {0: "images"}, "attention_mask": words}
    return _arguments(steps, free)


def _encoded(model: Any) -> Row:
    """Steps of a decoder with its cache and that of the encoder."""
    speech = hasattr(model.config, "num_mel_bins")

    def step(batch: int, length: int, past: int) -> Row:
        ids = torch.randint(3, TOKENS, (batch, past + length))
        mask = torch.ones(batch, 5, dtype=torch.int64)
        given: Row = {"input_ids": torch.randint(3, TOKENS, (batch, 5)), "attention_mask": mask}
        if speech:
            given = {"input_features": torch.randn(batch, 16, 100)}
        with torch.no_grad():
            found = model(**given, decoder_input_ids=ids[:, :past], use_cache=True)
        name = "cache" if "cache" in found else "past_key_values"
        own = {} if speech else {"attention_mask": mask}
        return {
            **own,
            "encoder_outputs": (found.encoder_last_hidden_state,),
            "decoder_input_ids": ids[:, past:],
            "decoder_attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
            name: found[name],
            "use_cache": True,
        }

    free = {
        "attention_mask": {0: "batch", 1: "source"},
        "decoder_input_ids": {0: "batch", 1: "length"},
        "decoder_attention_mask": {0: "batch", 1: "total"},
        "encoder_outputs": [{0: "batch", 1: "source"}],
    }
    steps = [step(*sizes) for sizes in ((2, 2, 3), (1, 1, 6), (3, 4, 1))]
    return _arguments(steps, {name: dims for name, dims in free.items() if name in steps[0]})


def _arguments(steps: Sequence[Row], free: Row) -> Row:
    return {"kwargs": steps[0], "dynamic_shapes": free, "checks": list(steps[1:])}


# Architecture: the module, and the arguments of `export` for it. Decoders also generate.
MODELS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Row]]] = {
    "Llama, tied": (
        lambda: _decoder("Llama", num_key_value_heads=2, tie_word_embeddings=True),
        decoder_example,
    ),
    "Qwen2": (lambda: _decoder("Qwen2", num_key_value_heads=2), decoder_example),
    "Qwen3, tied": (
        lambda: _decoder("Qwen3", num_key_value_heads=2, head_dim=24, tie_word_embeddings=True),
        decoder_example,
    ),
    "GPT-2": (_gpt2, decoder_example),
    "Phi": (lambda: _decoder("Phi"), decoder_example),
    "Phi-3": (lambda: _decoder("Phi3", num_key_value_heads=2), decoder_example),
    "T5, decoder": (_t5, _encoded),
    "Whisper, decoder": (_whisper, _encoded),
    "CLIP": (_clip, _pairs),
    "ViT": (_vit, _pictures),
}


def tokens_of(model: Any, dense: Path, small: Path, prompt: Sequence[int], options: Row) -> Row:
    """Greedy tokens that forms have in common, in exact arithmetic: random weights are touchy."""
    onnxcomp.optimize(dense, small, precision="exact", verify=False, **options)
    wanted = model.generate(
        torch.tensor([list(prompt)]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    ours = generated(onnxcomp.InferenceSession(small), prompt, STEPS)
    portable = generated(onnxruntime.InferenceSession(small), prompt, STEPS)
    exact = generated(onnxruntime.InferenceSession(dense), prompt, STEPS)
    return {
        "of": STEPS,
        "dense_and_module": common(exact, wanted),
        "library_and_portable": common(ours, portable),
        "compressed_and_module": common(portable, wanted),
    }


def compressed(model: Path, output: Path, **options: Any) -> Row:
    """What `optimize` makes of a graph."""
    report = onnxcomp.optimize(model, output, force=True, **options).report
    return outcome(report)


def fused(dense: Path, folder: Path, options: Row) -> Row:
    """The graph after ONNX Runtime's optimizers, compressed: the script's, and a session's."""
    from onnxruntime.transformers.optimizer import optimize_model

    found: Row = {}
    for name, kind in (("optimizer", "gpt2"), ("session", None)):
        path = folder / f"{name}.onnx"
        try:
            if kind is not None:
                made = optimize_model(
                    str(dense), model_type=kind, num_heads=HEADS, hidden_size=WIDTH, opt_level=0
                )
                made.save_model_to_file(str(path))
            else:
                settings = onnxruntime.SessionOptions()
                settings.optimized_model_filepath = str(path)
                level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
                settings.graph_optimization_level = level
                onnxruntime.InferenceSession(dense, settings)
            nodes = onnx.load(path, load_external_data=False).graph.node
            operators = Counter(node.op_type for node in nodes if node.domain == "com.microsoft")
            row = compressed(path, folder / f"{name}.small.onnx", **options)
            found[name] = {**row, "operators": dict(sorted(operators.items()))}
        except Exception as error:  # of every kind: ONNX Runtime's optimizer has its own
            found[name] = {"failed": str(error).splitlines()[0][:200]}
    return found


def by_optimum(name: str, folder: Path, options: Row) -> Row:
    """One architecture through optimum's own exporter, which writes a file by itself."""
    from optimum.exporters.onnx import onnx_export_from_model

    make, arguments = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    row: Row = {"model": name, "exporter": "optimum"}
    task = TASKS.get(name, "text-generation-with-past")
    try:
        onnx_export_from_model(model, folder, task=task, do_validation=False, device="cpu")
    except Exception as error:  # of every kind: it runs the module's own code
        return {**row, "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    dense = folder / "model.onnx"
    if name in TASKS:  # it leaves even the number of channels free
        options = {**options, "shapes": {"pixel_values": [2, 3, 32, 32]}}
    row |= compressed(dense, folder / "small.onnx", **options)
    if arguments is decoder_example:
        row["tokens"] = tokens_of(model, dense, folder / "exact.onnx", PROMPT, options)
    return {**row, "fused": fused(dense, folder, options)}


def measure(name: str, exporter: str, folder: Path, options: Row) -> Row:
    """One architecture through one exporter."""
    make, arguments = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    dense, small = folder / "dense.onnx", folder / "small.onnx"
    row: Row = {"model": name, "exporter": exporter}
    try:
        result = export(
            model, (), small, **arguments(model), exporter=exporter, dense=dense, **options
        )
    except CompressionError as error:
        return {**row, "failed": error.message, "hint": error.hint}
    assert result.torch is not None
    exported = max(metrics.rel_l2 for metrics in result.torch.exported.values())
    row |= {"exported": float(f"{exported:.2g}"), **outcome(result.report)}
    row["bytes_before"] = dense.stat().st_size
    row["ratio"] = round(row["bytes_before"] / row["bytes"], 2)
    if arguments is decoder_example:
        row["tokens"] = tokens_of(model, dense, folder / "exact.onnx", PROMPT, options)
    row["fused"] = fused(dense, folder, options)
    return row


def write(rows: Mapping[tuple[str, str], Row], bits: float) -> None:
    """Write all rows, models in the order of the list."""
    order = {name: number for number, name in enumerate((*MODELS, SMOLLM2))}
    ordered = sorted(rows.values(), key=lambda row: (order[row["model"]], row["exporter"]))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_results("exports", {"versions": versions, "bits": bits, "rows": ordered})


def print_rows(rows: Sequence[Row]) -> None:
    """Print one line for each row."""

    def cell(row: Row) -> Sequence[object]:
        if "failed" in row:
            return (row["model"], row["exporter"], row["failed"][:60], "", "", "", "")
        tokens = row.get("tokens", {})
        same = tokens.get("library_and_portable", tokens.get("compressed_and_dense"))
        both = f"{same} of {tokens['of']}" if tokens else ""
        after = {name: found.get("ratio", "failed") for name, found in row.get("fused", {}).items()}
        return (
            row["model"], row["exporter"], row.get("exported", ""), f"{row['weights']:.1%}",
            row["ratio"], both, after,
        )  # fmt: skip

    columns = ("model", "exporter", "exported", "weights", "ratio", "tokens", "fused")
    print_table(columns, [cell(row) for row in rows])


def main() -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[*MODELS, SMOLLM2])
    parser.add_argument("--exporters", nargs="*", default=list(EXPORTERS))
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("ONNXCOMP_SMOLLM2"))
    parser.add_argument("--data", type=Path, default=os.environ.get("ONNXCOMP_DATA"))
    parser.add_argument("--work", type=Path, default=RESULTS.parents[1] / ".cache" / "exports")
    parser.add_argument("--bits", type=float, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    options = {"bits": given.bits, "min_size": "16KiB"}
    path = RESULTS / "exports.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {(row["model"], row["exporter"]): row for row in known}
    reason = missing(given.smollm2, given.data) if SMOLLM2 in given.only else ""
    if reason:
        print(f"{SMOLLM2} is left out: {reason}")
    for name, exporter in itertools.product(given.only, given.exporters):
        if name == SMOLLM2 and (reason or exporter not in EXPORTERS):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name == SMOLLM2:
                work = given.work / exporter
                row = measure_smollm2(given.smollm2, given.data, exporter, work, given.bits)
            elif exporter == "optimum":
                row = by_optimum(name, Path(folder), options)
            else:
                row = measure(name, exporter, Path(folder), options)
        rows[name, exporter] = row
        write(rows, given.bits)
    print_rows(list(rows.values()))


if __name__ == "__main__":
    main()
