"""The tables and two pictures of docs/reproduction.md, from ``benchmarks/results``.

python benchmarks/reproduction_tables.py            prints the tables
python benchmarks/reproduction_tables.py --write    puts them into the page and draws the pictures

The other two pictures are drawn by bench_sharing_training.py and bench_lorita.py.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from curves import Line, Panel, draw
from page_parts import ROOT, markdown, read
from sharing_tables import rivals

__all__ = ["PAGE", "PICTURES", "put_into"]

PAGE = ROOT / "docs" / "reproduction.md"
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# Ways to store weights, by their names in the results, from the plainest on.
_CODECS = {
    "RTN, -n-1 .. n, g128": "rounding to integers, groups of 128",
    "RTN, best range, g128": "the same in the best range",
    "winding, published": "Hyper-Compression as published",
    "winding, no classes": "Hyper-Compression without classes of outliers",
    "winding, best lattice, g128": "the best lattice that was found, groups of 128",
    "hyper, 2^7 states": "`hyper`",
    "hyper, 2^12 states": "`hyper`, 4,096 states",
    "bound": "Shannon's bound",
}
_FORMS = {
    "dense": "dense",
    "RTN int4, symmetric": "rounding to int4",
    "GPTQ int4 (numpy), asymmetric": "GPTQ int4",
    "winding, published, 225 points": "Hyper-Compression, 225 points",
    "winding, published, 1600 points": "Hyper-Compression, 1,600 points",
    "hyper 4": "`hyper`, 4 bits",
    "hyper 4, calibrated": "`hyper`, 4 bits, calibrated",
    "hyper 3, calibrated": "`hyper`, 3 bits, calibrated",
}
_TRAINED = {
    "dense": "all weights",
    "shared": "shared, both remedies",
    "roast": "shared as ROAST does",
    "small": "a narrower network",
    "snip": "SNIP",
    "synflow": "SynFlow",
    "grasp": "GraSP",
    "magnitude": "magnitude, before training",
    "random": "at random",
    "lottery": "lottery tickets",
}
_SCORES = ("obs", "numerical", "wanda", "flap", "magnitude")
_COLOURS = dict(zip(_SCORES, ("#0a66c2", "#c2570a", "#1a7f37", "#8250df", "#6e7781"), strict=True))


def _spread(values: Sequence[float]) -> str:
    """Mean of accuracies in percent, with their standard deviation where there are several."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def codes() -> str:
    """Signal-to-noise ratios at equal bits."""
    rows = {(row["codec"], row["bits"]): row for row in read("hyper_quality")["rows"]}
    cells = []
    for codec, label in _CODECS.items():
        normal = [rows[codec, bits]["normal"] for bits in (2, 3, 4)]
        heavy = rows[codec, 4].get("student4")
        gained = (normal[2] - normal[0]) / 2
        cells.append((label, *(f"{x:.1f}" for x in (*normal, heavy, gained))))
    columns = ("codes", "2 bits", "3 bits", "4 bits", "4 bits, Student-t", "a bit more brings")
    return markdown(columns, cells)


def _same_token(row: dict[str, Any]) -> float:
    """Share of the positions of both texts whose likeliest token is the dense model's."""
    return float(row["books_agreement"] + row["shakespeare_agreement"]) / 2


def small_models() -> str:
    """A language model, in real bytes."""
    language = {row["name"]: row for row in read("hyper_models")["language_model"]["rows"]}
    cells = [
        (
            label,
            f"{language[name]['bytes'] / 1e6:.2f} MB",
            f"{language['dense']['bytes'] / language[name]['bytes']:.1f}x",
            f"{language[name]['kl']:.4f}",
            f"{100 * _same_token(language[name]):.1f} %",
        )
        for name, label in _FORMS.items()
    ]
    return markdown(("weights", "file", "smaller", "KL (nats)", "same token"), cells)


