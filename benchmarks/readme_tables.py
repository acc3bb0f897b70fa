"""The tables of README.md and pages of docs/, and the README's picture.

All come from ``benchmarks/results``.

python benchmarks/readme_tables.py            prints the tables
python benchmarks/readme_tables.py --write    puts them into the pages, and draws the picture
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from archive_tables import archives
from client_summary import summary
from client_tables import clients, elsewhere, hub
from export_tables import exports
from latency_tables import (
    headline_latency,
    merged_products,
    planned_for_time,
    whole_models,
)
from llm_tables import chosen_rows, every_row
from page_parts import ROOT, decibels, markdown, read, share
from pruning_tables import pruning
from quality_tables import calibration_steps, deep_convolutions, other_models, rivals
from scale_tables import large_models
from serving_tables import services, sessions
from size_loss_picture import PICTURE, draw
from speed_tables import experts, products, shared_products, sparse_products, structured_products

__all__ = ["stale_pages", "tables"]

BEGIN = "<!-- tables: benchmarks/readme_tables.py -->\n"
END = "<!-- end of tables -->"


def minilm() -> Iterator[str]:
    """The sentence encoder."""
    results = read("minilm")
    dense, int4 = results["dense"], results["int4_block_128"]
    rows = [
        ("float32", f"{dense['bytes'] / 1e6:.1f} MB", "1.00", f"{dense['spearman']:.4f}", "0", ""),
        (
            "MatMulNBits int4, block 128, round to nearest",
            f"{int4['bytes'] / 1e6:.1f} MB",
            f"{dense['bytes'] / int4['bytes']:.2f}",
            f"{int4['spearman']:.4f}",
            f"{int4['one_minus_cosine']:.4f}",
            "",
        ),
    ]
    for run in results["runs"]:
        library = run["forms"]["library"]
        rows.append(
            (
                f"onnxcomp, {run['bits']} bits",
                f"{run['bytes'] / 1e6:.1f} MB",
                f"{run['ratio']:.2f}",
                f"{library['spearman']:.4f}",
                f"{library['one_minus_cosine']:.4f}",
                f"{run['peak_rss_bytes'] / 1e9:.2f} GB",
            )
        )
    yield (
        "The sentence encoder all-MiniLM-L6-v2 on the STS-B development set, without calibration:\n"
        "Spearman rank, mean of 1 - cosine to the float32 embeddings, and peak memory of the\n"
        "compiler (`benchmarks/bench_minilm.py`).\n"
    )
    columns = ("weights", "file", "ratio", "Spearman", "1 - cosine", "compiler memory")
    yield markdown(columns, rows)


def demo() -> Iterator[str]:
    """The model of the demo."""
    runs = read("demo")["runs"]
    original = runs[0]["accuracy"]["standard"]
    rows = [("float32", f"{runs[0]['bytes_before'] / 1e3:.0f} KB", "1.00", share(original), "")]
    rows += [
        (
            f"{run['bits']} bits",
            f"{run['bytes_after'] / 1e3:.0f} KB",
            f"{run['ratio']:.2f}",
            share(run["accuracy"]["library"]),
            share(run["accuracy"]["portable"]),
        )
        for run in runs
    ]
    yield "The model of the demo on characters it never saw: `benchmarks/bench_demo.py`.\n"
    columns = ("weights", "file", "ratio", "accuracy, library", "accuracy, any runtime")
    yield markdown(columns, rows)


def models() -> Iterator[str]:
    """Other trained models."""
    rows = [
        (
            row["name"],
            f"{row['bytes_before'] / 1e3:.0f} KB",
            f"{row['ratio']:.2f}",
            share(row["coverage"]),
            decibels(row["snr_db"]),
            decibels(row["snr_db_portable"]),
            share(row.get("agree_library")),
            "real" if row["real"] else "made up",
            loads(row, "load_ms", 1),
            loads(row, "rss_bytes", 1e6),
        )
        for row in read("models_4bit")["models"]
    ]
    yield (
        "Models of other projects at 4 bits (`benchmarks/bench_models.py`). `covered` is the\n"
        "share of the weight bytes that is compressed; `library` and `any runtime` the worst\n"
        "signal-to-noise ratio of an output in that form; `same class` how often the top class is\n"
        "the original's. Inputs are real where there are any, else made up. CPU time to load and\n"
        "memory of the session: original / with the library / without.\n"
    )
    columns = ("model", "float32 file", "ratio", "covered", "library", "any runtime", "same class")
    yield markdown((*columns, "inputs", "load, ms", "memory, MB"), rows)


def loads(row: dict[str, Any], key: str, unit: float) -> str:
    """A number of the original and of both forms of the compressed model."""
    forms = ("dense", "library", "portable")
    return " / ".join(f"{row['loads'][form][key] / unit:.0f}" for form in forms)


SHARING_NAMES = {
    "dense": "all weights",
    "shared": "shared (`share`)",
    "roast": "shared as ROAST does, without the two remedies",
    "small": "the same network, narrower",
    "snip": "pruned before training, SNIP",
    "synflow": "pruned before training, SynFlow",
    "grasp": "pruned before training, GraSP",
    "magnitude": "pruned before training, magnitude",
    "random": "pruned before training, at random",
    "lottery": "lottery ticket, trained four times as long",
}
SHARING_NETWORKS = {
    "digits": "perceptron, digits",
    "small-vgg": "VGG, CIFAR-10",
    "resnet20-strided": "ResNet20, CIFAR-10",
}


def shared_training() -> Iterator[str]:
    """Accuracy of networks trained in less memory."""
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in read("sharing_training")["rows"]:
        found.setdefault((row["network"], row["method"], row["ratio"]), []).append(row["accuracy"])
    columns = [
        (network, ratio)
        for network in SHARING_NETWORKS
        for ratio in sorted({r for n, _, r in found if n == network and r > 1})
    ]
    cells = []
    for method, name in SHARING_NAMES.items():
        scores = [
            found.get((network, method, 1 if method == "dense" else ratio))
            for network, ratio in columns
        ]
        if any(scores):
            cells.append((name, *("" if s is None else share(sum(s) / len(s)) for s in scores)))
    yield (
        "Accuracy of networks that are trained with fewer numbers: as signed copies of a memory,\n"
        "pruned before training (the places of the remaining weights are not counted), or with\n"
        "fewer channels, which takes fewer operations, too. There are few epochs on 8,000 to\n"
        "10,000 images, three seeds, one for ResNet20: differences of a point are\n"
        "noise\n"
        "(`benchmarks/bench_sharing_training.py`, and [Shared weights](sharing.md)).\n"
    )
    titles = [f"{SHARING_NETWORKS[network]}, {ratio}x" for network, ratio in columns]
    yield markdown(("weights", *titles), cells)


def language_model() -> Iterator[str]:
    """Plain and calibrated codes beside integer rounding."""
    results = read("hyper_models")["language_model"]
    windows = results["windows"]
    rows = [
        (
            row["name"].replace("hyper", "onnxcomp, bits"),
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['kl']:.4f}",
            share((row["books_agreement"] + row["shakespeare_agreement"]) / 2),
            f"{row['books_perplexity']:.2f}",
        )
        for row in results["rows"]
    ]
    yield (
        "A small language model (5 million weights), all tensors compressed, with and without\n"
        "calibration on its training text: divergence from the float32 predictions, agreement of\n"
        f"the likeliest token (both on {windows} windows of two held-out texts), perplexity on\n"
        "one of the texts. Integers have blocks of 128 (`benchmarks/bench_hyper_models.py`).\n"
    )
    columns = ("weights", "file", "KL (nats)", "same token", "perplexity")
    yield markdown(columns, rows)


def presets() -> Iterator[str]:
    """What the presets mean."""
    rows = read("presets")["rows"]
    names = ("lossless", "balanced", "small", "max", "web")
    cells = {(r["model"], r["preset"]): f"{r['ratio']:.1f}x, {100 * r['loss']:.1f} %" for r in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    yield (
        "Presets without calibration data: how many times smaller, and the loss. The loss is the\n"
        "share of inputs with another result than the original's (class, decision, likeliest\n"
        "token); for MiniLM, the mean of 1 - cosine. SqueezeNet's original is in float16\n"
        "(`benchmarks/bench_presets.py`).\n"
    )
    table = [(model, *(cells[model, name] for name in names)) for model in models]
    yield markdown(("model", *names), table)


def restored() -> Iterator[str]:
    """Error of restored weights, and the speed of the encoder."""
    rows = read("hyper_quality")["rows"]
    found: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        found.setdefault(row["codec"], {})[row["bits"]] = row
    wanted = [(2, "normal"), (3, "normal"), *((4, kind) for kind in ("normal", "laplace"))]
    wanted += [(4, "student4"), (4, "trained")]
    yield (
        "Decoded weights: signal-to-noise ratio in dB, for normal, Laplace and Student-t (4)\n"
        "weights and those of the language model (`benchmarks/bench_hyper_quality.py`). RTN\n"
        "rounds to nearest in groups (g) of 128 with one float16 scale: on -n .. n, on\n"
        "-n-1 .. n as ONNX Runtime does, with a zero point, or in the best range. `winding` is\n"
        "Hyper-Compression in its best box. The bound is Shannon's.\n"
    )
    cells = [
        (codec, *(_one_digit(by_bits.get(bits, {}).get(kind)) for bits, kind in wanted))
        for codec, by_bits in found.items()
    ]
    columns = ("codec", *(f"{bits} bits, {kind}" for bits, kind in wanted))
    yield markdown(columns, cells)
    encode = read("encode")
    speeds = {
        (row["state_bits"], row["bits"], row["isa"]): row["speed"] for row in encode["encoder"]
    }
    isa = encode["encoder"][0]["isa"]
    yield (
        f"The encoder ({isa}), million weights per second of one core, by states (first column)\n"
        "and bits per weight: `benchmarks/bench_encode.py`.\n"
    )
    states = sorted({key[0] for key in speeds}, key=lambda s: s or 99)  # structured tables last
    yield markdown(
        ("states", *map(str, range(1, 7))),
        [
            (
                f"2^{s}" if s else "structured",
                *(_one_digit(speeds.get((s, bits, isa))) for bits in range(1, 7)),
            )
            for s in states
        ],
    )


def _one_digit(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def planner() -> Iterator[str]:
    """Mixed plans beside equal settings."""
    results = read("planner")["models"]
    yield (
        "Plans on real inputs, one half to plan with and the other to judge by: what is lost with\n"
        "equal bits for all weights, and with mixed plans of the same bytes, made without inputs\n"
        "and with them. The loss is the divergence in nats of outputs that are distributions or\n"
        "logits of some, and the squared relative error of the others. `expected` is the loss\n"
        "that the plan with inputs expected. Standard errors tell how much is chance among the\n"
        "inputs: of those of a classifier, few make up most of the loss. Codes are not calibrated\n"
        "(`benchmarks/bench_planner.py`)."
        f"\n{_near(results)}\n"
    )
    rows = [
        (
            row["name"],
            f"{at['bytes'] / 1e3:.0f} KB",
            str(at["bits"]),
            *(f"{at[key]:.3g}" if key in at else "" for key in ("equal_loss", "mixed_loss")),
            *_with_errors(at),
        )
        for row in results
        for at in row["equal_bytes"]
    ]
    columns = ("model", "file", "bits", "equal bits", "mixed", "mixed, inputs", "expected")
    yield markdown((*columns, "measured / expected"), rows)
    ratios = [str(at["ratio"]) for at in results[0]["ratios"]]
    yield (
        "Bytes of the output for `--ratio`, in percent of what was asked for. Above 100 no plan\n"
        "is small enough, because small tensors and names take more; the exit code is then 3.\n"
    )
    cells = [
        (row["name"], *(f"{100 * at['bytes'] / at['target']:.2f}" for at in row["ratios"]))
        for row in results
    ]
    yield markdown(("model", *(f"{ratio}x" for ratio in ratios)), cells)
    yield (
        "Expected against measured, weight by weight: noise of the outputs with one weight in 2,\n"
        "3 or 4 bits, and times of products on codes, as predicted by the cost table of the\n"
        "machine.\n"
    )
    words = {"error": "noise of the outputs", "time": "time"}
    ranks = [
        (
            name,
            words[what],
            str(row["points"]),
            f"{row['rank_correlation']:.2f}",
            f"{row['median_measured_over_expected']:.2f}",
        )
        for name, kinds in read("planner")["ranks"].items()
        for what, row in kinds.items()
    ]
    for what, row in read("planner")["pooled"].items():
        together = f"{row['rank_correlation']:.2f}"
        ranks.append((f"all {row['models']}", words[what], str(row["points"]), together, ""))
    columns = ("model", "what", "points", "rank correlation", "measured / expected, median")
    yield markdown(columns, ranks)


def _with_errors(at: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a plan lost and was expected to lose, with standard errors, and their quotient."""
    if "expected_loss" not in at:
        return "", "", ""
    measured, expected = at["mixed_with_inputs_loss"], at["expected_loss"]
    errors = [at.get(f"{name}_loss_error") for name in ("measured", "expected")]
    cells = [
        f"{value:.3g}" + (f" ± {100 * error / value:.0f} %" if error and value else "")
        for value, error in zip((measured, expected), errors, strict=True)
    ]
    return cells[0], cells[1], f"{measured / expected:.2f}"


