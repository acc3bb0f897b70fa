"""The table of docs/pytorch.md, from ``results/exports.json``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from page_parts import markdown, read, share

__all__ = ["exports"]

_FORMS = {"optimizer": "transformer optimizer", "session": "session optimizations"}


def exports() -> Iterator[str]:
    """Architectures through both exporters, and behind ONNX Runtime's optimizers."""
    found = read("exports")
    versions = found["versions"]
    yield (
        f"Architectures of transformers {versions['transformers']} with random weights, by torch "
        f"{versions['torch']}, at {found['bits']:g} bits:\n"
        "difference of the graph to the module (relative L2), share of the bytes of weights that "
        "are compressed,\nratio of the files, greedy tokens that the library and the portable "
        "form have in common\n(`--precision exact`), and the ratio behind ONNX Runtime's own "
        "optimizers, which fuse operators.\nModels are small: graphs weigh more than in real "
        "ones, and so do the rotary caches of 131,072\npositions that the optimizer adds to graphs "
        "of optimum, which stay exact. Optimum writes its file\nby itself "
        "(`benchmarks/bench_exports.py`).\n"
    )
    columns = (
        "model", "exporter", "difference", "weights", "ratio", "tokens",
        *(f"after {form}" for form in _FORMS.values()),
    )  # fmt: skip
    real = [row for row in found["rows"] if "module" in row]
    yield markdown(columns, [_cells(row) for row in found["rows"] if row not in real])
    if real:
        yield from _real_weights(real)


def _real_weights(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A model with weights of its own: what the compressed form says and generates."""
    score = next((row["score"] for row in rows if "score" in row), None)
    if score is not None:
        yield (
            f"{rows[0]['model']} with its own weights, compressed without data, on "
            f"{score['windows']} windows of {score['context']} tokens of wikitext-2\nas its "
            "file stands, and greedy tokens in common with the dense graph:\n"
        )
    columns = (
        "exporter", "difference", "weights", "MB", "ratio", "KL divergence",
        "perplexity (dense)", "same token", "tokens",
    )  # fmt: skip
    yield markdown(columns, [_real_cells(row) for row in rows])


def _real_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["exporter"], "failed", *[""] * 7)
    score, tokens = row["score"], row["tokens"]
    return (
        row["exporter"],
        f"{row['exported']:.1e}",
        share(row["weights"]),
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['ratio']:.2f}",
        f"{score['kl']:.3f}",
        f"{score['perplexity']:.1f} ({score['reference_perplexity']:.1f})",
        share(score["same_token"]),
        f"{tokens['compressed_and_dense']} of {tokens['of']}",
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return (row["model"], row["exporter"], "failed", "", "", "", "", "")
    tokens = row.get("tokens")
    return (
        row["model"],
        row["exporter"],
        f"{row['exported']:.1e}" if "exported" in row else "",
        f"{100 * row['weights']:.1f} %",
        f"{row['ratio']:.2f}",
        f"{tokens['library_and_portable']} of {tokens['of']}" if tokens else "",
        *(_fused(row, form) for form in _FORMS),
    )


def _fused(row: dict[str, Any], form: str) -> str:
    found = row.get("fused", {}).get(form)
    if found is None:
        return ""
    return "failed" if "failed" in found else f"{found['ratio']:.2f}"
