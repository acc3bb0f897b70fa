"""Chat with a language model, compressed or not: only ONNX Runtime, numpy and tokenizers.

    python chat.py MODEL.onnx [--library libonnxcomp_ops.so] [--say "What is a codec?"]

The folder of the model holds tokenizer.json; --folder names another one, such as that of the
original. `onnxcomp ops path` prints the file of the operator library. Without it, and without
onnxcomp installed, the same model runs by the definitions inside it. The answer appears as it is
written. The cache stays in ONNX Runtime from one token to the next.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers

# What ends an answer in the usual chat formats.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}


class Decoder:
    """A model with a KV cache, as exporters write it: past_key_values.N.key and present.N.key."""

    def __init__(self, model: Path, library: str | None, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if library:
            options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        pasts = [name for name in self.inputs if name.startswith("past")]
        self.following = {re.sub("past(_key_values)?", "present", name): name for name in pasts}
        if not pasts or not {"logits", *self.following} <= set(names):
            raise SystemExit(f"{model} is no decoder with a KV cache")
        self.reset()

    def reset(self) -> None:
        """Empty the cache: one sequence without positions."""
        self.length = 0
        self.caches = {}
        for name in self.following.values():
            value = self.inputs[name]
            sizes = iter((1, 0))  # of the free dimensions: the batch, then the positions
            shape = [size if isinstance(size, int) else next(sizes) for size in value.shape]
            empty = np.zeros(shape, TYPES[value.type])
            self.caches[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)

    def feed(self, tokens: list[int]) -> Any:
        """Scores ``(vocabulary,)`` of the token that follows these."""
        total = self.length + len(tokens)
        given = {
            "input_ids": [tokens],
            "attention_mask": np.ones((1, total)),
            "position_ids": [np.arange(self.length, total)],
        }
        binding = self.session.io_binding()
        for name in given.keys() & self.inputs.keys():
            kind = TYPES.get(self.inputs[name].type, np.int64)
            binding.bind_cpu_input(name, np.asarray(given[name], kind))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
        for name in ("logits", *self.following):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, *caches = binding.get_outputs()
        self.caches = dict(zip(self.following.values(), caches, strict=True))
        self.length = total
        return logits.numpy()[0, -1].astype(np.float32)


def chat_format(folder: Path) -> Callable[[list[dict[str, str]]], str]:
    """What turns messages into the text that the model reads.

    It is the template of the folder where there is one and jinja2 is installed, else ChatML.
    """
    template = folder / "chat_template.jinja"
    if template.exists():
        try:
            from jinja2 import Environment
        except ImportError:
            print("jinja2 is not installed: the chat is written in ChatML", file=sys.stderr)
        else:
            made = Environment().from_string(template.read_text(encoding="utf-8"))
            return lambda messages: made.render(messages=messages, add_generation_prompt=True)
    turn = "<|im_start|>{role}\n{content}<|im_end|>\n"
    return lambda messages: (
        "".join(turn.format(**message) for message in messages) + "<|im_start|>assistant\n"
    )


def choose(scores: Any, temperature: float, top_p: float, rng: np.random.Generator) -> int:
    """The likeliest token at temperature 0, else one drawn from the likeliest share `top_p`."""
    if temperature <= 0:
        return int(scores.argmax())
    scaled = np.exp((scores - scores.max()) / temperature)
    order = np.argsort(-scaled)
    shares = scaled[order] / scaled.sum()
    kept = int(np.searchsorted(np.cumsum(shares), top_p)) + 1
    return int(rng.choice(order[:kept], p=shares[:kept] / shares[:kept].sum()))


def answer(
    decoder: Decoder, tokens: list[int], ends: set[int], most: int, pick: Callable[[Any], int]
) -> Iterator[int]:
    """Tokens of an answer; the one that ends it is not among them."""
    scores = decoder.feed(tokens)
    for _ in range(most):
        token = pick(scores)
        if token in ends:
            break
        yield token
        scores = decoder.feed([token])


def spoken(tokenizer: tokenizers.Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as it becomes known: a character may take several tokens."""
    found: list[int] = []
    shown = ""
    for token in tokens:
        found.append(token)
        text = tokenizer.decode(found)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")
        yield text[len(shown) :] if whole else ""
        shown = text if whole else shown


def talk(given: argparse.Namespace) -> None:
    """One turn after the other, until there is no more input."""
    folder = given.folder or given.model.parent
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = {found for word in ENDS if (found := tokenizer.token_to_id(word)) is not None}
    decoder = Decoder(given.model, given.library, given.threads)
    written, messages, read = chat_format(folder), [], ""
    rng = np.random.default_rng(given.seed)

    def pick(scores: Any) -> int:
        return choose(scores, given.temperature, given.top_p, rng)

    for line in given.say or iter(lambda: input("> "), ""):
        messages.append({"role": "user", "content": line})
        text = written(messages)
        if not text.startswith(read):  # this template writes earlier turns in another way
            decoder.reset()
            read = ""
        # The cache holds the turns before: only what is new is read.
        tokens = tokenizer.encode(text[len(read) :], add_special_tokens=False).ids
        start, pieces = time.perf_counter(), []
        for piece in spoken(tokenizer, answer(decoder, tokens, ends, given.tokens, pick)):
            print(piece, end="", flush=True)
            pieces.append(piece)
        speed = len(pieces) / (time.perf_counter() - start)
        about = f"{len(tokens)} tokens read, {len(pieces)} written, {speed:.1f} a second"
        print(flush=True)
        print(f"[{about}]", file=sys.stderr)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        read = text + "".join(pieces)


def main() -> None:
    """Read the command line and talk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--library", help="the operator library; none: the portable form")
    parser.add_argument("--folder", type=Path, help="folder of tokenizer.json; else the model's")
    parser.add_argument("--say", action="append", help="a turn; may be repeated; else it is asked")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    try:
        talk(parser.parse_args())
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
