"""The language model for llama.cpp: the same weights as GGUF, and rounded by llama.cpp itself.

    python benchmarks/llm_gguf.py write FOLDER OUT.gguf
    python benchmarks/llm_gguf.py weigh FOLDER tokens.npy OUT.npz
    python benchmarks/llm_gguf.py round IN.gguf OUT.gguf Q4_K_M [--importance FILE.npz]

`write` needs gguf and onnx, `weigh` onnx and onnxruntime, `round` llama-cpp-python. `weigh` makes
what llama.cpp calls an importance matrix: mean squares of the inputs of every product on a
calibration text, those of the head for the tied table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Weights of a layer: their names here, and in GGUF.
PRODUCTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TABLE, LAST_NORM, HEAD_OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "logits"


def gguf_name(name: str) -> str:
    """What GGUF calls a weight."""
    if name == TABLE:
        return "token_embd.weight"
    if name == LAST_NORM:
        return "output_norm.weight"
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{({**PRODUCTS, **NORMS})['.'.join(middle)]}.weight"


def read_weights(folder: Path) -> Iterator[tuple[str, Array]]:
    """Weights by name, as the model stores them, one at a time."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    for tensor in graph.initializer:
        if tensor.name.startswith("model."):
            yield tensor.name, onnx.numpy_helper.to_array(tensor, str(folder))


def rotary_pairs(weight: Array, heads: int) -> Array:
    """Rotary pairs of ``(out, in)``: GGUF has them side by side, Hugging Face in two halves."""
    out, inner = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, inner).swapaxes(1, 2).reshape(out, inner)


def add_tokenizer(writer: Any, folder: Path) -> None:
    """Tokens, their kinds, and merges."""
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(stored["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in stored["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    writer.add_token_merges(merges)


def write(folder: Path, output: Path) -> None:
    """Write the model in float32."""
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(output), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    add_tokenizer(writer, folder)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in read_weights(folder):
        if weight.ndim == 2 and name != TABLE:
            weight = weight.T  # products are (in, out) here
        kind = name.split(".")[-2]
        if kind in heads:
            weight = rotary_pairs(weight, heads[kind])
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weigh(folder: Path, windows: Array, output: Path) -> None:
    """Mean squares of the inputs of every product, by the names of GGUF."""
    import onnx
    import onnxruntime
    from llm_rivals import Reader

    model = onnx.load(folder / "model.onnx")
    weights = {t.name for t in model.graph.initializer if t.name.startswith("model.")}
    inputs = {n.input[1]: n.input[0] for n in model.graph.node if n.op_type == "MatMul"}
    wanted = {gguf_name(w): x for w, x in inputs.items() if w in weights}
    (wanted["token_embd.weight"],) = (
        node.input[0] for node in model.graph.node if node.output[0] == HEAD_OUTPUT
    )
    asked = list(dict.fromkeys(wanted.values()))
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in asked)
    reader, taps = Reader(windows, model), output.with_suffix(".onnx")
    onnx.save(model, taps, save_as_external_data=True, location=f"{taps.name}.data")
    session = onnxruntime.InferenceSession(taps)
    sums = dict.fromkeys(asked, 0.0)
    while (feed := reader.get_next()) is not None:
        for name, found in zip(asked, session.run(asked, feed), strict=True):
            sums[name] += np.square(found, dtype=np.float64).mean((0, 1)) / len(windows)
    np.savez(output, **{name: np.float32(sums[x]) for name, x in wanted.items()})
    for file in (taps, taps.with_name(f"{taps.name}.data")):
        file.unlink()


def round_by_llama(source: Path, output: Path, kind: str, importance: Path | None) -> None:
    """Let llama.cpp round a GGUF to one of its types."""
    import llama_cpp.llama_cpp as llama

    settings = llama.llama_model_quantize_default_params()
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    if importance is not None:
        stored = dict(np.load(importance))
        table = (llama.llama_model_imatrix_data * (len(stored) + 1))()  # the last one is empty
        for entry, (name, values) in zip(table, stored.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = ctypes.cast(table, ctypes.POINTER(llama.llama_model_imatrix_data))
    paths = (str(path).encode() for path in (source, output))
    if llama.llama_model_quantize(*paths, ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot round {source} to {kind}")


def main() -> None:
    """Do what the first word says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("write", ("folder", "output")),
        ("weigh", ("folder", "tokens", "output")),
        ("round", ("source", "output")),
    ):
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, type=Path)
        if name == "round":
            command.add_argument("kind")
            command.add_argument("--importance", type=Path)
    given = parser.parse_args()
    if given.command == "write":
        write(given.folder, given.output)
    elif given.command == "weigh":
        weigh(given.folder, np.load(given.tokens), given.output)
    else:
        round_by_llama(given.source, given.output, given.kind, given.importance)


if __name__ == "__main__":
    main()