def _near(results: Sequence[Mapping[str, Any]]) -> str:
    """How many plans lose what was expected of them."""
    found = [
        at["mixed_with_inputs_loss"] / at["expected_loss"]
        for row in results
        for at in row["equal_bytes"]
        if "expected_loss" in at
    ]
    near, close = (sum(abs(at - 1) <= part for at in found) for part in (0.15, 0.25))
    far = len(found) - close
    unsure = sum(_by_chance(at) for row in results for at in row["equal_bytes"])
    known = [at for row in results for at in row["equal_bytes"] if at.get("expected_loss_error")]
    stated = sum(_in_interval(at) for at in known)
    both = sum(_in_interval(at, at.get("measured_loss_error") or 0.0) for at in known)
    return (
        f"Of {len(found)} plans {near} lose within 15 % of what was expected, {close} within\n"
        f"25 %. Of the other {far}, {unsure} differ by less than two standard errors\n"
        f"of the difference. {stated} of the {len(known)} whose standard error is recorded lie\n"
        "within the interval that they state (two standard errors of the logarithm of the\n"
        f"expected loss), {both} where the standard error of the measurement widens it."
    )


def _in_interval(at: Mapping[str, Any], error: float = 0.0) -> bool:
    """Whether what a plan lost lies within the interval that it states.

    Args:
        at: Of one plan.
        error: Standard error of what was measured, which widens the interval.
    """
    expected, measured = at["expected_loss"], at["mixed_with_inputs_loss"]
    variances = [
        math.log1p((at["expected_loss_error"] / expected) ** 2),
        math.log1p((error / measured) ** 2),
    ]
    return bool(abs(math.log(measured / expected)) <= 2.0 * math.sqrt(sum(variances)))


