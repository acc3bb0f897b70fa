"""A small decoder with a KV cache, a tied head, a tokenizer and a chat template.

    python tests/small_decoder.py FOLDER [--cut SMOLLM2]

It has the structure of SmolLM2: RMSNorm, rotary positions, grouped queries, a gated inner layer,
opset 17. Its two layers have random weights. With --cut they are the first two of the real model,
whose vocabulary is cut to the first 2,048 tokens. Needs onnx, numpy and tokenizers.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

LAYERS, KNOWN_OF_CUT = 2, 2048
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder; `config` names them as Hugging Face does."""

    vocabulary: int = 320
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    inner: int = 128

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "vocab_size": self.vocabulary, "hidden_size": self.width, "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head, "intermediate_size": self.inner, "rms_norm_eps": 1e-5,
            "rope_theta": 1e5, "max_position_embeddings": 512, "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


class Graph:
    """Nodes and initializers of a model in the making."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers = {name: numpy_helper.from_array(w, name) for name, w in weights.items()}

    def add(self, op_type: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        """One node; inputs that are numbers become initializers."""
        names = [given if isinstance(given, str) else self.constant(given) for given in inputs]
        output = out or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], output, **attributes))
        return output

    def constant(self, value: Any) -> str:
        array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"constant_{array.dtype}_{value}".replace(" ", "")
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def product(self, x: str, weight: str) -> str:
        return self.add("MatMul", x, weight)

    def norm(self, x: str, weight: str) -> str:
        mean = self.add("ReduceMean", self.add("Mul", x, x), axes=[-1], keepdims=1)
        root = self.add("Sqrt", self.add("Add", mean, 1e-5))
        return self.add("Mul", self.add("Div", x, root), weight)

    def turned(self, x: str, angles: tuple[str, str], half: int) -> str:
        """``x cos + (-high, low) sin`` for the two halves of each head."""
        low = self.add("Slice", x, [0], [half], [-1])
        high = self.add("Slice", x, [half], [2 * half], [-1])
        crossed = self.add("Concat", self.add("Neg", high), low, axis=-1)
        parts = [self.add("Mul", part, a) for part, a in zip((x, crossed), angles, strict=True)]
        return self.add("Add", *parts)


def mask_and_angles(g: Graph, sizes: Sizes) -> tuple[str, tuple[str, str]]:
    """What is added to scores, and cosine and sine of the positions."""
    inverse = 1e5 ** (-np.arange(0, sizes.head, 2) / sizes.head)
    g.initializers["inverse"] = numpy_helper.from_array(inverse.astype(np.float32), "inverse")
    place = g.add("Cast", g.add("Unsqueeze", "position_ids", [1, 3]), to=TensorProto.FLOAT)
    angle = g.add("Mul", place, "inverse")
    angle = g.add("Concat", angle, angle, axis=-1)
    total = g.add("Gather", g.add("Shape", "attention_mask"), 1)
    length = g.add("Gather", g.add("Shape", "input_ids"), 1)
    keys = g.add("Range", 0, total, 1)
    queries = g.add("Unsqueeze", g.add("Range", g.add("Sub", total, length), total, 1), [1])
    given = g.add("Cast", g.add("Unsqueeze", "attention_mask", [1, 2]), to=TensorProto.BOOL)
    seen = g.add("And", g.add("LessOrEqual", keys, queries), given)
    bias = g.add("Where", seen, 0.0, float(np.finfo(np.float32).min))
    return bias, (g.add("Cos", angle), g.add("Sin", angle))


def add_layer(g: Graph, sizes: Sizes, index: int, x: str, bias: str, angles: Any) -> str:
    """Attention and the gated product behind it."""
    p, half = f"model.layers.{index}", sizes.head // 2
    h = g.norm(x, f"{p}.input_layernorm.weight")
    parts = {}
    for name, count in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
        made = g.product(h, f"{p}.self_attn.{name}_proj.weight")
        made = g.add("Reshape", made, [0, 0, count, sizes.head])
        parts[name] = g.add("Transpose", made, perm=[0, 2, 1, 3])
    parts |= {name: g.turned(parts[name], angles, half) for name in ("q", "k")}
    wide = []
    for name, kind in (("k", "key"), ("v", "value")):
        past, present = f"past_key_values.{index}.{kind}", f"present.{index}.{kind}"
        cache = g.add("Unsqueeze", g.add("Concat", past, parts[name], out=present, axis=2), [2])
        cache = g.add("Expand", cache, [1, 1, sizes.heads // sizes.kv_heads, 1, 1])
        wide.append(g.add("Reshape", cache, [0, sizes.heads, -1, sizes.head]))
    scores = g.add("MatMul", parts["q"], g.add("Transpose", wide[0], perm=[0, 1, 3, 2]))
    scores = g.add("Add", g.add("Mul", scores, sizes.head**-0.5), bias)
    mixed = g.add("MatMul", g.add("Softmax", scores, axis=-1), wide[1])
    mixed = g.add("Reshape", g.add("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, sizes.width])
    x = g.add("Add", x, g.product(mixed, f"{p}.self_attn.o_proj.weight"))
    h = g.norm(x, f"{p}.post_attention_layernorm.weight")
    gate = g.product(h, f"{p}.mlp.gate_proj.weight")
    gate = g.add("Mul", gate, g.add("Sigmoid", gate))
    inner = g.add("Mul", gate, g.product(h, f"{p}.mlp.up_proj.weight"))
    return g.add("Add", x, g.product(inner, f"{p}.mlp.down_proj.weight"))


def build(sizes: Sizes, weights: Mapping[str, Array]) -> onnx.ModelProto:
    """The model; weights are ``(in, out)`` and named as Hugging Face does."""
    g = Graph(weights)
    bias, angles = mask_and_angles(g, sizes)
    x = g.add("Gather", "model.embed_tokens.weight", "input_ids")
    for index in range(LAYERS):
        x = add_layer(g, sizes, index, x, bias, angles)
    x = g.norm(x, "model.norm.weight")
    head = g.add("Transpose", "model.embed_tokens.weight", perm=[1, 0])
    g.add("MatMul", x, head, out="logits")

    def caches(prefix: str, length: str) -> list[onnx.ValueInfoProto]:
        shape = ["batch", sizes.kv_heads, length, sizes.head]
        names = [f"{prefix}.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in names]

    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
        for name, length in (
            ("input_ids", "length"), ("attention_mask", "total"), ("position_ids", "length"),
        )
    ]  # fmt: skip
    shape = ["batch", "length", sizes.vocabulary]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
    graph = helper.make_graph(
        g.nodes, "decoder", [*inputs, *caches("past_key_values", "past")],
        [logits, *caches("present", "total")], list(g.initializers.values()),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights."""
    w, kv, inner = sizes.width, sizes.kv_heads * sizes.head, sizes.inner
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes.vocabulary, w)}
    for index in range(LAYERS):
        layer = {
            "input_layernorm": (w,), "post_attention_layernorm": (w,), "self_attn.q_proj": (w, w),
            "self_attn.k_proj": (w, kv), "self_attn.v_proj": (w, kv), "self_attn.o_proj": (w, w),
            "mlp.gate_proj": (w, inner), "mlp.up_proj": (w, inner), "mlp.down_proj": (inner, w),
        }  # fmt: skip
        found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return {**found, "model.norm.weight": (w,)}


