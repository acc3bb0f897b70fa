"""The first layers of a decoder, with its own embedding and head: a small model of real weights.

    python benchmarks/cut_decoder.py $ONNXCOMP_SMOLLM2/model.onnx two_layers.onnx --layers 2
    python benchmarks/cut_decoder.py $ONNXCOMP_SMOLLM2/model.onnx cut.onnx --text valid.txt

With ``--text`` it also writes ``OUT.npz``, windows of that text as inputs for ``--data``, cut by
the `tokenizer.json` beside the model. The decoder is one whose residual stream is a chain of Adds,
two for each layer, and whose caches of layer N are named ``past_key_values.N.*`` and
``present.N.*``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from llm_texts import unspaced
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxcomp.passes.ir.model import load, save

__all__ = ["cut_decoder", "past_free_feeds", "token_windows"]

Array = npt.NDArray[Any]


def residual_stream(model: ir.Model) -> list[ir.Value]:
    """What stands between layers, from the embedding on: a value before and after each Add."""
    stream: dict[int, ir.Value] = {}
    for node in model.graph:
        begins = node.op_type == "Gather" and not stream
        if begins or (node.op_type == "Add" and any(id(value) in stream for value in node.inputs)):
            stream[id(node.outputs[0])] = node.outputs[0]
    return list(stream.values())


def layer_of(name: str) -> int:
    """Number of the layer that a cache tensor belongs to; -1 for other tensors."""
    found = re.match(r"(?:past_key_values|present)\.(\d+)\.", name)
    return int(found.group(1)) if found else -1


def cut_decoder(source: Path, target: Path, layers: int) -> Path:
    """Write a decoder with the first `layers` layers of another one.

    Args:
        source: The whole decoder.
        target: Where the small one goes, with its external data beside it.
        layers: Layers to keep.
    """
    model = load(source)
    graph = model.graph
    stream = residual_stream(model)
    if not 0 < 2 * layers < len(stream):
        raise SystemExit(f"{source} has {(len(stream) - 1) // 2} layers, not more than {layers}")
    stream[-1].replace_all_uses_with(stream[2 * layers])
    kept = [value for value in graph.outputs if layer_of(value.name or "") < layers]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)
    inputs = [value for value in graph.inputs if layer_of(value.name or "") < layers]
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    save(model, target)
    return target


def token_windows(tokenizer: Path, text: str, count: int, size: int) -> Array:
    """Token numbers of windows that are spread evenly over a text: int64 ``(count, size)``."""
    from tokenizers import Tokenizer

    tokens = np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids, np.int64)
    starts = np.linspace(0, len(tokens) - size, count).astype(int)
    return np.stack([tokens[start : start + size] for start in starts])


def past_free_feeds(model: ir.Model, windows: Array) -> dict[str, Array]:
    """Inputs of a decoder that reads whole windows, with an empty cache."""
    count, size = windows.shape
    feeds: dict[str, Array] = {
        "input_ids": windows,
        "attention_mask": np.ones_like(windows),
        "position_ids": np.tile(np.arange(size, dtype=np.int64), (count, 1)),
    }
    for value in model.graph.inputs:
        if layer_of(value.name or "") >= 0:
            assert value.shape is not None
            heads, width = (int(value.shape[axis]) for axis in (1, 3))
            feeds[value.name or ""] = np.zeros((count, heads, 0, width), np.float32)
    return feeds


def main() -> None:
    """Write the cut model, and inputs for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="layers to keep; 0 for all")
    parser.add_argument("--text", type=Path, help="text for calibration inputs")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="tokens of a window")
    options = parser.parse_args()
    path = options.source
    if options.layers:
        path = cut_decoder(options.source, options.target, options.layers)
    if options.text:
        text = unspaced(options.text.read_text(encoding="utf-8"))
        tokenizer = options.source.parent / "tokenizer.json"
        windows = token_windows(tokenizer, text, options.windows, options.size)
        np.savez(options.target.with_suffix(".npz"), **past_free_feeds(load(path), windows))


if __name__ == "__main__":
    main()