def _by_chance(at: Mapping[str, Any]) -> bool:
    """Whether a plan is off by more than a quarter, and the inputs are too few to say so."""
    if not at.get("expected_loss_error") or not at.get("measured_loss_error"):
        return False
    apart = abs(at["mixed_with_inputs_loss"] - at["expected_loss"])
    error = math.hypot(at["expected_loss_error"], at["measured_loss_error"])
    return bool(apart > 0.25 * at["expected_loss"] and apart < 2 * error)


def headlines() -> Iterator[str]:
    """What the README shows."""
    yield from chosen_rows()
    yield from minilm()
    yield from headline_latency()


# What pages show, by heading; an empty one where the page has a heading of its own.
Sections = Mapping[str, Callable[[], Iterator[str]]]
ALL: Sections = {
    "A sentence encoder": minilm,
    "A real language model": every_row,
    "Steps of calibration": calibration_steps,
    "Calibration of other models": other_models,
    "Rivals": rivals,
    "A language model": language_model,
    "Weights": restored,
    "Products": products,
    "Products with structured tables": structured_products,
    "Products that share their input": merged_products,
    "Plans for time": planned_for_time,
    "Whole models": whole_models,
    "Products with shared weights": shared_products,
    "Products with sparse weights": sparse_products,
    "Products with chosen experts": experts,
    "Training with shared weights": shared_training,
    "The model of the demo": demo,
    "Models of other projects": models,
    "Models in packages": clients,
    "Plans": planner,
    "Presets": presets,
    "Archives": archives,
    "Structured pruning": pruning,
    "Large models": large_models,
}
PAGES: Mapping[Path, Sections] = {
    ROOT / "README.md": {"": headlines},
    ROOT / "docs" / "convolutions.md": {"": deep_convolutions},
    ROOT / "docs" / "language_models.md": {"": chosen_rows},
    ROOT / "docs" / "numbers.md": ALL,
    ROOT / "docs" / "clients.md": {
        "All clients that were run": summary,
        "Libraries around the hub": hub,
        "": elsewhere,
    },
    ROOT / "docs" / "planning.md": {"": headline_latency},
    ROOT / "docs" / "serving.md": {"Sessions": sessions, "Servers of Python": services},
    ROOT / "docs" / "pytorch.md": {"": exports},
}


def tables(sections: Sections) -> str:
    """All tables with the sentences before them, under their headings."""
    parts = []
    for heading, make in sections.items():
        parts += [f"### {heading}\n"] if heading else []
        parts += make()
    return "\n".join(parts)


def put_into(text: str, sections: Sections) -> str:
    """A page with the tables in their place."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n{tables(sections)}\n{END}", text)


def stale_pages() -> Mapping[Path, str]:
    """Pages and pictures that differ from what the result files say, and what they should be."""
    pages = {path: path.read_text(encoding="utf-8") for path in (*PAGES, PICTURE)}
    wanted = {path: put_into(pages[path], PAGES[path]) for path in PAGES} | {PICTURE: draw()}
    return {path: text for path, text in wanted.items() if text != pages[path]}


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        for page, text in stale_pages().items():
            page.write_text(text, encoding="utf-8")
    else:
        print(tables(ALL))
