"""Tables of the real language model, from benchmarks/results/llm.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm_rows import ROWS, WINDOWS
from page_parts import markdown, read, share

__all__ = ["chosen_rows", "every_row"]

# What a user of language models chooses from; all rows are in docs/numbers.md.
_CHOSEN = (
    "float32",
    "MatMulNBits 4 bits, block 32",
    "llama.cpp Q4_K_M",
    "llama.cpp Q4_K_M, importance matrix",
    "llama.cpp IQ4_XS, importance matrix",
    "llama.cpp Q3_K_M, importance matrix",
    "llama.cpp Q2_K, importance matrix",
    "onnxcomp 4 bits",
    "onnxcomp 4 bits, calibrated, not tuned",
    "onnxcomp 4 bits, tied table 5 bits, calibrated, not tuned",
    *(f"onnxcomp {bits} bits, calibrated" for bits in "432"),
    "onnxcomp 3 bits, tied table 4 bits, calibrated, not tuned",
)


def _measured() -> dict[str, dict[str, Any]]:
    """Rows of which something is known, in the order of the benchmark."""
    rows = read("llm")["rows"]
    return {name: rows[name] for name in ROWS if name in rows}


def _speed(row: dict[str, Any], task: str) -> str:
    """Tokens per second of processor time, and how many times as fast as the dense model."""
    found = row.get("speed", {}).get(task)
    if found is None:
        return ""
    rate = f"{1e3 / found['cpu_ms_per_token']:.0f}"
    return rate if row["speed"]["is_dense"] else f"{rate} ({found['speed_up']:.1f}x)"


def _made(made: dict[str, float]) -> str:
    """Processor time of making a model, and memory at the peak where that was measured."""
    if not made:
        return ""
    peak = made.get("peak_rss_bytes")
    return f"{made['cpu_seconds']:.0f} s" + ("" if peak is None else f", {peak / 1e9:.2f} GB")


def _number(found: dict[str, Any] | None, name: str, form: str) -> str:
    return "" if found is None else format(found[name], form)


def _cells(name: str, row: dict[str, Any]) -> dict[str, str]:
    """Everything that is told of a row, by column."""
    texts = row.get("predictions", {})
    wikitext, shakespeare = texts.get("wikitext"), texts.get("shakespeare")
    written = row.get("continuations")
    row = {**row, "speed": {**row.get("speed", {}), "is_dense": name == "float32"}}
    memory = row["speed"].get("rss_bytes")
    return {
        "weights": name,
        "file": f"{row['bytes'] / 1e6:.1f} MB",
        "KL": _number(wikitext, "kl", ".3f"),
        "same token": share(wikitext["same_token"] if wikitext else None),
        "perplexity": _number(wikitext, "perplexity", ".1f"),
        "KL, Shakespeare": _number(shakespeare, "kl", ".3f"),
        "same text": "" if written is None else f"{written['common_prefix']:.1f}",
        "repeated": "" if written is None else share(written["repetition"]),
        "prompt": _speed(row, "prompt_128"),
        "decoding": _speed(row, "decode_64"),
        "decoding at 512": _speed(row, "decode_512"),
        "memory": "" if memory is None else f"{memory / 1e6:.0f} MB",
        "made in": _made(row["made"]),
    }


def _table(names: Sequence[str], columns: Sequence[str]) -> str:
    rows = _measured()
    cells = [_cells(name, rows[name]) for name in names if name in rows]
    return markdown(columns, [tuple(row[column] for column in columns) for row in cells])


def _described() -> str:
    found = read("llm")
    amount = _measured()["float32"]["predictions"]["amount"]
    tokens = amount["windows"] * 256
    return (
        "SmolLM2-135M-Instruct with its KV cache and tied head, on held-out Wikitext-2\n"
        f"({tokens:,} tokens): divergence of the predictions from the float32 model's (KL, in\n"
        "nats), and perplexity. Speed is tokens per second of one thread's processor time for a\n"
        "prompt of 128 tokens, and for decoding behind 64; in brackets, how many times as fast as\n"
        f"the float32 model in ONNX Runtime, measured in turns ({found['processor']},\n"
        f"{found['isa']}). `memory` is that of the process. Calibration reads {WINDOWS} windows\n"
        "of 256 tokens of other text where no number is given, as llama.cpp's importance matrix\n"
        "does. llama.cpp rounds the same weights. They were moved at random inside the 4-bit\n"
        "cells of the published file, so that no method profits from its grid. `not tuned` is\n"
        "`--tune 0`, and `tied table 5 bits` is `--set 'embed_tokens:bits=5'`: the table is the\n"
        "head as well (`benchmarks/bench_llm.py`).\n"
    )


def chosen_rows() -> Iterator[str]:
    """The one table that a user of language models wants."""
    yield _described()
    yield _table(_CHOSEN, ("weights", "file", "KL", "perplexity", "prompt", "decoding", "memory"))


def every_row() -> Iterator[str]:
    """All rows with all that is known of them."""
    yield _described()
    yield (
        "`same text` is how many tokens a greedy continuation of a prompt has in common with the\n"
        "float32 model's before they part, of 64; `repeated` the share of its runs of four tokens\n"
        "that were there before. The importance matrix is llama.cpp's form of calibration.\n"
        "`made in` is the processor time of the tool, and its memory at the peak.\n"
    )
    columns = ("weights", "file", "KL", "same token", "perplexity", "KL, Shakespeare", "same text")
    columns = (*columns, "repeated", "prompt", "decoding", "decoding at 512", "memory", "made in")
    yield _table(list(ROWS), columns)