def random_weights(sizes: Sizes) -> dict[str, Array]:
    """Weights with which predictions are neither flat nor certain."""
    rng = np.random.default_rng(20)
    made = {}
    for name, shape in shapes_of(sizes).items():
        scale = 0.4 if "embed" in name else shape[0] ** -0.5
        values = rng.standard_normal(shape) * scale if len(shape) > 1 else np.ones(shape)
        made[name] = values.astype(np.float32)
    return made


def write_random(folder: Path) -> None:
    """A decoder of random weights over bytes."""
    sizes = Sizes()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *letters))}
    write(folder, sizes, random_weights(sizes), {"vocab": vocabulary, "merges": []}, SPECIAL)


def write_cut(folder: Path, source: Path) -> None:
    """The first two layers of SmolLM2, and the first tokens of its vocabulary."""
    config = json.loads((source / "config.json").read_text())
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = Sizes(KNOWN_OF_CUT, *(config[name] for name in names))
    wanted = shapes_of(sizes)
    graph = onnx.load(source / "model.onnx", load_external_data=False).graph
    weights = {}
    for tensor in graph.initializer:
        if tensor.name in wanted:
            values = numpy_helper.to_array(tensor, str(source))
            weights[tensor.name] = values[:KNOWN_OF_CUT] if "embed" in tensor.name else values
    assert {name: w.shape for name, w in weights.items()} == wanted
    stored = json.loads((source / "tokenizer.json").read_text())
    special = [token["content"] for token in stored["added_tokens"]]
    known = {t: i for t, i in stored["model"]["vocab"].items() if i < KNOWN_OF_CUT}
    merges = [tuple(m) for m in stored["model"]["merges"] if "".join(m) in known]
    write(folder, sizes, weights, {"vocab": known, "merges": merges}, special)


def write(
    folder: Path, sizes: Sizes, weights: Mapping[str, Array], words: Any, special: Any
) -> None:
    """All files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(build(sizes, weights), folder / "model.onnx")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(**words))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(sizes.config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cut", type=Path)
    given = parser.parse_args()
    if given.cut is None:
        write_random(given.folder)
    else:
        write_cut(given.folder, given.cut)