def sharing() -> str:
    """Accuracy of networks trained with fewer numbers."""
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in read("sharing_training")["rows"]:
        found[row["network"], row["method"], row["ratio"]].append(row["accuracy"])
    networks = list(dict.fromkeys(network for network, _, _ in found))
    columns = sorted(
        {(network, ratio) for network, _, ratio in found if ratio > 1},
        key=lambda column: (networks.index(column[0]), column[1]),
    )
    cells = []
    for method, label in _TRAINED.items():
        values = [
            _spread(found.get((network, method, 1 if method == "dense" else ratio), []))
            for network, ratio in columns
        ]
        cells.append((label, *values))
    return markdown(("weights", *(f"{network}, {ratio}x" for network, ratio in columns)), cells)


def transformers() -> str:
    """Transformers trained with fewer numbers, in several ways."""
    return rivals("trained")


def stored() -> str:
    """Files of networks that were pruned before training, by the codec `sparse`."""
    rows = [row for row in read("sharing_training")["rows"] if "stored" in row]
    groups: dict[tuple[str, int], list[dict[str, int]]] = defaultdict(list)
    for row in rows:
        groups[row["network"], row["ratio"]].append(row["stored"])
    cells = []
    for (network, ratio), found in sorted(groups.items()):
        asked = [-(-one["weights"] // ratio) for one in found]
        off = max(abs(o["elements"] - a) / a for o, a in zip(found, asked, strict=True))
        size = statistics.mean(one["bytes"] for one in found)
        smaller = statistics.mean(one["dense_bytes"] / one["bytes"] for one in found)
        cells.append(
            (f"{network}, {ratio}x", f"{off:.1%}", f"{size / 1e3:.1f} KB", f"{smaller:.1f}x")
        )
    return markdown(("pruned", "elements off, at most", "file", "smaller"), cells)


def linear() -> str:
    """Errors of linear models in less memory."""
    rows = [row for row in read("sharing_theory")["fits"] if row["memory"] in (512, 128, 32)]
    names = ("shared", "largest", "random")
    cells = [
        (row["inputs"], f"{1024 // row['memory']}x", *(f"{row[name]:.3f}" for name in names))
        for row in rows
    ]
    return markdown(("inputs", "smaller", "shared", "the largest", "at random"), cells)


def _pruned(score: str, rest: str, share: float) -> dict[str, Any]:
    row: dict[str, Any] = read("prune")["rows"][f"language {share:g} {score} {rest}"]
    return row


def _unfitted(score: str) -> tuple[str, str]:
    """How what is left is treated where it is not fitted: in the results, and in words."""
    return ("bias", "biases only") if score == "flap" else ("none", "as it was")


def pruning() -> str:
    """Divergence of a pruned language model."""
    shares = (0.1, 0.2, 0.3, 0.5)
    cells = [
        (score, what, *(f"{_pruned(score, rest, share)['kl']:.4f}" for share in shares))
        for score in _SCORES
        for rest, what in (("fit", "fitted"), _unfitted(score))
    ]
    return markdown(("score", "rest", *(f"{share:.0%} fewer" for share in shares)), cells)


def decoding() -> str:
    """What a pruned decoder gains."""
    rows = read("prune")["rows"]
    cells = []
    for share in (0.2, 0.5):
        row = rows[f"decode {share:g}"]
        tokens, cache, memory = (
            row[key] for key in ("tokens_per_second", "cache_bytes", "rss_bytes")
        )
        cells.append(
            (
                f"{share:.0%}",
                f"{tokens[1] / tokens[0]:.2f}x",
                f"{cache[1] / cache[0]:.2f}x",
                f"{row['flops']:.2f}x",
                f"{memory[1] / memory[0]:.2f}x",
            )
        )
    columns = ("fewer", "tokens a second", "cache of a token", "operations", "resident memory")
    return markdown(columns, cells)


def factors() -> str:
    """Accuracy of networks that were trained with factors."""
    found: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    kept = (0.25, 0.1, 0.05)
    for row in read("lorita")["results"]:
        found[row["network"], row["factors"], 1.0].append(row["accuracy"])
        for cut in row["truncated"]:
            if cut["mode"] == "iterative":
                found[row["network"], row["factors"], cut["kept"]].append(cut["accuracy"])
    keys = dict.fromkeys(key[:2] for key in found)
    cells = [
        (network, str(n), *(_spread(found[network, n, share]) for share in (1.0, *kept)))
        for network, n in keys
    ]
    return markdown(("network", "N", "all", *(f"{share:.0%}" for share in kept)), cells)


# Lines of the first picture: names of rows from large files to small ones, colour and dash.
_LINES = {
    "hyper + data": ([f"hyper {b}, calibrated" for b in (4, 3, 2)], "#0a66c2", ""),
    "hyper": ([f"hyper {b}" for b in (4, 3, 2)], "#4a9de0", "4 3"),
    "GPTQ": ([f"GPTQ int{b} (numpy), asymmetric" for b in (4, 2)], "#c2570a", ""),
    "rounding": ([f"RTN int{b}, asymmetric" for b in (8, 4, 2)], "#6e7781", ""),
    "published": ([f"winding, published, {p} points" for p in (225, 1600)], "#8250df", ""),
}


def _by_size(model: str, title: str, score: Callable[[dict[str, Any]], float]) -> Panel:
    """Scores of one model against the sizes of its files, relative to the dense one."""
    rows = {row["name"]: row for row in read("hyper_models")[model]["rows"]}
    lines = []
    for names, colour, dash in _LINES.values():
        found = [rows[name] for name in names if name in rows]
        points = [(row["bytes"] / rows["dense"]["bytes"], score(row)) for row in found]
        lines += [Line(points, colour, dash)] if points else []
    return Panel(title, lines)


def _hyper_picture() -> str:
    """The same token, and the cosine of embeddings, against the size of the file."""
    panels = [
        _by_size("language_model", "language model: same token", _same_token),
        _by_size("minilm", "MiniLM: cosine", lambda row: 1.0 - float(row["one_minus_cosine"])),
    ]
    legend = {name: (colour, dash) for name, (_, colour, dash) in _LINES.items()}
    return draw("against the size of the file", panels, (1.0, 0.5, 0.25, 0.06), legend)


def _pruning_picture() -> str:
    """The same token against kept parameters, and accuracy against operations."""
    rows = read("prune")["rows"]
    language = [
        Line(
            [(1.0, 1.0)]
            + [(1.0 - s, _pruned(score, "fit", s)["agreement"]) for s in (0.1, 0.2, 0.3, 0.5)],
            _COLOURS[score],
        )
        for score in _SCORES
    ]
    image = [
        Line(
            [(s, rows[f"resnet {s:g} {score} {rest}"]["accuracy"]) for s in (0.8, 0.7, 0.5)],
            _COLOURS[score],
        )
        for score, rest in (("obs", "fit"), ("wanda", "fit"), ("magnitude", "none"))
    ]
    panels = [
        Panel("language model: same token", language),
        Panel("ResNet20: accuracy, operations", image),
    ]
    legend = {score: (_COLOURS[score], "") for score in _SCORES}
    return draw("after pruning, without labels", panels, (1.0, 0.8, 0.7, 0.5), legend)


PICTURES: dict[str, Callable[[], str]] = {
    "reproduction_hyper.svg": _hyper_picture,
    "reproduction_pruning.svg": _pruning_picture,
}
TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (
        codes,
        small_models,
        sharing,
        transformers,
        stored,
        linear,
        pruning,
        decoding,
        factors,
    )
}


def put_into(text: str) -> str:
    """A page with its tables replaced."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]]()}\n{place[3]}", text)


def tables() -> Iterator[str]:
    """All tables, each behind its name."""
    for name, table in TABLES.items():
        yield f"{name}\n\n{table()}\n"


def main() -> None:
    print("".join(tables()))
    if "--write" in sys.argv:
        PAGE.write_text(put_into(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        for name, picture in PICTURES.items():
            (PAGE.parent / name).write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
