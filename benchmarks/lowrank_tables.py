"""The tables of docs/lowrank.md, from ``benchmarks/results``.

python benchmarks/lowrank_tables.py            prints them
python benchmarks/lowrank_tables.py --write    puts them into docs/lowrank.md
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from page_parts import ROOT, markdown, read, show_or_write

__all__ = ["mean_of_seeds", "put_into", "tables"]

BEGIN = "<!-- tables: benchmarks/lowrank_tables.py -->\n"
END = "<!-- end of tables -->"
PAGE = ROOT / "docs" / "lowrank.md"

WORDS = {
    "svd": "by the weights alone",
    "whitened": "for the dense model's inputs",
    "anchored": "for the compressed model's inputs and the dense model's outputs",
    "both": "the same, for what the loss feels of products",
    "tuned": "for what the loss feels of products, factors tuned",
    "shared": "tuned, a basis for weights that read the same value",
    "neighbours": "tuned, a basis for those of two layers",
    "shared, planned": "tuned, shared bases, ranks by a plan",
    "noise": "tuned, ranks by the loss of noise in each weight",
    "global": "tuned, ranks by the curvature of the loss",
    "lowrank+hyper": "`lowrank+hyper`, 4 bits",
    "hyper": "`hyper`, 2 bits",
    "hyper+lowrank": "`hyper+lowrank`, 2 bits and rank 32",
    "chosen": "what a plan takes of `hyper` and `lowrank+hyper`",
}


def language_model(rows: list[Mapping[str, Any]]) -> str:
    """Divergence of the language model's predictions."""
    order = list(WORDS)
    ordered = sorted(rows, key=lambda row: (-row["kept"], order.index(row["method"])))
    cells = [
        (
            WORDS[row["method"]],
            f"{row['kept']:.0%}",
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['kl']:.4f}",
            f"{row['books_perplexity']:.2f}",
        )
        for row in ordered
    ]
    return markdown(("factors", "weights", "file", "KL divergence", "perplexity, books"), cells)


def sentences(rows: list[Mapping[str, Any]]) -> str:
    """Answers of MiniLM to STS-B."""
    order = list(WORDS)
    ordered = sorted(rows, key=lambda row: (-row["kept"], order.index(row["method"])))
    cells = [
        (
            WORDS[row["method"]],
            f"{row['kept']:.0%}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['spearman']:.4f}",
            f"{row['one_minus_cosine']:.4f}",
        )
        for row in ordered
    ]
    return markdown(("factors", "weights", "file", "Spearman, STS-B", "1 - cosine"), cells)


def smollm2(rows: list[Mapping[str, Any]]) -> str:
    """Divergence and likeliest tokens of SmolLM2-135M, and memory where it was measured."""
    order = list(WORDS)
    cells = [
        (
            WORDS[row["method"]],
            f"{row['kept']:.0%}",
            f"{row['bytes'] / 1e6:.0f} MB",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
            f"{row['peak_rss_bytes'] / 1e9:.1f} GB" if "peak_rss_bytes" in row else "",
        )
        for row in sorted(rows, key=lambda row: (-row["kept"], order.index(row["method"])))
    ]
    columns = ("factors", "weights", "file", "KL divergence", "same token", "peak of memory")
    return markdown(columns, cells)


def speed(rows: list[Mapping[str, Any]]) -> str:
    """Times faster than the dense product."""
    ranks = list(dict.fromkeys(row["rank"] for row in rows))
    cells = [
        (str(m), *(f"{row['over_dense']:.2f}" for row in rows if row["m"] == m))
        for m in dict.fromkeys(row["m"] for row in rows)
    ]
    return markdown(("rows of activations", *(f"rank {rank}" for rank in ranks)), cells)


def mean_of_seeds(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of `bench_lorita.py`, one for each network and number of factors."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["network"], row["factors"]), []).append(row)

    def mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**rows[0], "accuracy": statistics.mean(row["accuracy"] for row in rows)}

    return [
        {
            **mean(rows),
            "truncated": [mean(c) for c in zip(*(r["truncated"] for r in rows), strict=True)],
        }
        for rows in groups.values()
    ]


def lorita() -> str:
    """Accuracy of networks trained with factors, after truncation; means where there are seeds."""
    rows = mean_of_seeds(read("lorita")["results"])
    shares = [cut["kept"] for cut in rows[0]["truncated"] if cut["mode"] == "global"]
    cells = []
    for row in rows:
        for mode in ("local", "global", "iterative"):
            found = [cut["accuracy"] for cut in row["truncated"] if cut["mode"] == mode]
            name = (row["network"], str(row["factors"]), mode)
            cells.append((*name, *(f"{value:.3f}" for value in (row["accuracy"], *found))))
    return markdown(("network", "N", "truncated", "all", *(f"{s:.0%}" for s in shares)), cells)


def tables() -> Iterator[str]:
    """All tables with their titles."""
    results = read("lowrank")
    yield "A small language model, with factors for the products inside its layers:\n\n"
    yield language_model(results["language_model"]) + "\n"
    if results["minilm"]:
        dense = f"{results['minilm_dense']:.4f}"
        yield "MiniLM, with factors for the products inside its layers, on 500 pairs of STS-B;\n"
        yield f"the dense model (90.3 MB) has {dense}:\n\n"
        yield sentences(results["minilm"]) + "\n"
    if results.get("smollm2"):
        yield "SmolLM2-135M (538 MB), with factors for the products inside its layers, its table\n"
        yield "dense, calibrated on 16 windows of 256 tokens, on 10 windows of wikitext:\n\n"
        yield smollm2(results["smollm2"]) + "\n"
    yield "Times faster than a dense product of 4096 x 4096, one thread, ONNX Runtime:\n\n"
    yield speed(results["speed"]) + "\n"
    yield "Test accuracy against kept weights; N factors a layer, equal weight decay:\n\n"
    yield lorita()


def put_into(text: str) -> str:
    """A page with its tables replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{''.join(tables())}{END}{tail}"


if __name__ == "__main__":
    show_or_write("".join(tables()), PAGE, put_into)
