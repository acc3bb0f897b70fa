"""The tables of docs/sharing.md, from ``benchmarks/results``.

python benchmarks/sharing_tables.py            prints them
python benchmarks/sharing_tables.py --write    puts them into docs/sharing.md
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from page_parts import RESULTS, ROOT, markdown, read, share, show_or_write

__all__ = ["put_into", "rivals", "tables"]

# Networks with what they are judged by, what that is multiplied by, and digits.
RIVALS = {"small-vit": ("accuracy", 100, 1), "small-lm": ("loss", 1, 3)}
TRAINED = {
    "dense": "all weights",
    "shared": "shared, both remedies",
    "roast": "shared as ROAST does",
    "basis": "a basis for the layers of a kind",
    "factors": "factors of their own",
    "small": "a narrower network",
}
AFTER = {
    "dense": "all weights",
    "hash": "`hash`, least squares",
    "distilled": "the same, distilled",
    "matched": "`hash`, matched chunks",
    "basis": "`shared_basis`",
    "factors": "`lowrank`",
    "hyper": "`hyper`",
}

BEGIN = "<!-- tables: benchmarks/sharing_tables.py -->\n"
END = "<!-- end of tables -->"
PAGE = ROOT / "docs" / "sharing.md"


def projections() -> Iterator[str]:
    """What is left of trained models."""
    rows = read("sharing_projection")["rows"]
    yield (
        "A perceptron (64 - 256 - 256 - 10) trained on digits, with its two large layers in 8\n"
        "and 16 times fewer bytes: relative error of the logits of images that no fit has seen,\n"
        "and accuracy (`benchmarks/bench_sharing_projection.py`).\n"
    )
    cells = [
        (
            row["what"],
            f"{row['ratio']:.1f}x",
            f"{row['error']:.3f}" if "error" in row else "",
            share(row["accuracy"]),
        )
        for row in rows
        if row["model"] == "digits"
    ]
    yield markdown(("weights", "smaller", "error of logits", "accuracy"), cells)
    tables = [row for row in rows if row["model"] == "minilm"]
    if tables:
        yield (
            "The table of word vectors of the sentence encoder all-MiniLM-L6-v2, with everything\n"
            "else unchanged, on 400 pairs of STS-B:\n"
        )
        cells = [
            (
                row["what"],
                f"{row['ratio']:.1f}x",
                f"{row['weight_error']:.3f}" if "weight_error" in row else "",
                f"{row['spearman']:.4f}",
                f"{abs(row['one_minus_cosine']):.4f}",
            )
            for row in tables
        ]
        columns = ("table", "smaller", "error of the table", "Spearman", "1 - cosine")
        yield markdown(columns, cells)


def linear_models() -> Iterator[str]:
    """Memory against error of linear models."""
    rows = read("sharing_theory")["fits"]
    yield (
        "Linear models of 1,024 weights fitted with m numbers: shared, or the m weights that are\n"
        "largest times the deviation of their inputs, or m drawn at random. Relative error of the\n"
        "outputs: `benchmarks/bench_sharing_theory.py`.\n"
    )
    chosen = [row for row in rows if row["memory"] in (512, 128, 32)]
    cells = [
        (
            row["inputs"],
            str(row["memory"]),
            *(f"{row[k]:.3f}" for k in ("shared", "largest", "random")),
        )
        for row in chosen
    ]
    yield markdown(("inputs", "m", "shared", "largest", "at random"), cells)


def memory() -> Iterator[str]:
    """Memory of processes."""
    if not (RESULTS / "sharing_memory.json").exists():
        return
    results = read("sharing_memory")
    names = {
        "empty": "one layer of 16 x 16",
        "dense": "eight layers of 2,048 x 2,048, dense",
        "shared": f"the same, shared {results['compression']} times",
    }
    yield (
        "Memory of a process that runs the model, Python and ONNX Runtime included:\n"
        "`benchmarks/bench_sharing_memory.py`.\n"
    )
    cells = [
        (
            names[row["model"]],
            f"{row['file_bytes'] / 1e6:.1f} MB",
            f"{row['rss_bytes'] / 1e6:.1f} MB",
            f"{row['median_ms']:.2f} ms",
        )
        for row in results["models"]
    ]
    yield markdown(("model", "file", "process", "one run"), cells)


def rivals(form: str) -> str:
    """Networks with as many weights in other ways, a column for each network and ratio."""
    found: dict[tuple[str, str, int], list[dict[str, float]]] = defaultdict(list)
    for row in read("sharing_rivals")["rows"]:
        whole = row["method"] == "dense"
        if row["form"] == form or whole:
            found[row["network"], row["method"], 0 if whole else row["ratio"]].append(row)
    columns = [(n, r) for n in RIVALS for r in sorted({r for m, _, r in found if m == n and r})]
    cells = []
    for method, label in (TRAINED if form == "trained" else AFTER).items():
        rows = [
            found.get((network, method, 0 if method == "dense" else ratio), [])
            for network, ratio in columns
        ]
        shown = (_spread(own, *RIVALS[n]) for own, (n, _) in zip(rows, columns, strict=True))
        if any(rows):
            cells.append((label, *shown))
    return markdown(("weights", *(f"{network}, {ratio}x" for network, ratio in columns)), cells)


def seeds() -> int:
    """How many of them all rows have."""
    counts: dict[tuple[str, ...], int] = defaultdict(int)
    for row in read("sharing_rivals")["rows"]:
        counts[tuple(str(row[name]) for name in ("network", "form", "method", "ratio"))] += 1
    return min(counts.values())


def _spread(rows: Sequence[Mapping[str, float]], column: str, factor: int, digits: int) -> str:
    """Mean and deviation over seeds; empty without rows."""
    values = [factor * row[column] for row in rows]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def transformers() -> Iterator[str]:
    """Sharing against bases and factors."""
    yield (
        "A vision transformer (CIFAR-10, right answers in percent) and a language model of\n"
        "characters (loss in nats), with 98,304 weights in the linear maps of three layers each,\n"
        "trained with 4 and 16 times fewer of them; what is outside of the layers is as it was.\n"
        f"Means and deviations of {seeds()} seeds (`benchmarks/bench_sharing_rivals.py`; `--full`\n"
        "takes 8 layers of 256 and 384 columns):\n"
    )
    yield rivals("trained")
    yield (
        "The dense networks of the table above, compressed after training, with 256 samples to\n"
        "calibrate. `hyper` has 4 and 2 bits: half of the bytes of the others, and a tenth more:\n"
    )
    yield rivals("after")


def tables() -> str:
    """All tables with the sentences before them."""
    return "\n".join([*projections(), *transformers(), *linear_models(), *memory()])


def put_into(text: str) -> str:
    """The page with the tables in their place."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{tables()}\n{END}", text)


if __name__ == "__main__":
    show_or_write(tables(), PAGE, put_into)
