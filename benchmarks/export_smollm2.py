"""SmolLM2-135M's own weights in a module of transformers, and out again through its exporters.

The weights come from an ONNX model, whose logits the module has to give. What an exporter makes of
the module is compressed without data, read on a text beside the dense graph, and generates.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
import transformers
from llm_texts import TEXTS
from tokenizers import Tokenizer

import onnxcomp
from onnxcomp.errors import CompressionError
from onnxcomp.models import decoder_example, export
from onnxcomp.runtime.language.decoder import Decoder

__all__ = ["SMOLLM2", "Row", "common", "generated", "measure_smollm2", "missing", "outcome"]

SMOLLM2 = "SmolLM2-135M"
PROMPT = "The history of the steam engine begins in the"
STEPS, WINDOWS = 32, 5

# Logits of module and model differ by rounding alone, relative to their norm.
TOLERANCE = 1e-4

Row = dict[str, Any]
Array = npt.NDArray[Any]


def generated(session: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """Greedy tokens behind a prompt, with a cache that starts empty."""
    decoder, step = Decoder(session), list(prompt)
    tokens: list[int] = []
    for _ in range(steps):
        step = [int(decoder.step(np.array([step]))[0, -1].argmax())]
        tokens += step
    return tokens


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    same = [a == b for a, b in zip(one, other, strict=True)]
    return same.index(False) if False in same else len(same)


def outcome(report: Any) -> Row:
    """What `optimize` made of a graph."""
    verify = report.to_json().get("verify") or {}
    return {
        "bytes_before": report.input.bytes,
        "bytes": report.output.bytes,
        "ratio": round(report.ratio, 2),
        "weights": round(report.coverage, 4),
        "verified": bool(verify.get("passed")),
    }


def missing(folder: Path | None, data: Path | None) -> str:
    """Why the model cannot be measured; empty where it can."""
    if folder is None or not (folder / "model.onnx").is_file():
        return f"no model.onnx in {folder}: set ONNXCOMP_SMOLLM2 or --smollm2"
    if data is None or not (data / "eval" / TEXTS["wikitext"]).is_file():
        return f"no eval/{TEXTS['wikitext']} in {data}: set ONNXCOMP_DATA or --data"
    return ""


def module_of(folder: Path) -> Any:
    """The module of transformers with the weights of ``model.onnx``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    stored = onnx.load(folder / "model.onnx").graph.initializer
    named = {tensor.name: tensor for tensor in stored}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            array = onnx.numpy_helper.to_array(named[name])
            # Of products the graph holds (in, out), the module (out, in).
            turned = array.T if name.endswith("proj.weight") else array
            parameter.copy_(torch.from_numpy(np.array(turned)))
    return model


def logits_of(model: Any, prompt: Sequence[int]) -> Array:
    """What the module says about every token of a prompt."""
    with torch.no_grad():
        found: Array = model(input_ids=torch.tensor([prompt])).logits.numpy()
    return found


def read_by(path: Path, prompt: Sequence[int]) -> Array:
    """What an ONNX model says about every token of a prompt."""
    return Decoder(onnxruntime.InferenceSession(path)).logits(np.array([prompt]))


def score(small: Path, dense: Path, text: Path, tokenizer: Path) -> Row:
    """The compressed model beside the dense graph on the first windows of a text."""
    found = onnxcomp.evaluate_lm(small, dense, text=text, windows=WINDOWS, tokenizer=tokenizer)
    kept = ("windows", "context", "perplexity", "reference_perplexity", "kl", "same_token")
    return {name: value for name, value in found.to_json().items() if name in kept}


def difference(found: Array, wanted: Array) -> float:
    """Relative L2 difference."""
    return float(f"{np.linalg.norm(found - wanted) / np.linalg.norm(wanted):.2g}")


def _exported(model: Any, exporter: str, dense: Path) -> None:
    """Make the dense graph, in a folder of its own until it is whole."""
    if dense.is_file():
        return
    dense.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dense.parent.parent) as folder:
        made = Path(folder) / exporter
        made.mkdir()
        path = made / dense.name
        export(model, (), path, **decoder_example(model), exporter=exporter)
        shutil.rmtree(dense.parent, ignore_errors=True)
        made.rename(dense.parent)


def measure_smollm2(source: Path, data: Path, exporter: str, work: Path, bits: float) -> Row:
    """One way out of torch.

    Args:
        source: The folder with the model.
        data: The folder of evaluation data.
        exporter: "dynamo" or "torchscript", of `export`.
        work: Where the exported graph stays; if it is there, it is not made again.
        bits: Bits for each weight.
    """
    row: Row = {"model": SMOLLM2, "exporter": exporter}
    dense, small = work / "model.onnx", work / "small.onnx"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    model = module_of(source)
    vocabulary = model.config.vocab_size
    logits = logits_of(model, prompt)
    row["module"] = difference(logits, read_by(source / "model.onnx", prompt))
    assert row["module"] < TOLERANCE, f"the module is not the model: {row['module']}"
    try:
        _exported(model, exporter, dense)
    except CompressionError as error:
        return {**row, "failed": error.message, "hint": error.hint}
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    del model
    row["exported"] = difference(read_by(dense, prompt), logits)
    report = onnxcomp.optimize(dense, small, force=True, bits=bits).report
    row |= outcome(report)
    row["tables"] = [sorted(s.uses) for s in report.sites if vocabulary in s.shape]
    row["score"] = score(small, dense, data / "eval" / TEXTS["wikitext"], source)
    exact = generated(onnxruntime.InferenceSession(dense), prompt, STEPS)
    ours = generated(onnxcomp.InferenceSession(small), prompt, STEPS)
    row["tokens"] = {
        "of": STEPS,
        "dense_and_module": common(exact, wanted),
        "compressed_and_dense": common(ours, exact),
    }
    row["texts"] = {"dense": tokenizer.decode(exact), "compressed": tokenizer.decode(ours)}
    return row
