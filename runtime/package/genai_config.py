"""The configuration that onnxruntime-genai wants, for a folder as Hugging Face writes it.

Its names of inputs and outputs come from the model itself, numbers that the model does not tell
from ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.runtime.language.decoder import Interface, interface_of
from onnxcomp.runtime.package.contents import MODEL, Contents
from onnxcomp.runtime.package.originals import read_json

__all__ = ["CONFIG", "is_hugging_face", "made_config", "tokenizer_config"]

CONFIG = "genai_config.json"
_HUGGING_FACE, _GENERATION = "config.json", "generation_config.json"
_TOKENIZER = "tokenizer.json"
_CONTEXT = 2048  # positions of a model that does not say how many it knows


def is_hugging_face(source: Path) -> bool:
    """Whether a folder has a configuration of Hugging Face and none of onnxruntime-genai."""
    return not (source / CONFIG).exists() and (source / _HUGGING_FACE).is_file()


def made_config(contents: Contents, source: Path) -> dict[str, Any]:
    """The configuration of a decoder from its inputs and outputs and ``config.json``.

    Raises:
        UsageError: ``config.json`` lacks a number, or the model has no KV cache.
        ModelError: The model is no decoder.
    """
    form = interface_of(contents.session)
    if not form.caches:
        raise UsageError(
            f"{contents.model} has no KV cache",
            hint="onnxruntime-genai needs one: export the model with past key values",
        )
    asked = read_json(source / _HUGGING_FACE, "it is part of a folder of Hugging Face")
    heads = _number(asked, source, "num_attention_heads", "n_head")
    context = asked.get("max_position_embeddings", asked.get("n_positions", _CONTEXT))
    *_, kv_heads, _, head_size = form.caches[0].shape
    pasts, presents = (_patterns(names) for names in zip(*_cache_names(form), strict=True))
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": head_size,
        "hidden_size": _number(asked, source, "hidden_size", "n_embd"),
        "inputs": {**_inputs(form), **_named("past", pasts)},
        "outputs": {"logits": form.logits, **_named("present", presents)},
        "num_attention_heads": heads,
        "num_hidden_layers": len(form.caches) // len(pasts),
        "num_key_value_heads": kv_heads if isinstance(kv_heads, int) else heads,
    }
    model = {
        **_special_tokens(asked, source),
        "context_length": context,
        "decoder": decoder,
        "type": asked.get("model_type", "llama"),
        "vocab_size": _number(asked, source, "vocab_size"),
    }
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": False}
    return {"model": model, "search": search}


def _number(asked: Mapping[str, Any], source: Path, *names: str) -> int:
    """The first of some numbers that the configuration has."""
    for name in names:
        if isinstance(asked.get(name), int):
            return int(asked[name])
    raise UsageError(
        f"{source / _HUGGING_FACE} does not say {names[0]!r}",
        hint=f"write a {CONFIG} for the model, and name its folder by --like",
    )


def _inputs(form: Interface) -> dict[str, str]:
    """What the inputs are called, but for the cache."""
    names = {"input_ids": form.ids, "attention_mask": form.mask, "position_ids": form.positions}
    return {role: name for role, name in names.items() if name}


def _cache_names(form: Interface) -> list[tuple[str, str]]:
    return [(cache.past, cache.present) for cache in form.caches]


def _patterns(names: Iterable[str]) -> list[str]:
    """Names of all layers as patterns, the layer's number as ``%d``."""
    return list(dict.fromkeys(re.sub(r"\d+", "%d", name, count=1) for name in names))


def _named(kind: str, patterns: list[str]) -> dict[str, str]:
    """The fields for the cache: keys and values apart, or both in one tensor.

    Raises:
        UsageError: The names of the cache follow no such pattern.
    """
    if len(patterns) == 1:
        return {f"{kind}_names": patterns[0]}
    if len(patterns) == 2:
        return {f"{kind}_key_names": patterns[0], f"{kind}_value_names": patterns[1]}
    raise UsageError(
        f"the caches of the model are called {', '.join(patterns[:4])}",
        hint="onnxruntime-genai knows names with the number of the layer, keys and values apart",
    )


def _special_tokens(asked: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """First, last and filling token; what is said for generation counts more."""
    path = source / _GENERATION
    said = {**asked, **(read_json(path, "remove it") if path.is_file() else {})}
    last = said.get("eos_token_id")
    if last is None:
        raise UsageError(
            f"{source / _HUGGING_FACE} does not say 'eos_token_id'",
            hint="add the number of the token that ends an answer",
        )
    one = last[0] if isinstance(last, list) else last
    found = {"bos_token_id": said.get("bos_token_id"), "eos_token_id": last}
    found = {name: value for name, value in found.items() if value is not None}
    filling = said.get("pad_token_id")
    return {**found, "pad_token_id": one if filling is None else filling}


def tokenizer_config(source: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A ``tokenizer_config.json`` for a folder that lacks it.

    None where there is one, where there is no tokenizer, or where its kind is not known.
    """
    path = source / _TOKENIZER
    if (source / "tokenizer_config.json").exists() or not path.is_file():
        return None
    stored = read_json(path, "it has to be a tokenizer.json")
    kind = stored.get("model", {})
    if kind.get("type") != "BPE":
        return None
    texts = {token["id"]: token["content"] for token in stored.get("added_tokens", ())}
    model = config["model"]
    last = model["eos_token_id"]
    numbers = {"bos": model.get("bos_token_id"), "eos": last[0] if isinstance(last, list) else last}
    numbers["pad"] = model["pad_token_id"]
    words = {f"{name}_token": texts[n] for name, n in numbers.items() if n in texts}
    return {
        "add_prefix_space": False,
        **words,
        "model_max_length": model["context_length"],
        "tokenizer_class": "LlamaTokenizer" if kind.get("byte_fallback") else "GPT2Tokenizer",
    }
