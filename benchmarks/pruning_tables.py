"""Tables of structured pruning."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from page_parts import RESULTS, markdown, read

__all__ = ["pruning"]

_EXPERTS = {
    "router": "columns of the router, without data",
    "counts": "how often they are chosen",
    "outputs": "what the outputs lose, the default with data",
}
_HOW = {"fit": "fitted", "local": "fitted, by layers"}


def pruning() -> Iterator[str]:
    """Structured pruning by score, on the language model and on ResNet20."""
    rows = read("prune")["rows"]
    ratios = [r for r in ("0.1", "0.2", "0.3", "0.5") if f"language {r} obs fit" in rows]
    cells = []
    for score in ("obs", "wanda", "numerical", "flap", "magnitude"):
        for how in ("fit", "bias", "none"):
            found = [rows.get(f"language {ratio} {score} {how}") for ratio in ratios]
            if any(found):
                values = ["" if row is None else f"{row['kl']:.4f}" for row in found]
                cells.append((score, {"fit": "fitted"}.get(how, how), *values))
    for ranks, name in (("even", "equal shares"), ("mixed", "planned ranks")):
        found = [rows.get(f"lowrank {ratio} {ranks}") for ratio in ratios]
        if any(found):
            values = ["" if row is None else f"{row['kl']:.4f}" for row in found]
            cells.append(("low-rank factors", name, *values))
    yield (
        "Structured pruning of the same language model: divergence from the dense predictions\n"
        "(nats) when a share of the parameters of its blocks is removed, without labels\n"
        "(`benchmarks/bench_prune.py`). `obs` is the default, and the only score that also takes\n"
        "positions inside heads. The others are scores of other methods with their own\n"
        "allocation, and fits of those layers alone that lose inputs. The last rows are low-rank\n"
        "factors of as many parameters.\n"
    )
    timed = rows.get("latency 0.2")
    if timed is not None:
        yield (
            "With 20 % fewer, products that shrank take "
            f"{100 * (1 - timed['time']):.0f} % less time for "
            f"{100 * (1 - timed['flops']):.0f} % fewer\noperations at 128 positions "
            "(one thread, dense and pruned in turns).\n"
        )
    columns = ("score", "rest", *(f"{100 * float(ratio):.0f} % fewer" for ratio in ratios))
    yield markdown(columns, cells)
    yield from _pruned_decoding(rows)
    yield from _divided(rows)
    yield from _pruned_images(rows)
    yield from _divided_by_time()
    yield from _pruned_experts()


def _divided_by_time() -> Iterator[str]:
    """What a budget of measured time would save beside one of FLOPs."""
    if not (RESULTS / "prune_time.json").exists():
        return
    results = read("prune_time")
    names = {"language": "language model, 128 positions", "mobilenet": "MobileNetV2"}
    cells = [
        (name, *(f"{100 * row[key]:.1f} %" for key in ("flops", "time", "time_by_time")))
        for key_of, name in names.items()
        for row in results.get(key_of, ())
    ]
    own = {key: processor for key, processor in results["processors"].items() if key in names}
    processors = ", ".join(f"{names[key]}: {processor}" for key, processor in own.items())
    yield (
        "What products take less when layers are weighed by FLOPs, as they are, and at the same\n"
        "measured loss when they are weighed by the time that each takes in the dense model,\n"
        f"before anything is fitted; one thread ({processors})\n"
        "(`benchmarks/bench_prune_time.py`). Layers stay weighed by FLOPs: time adds too little\n"
        "for results that depend on the machine.\n"
    )
    yield markdown(("model", "FLOPs less", "time less", "by time"), cells)


def _pruned_experts() -> Iterator[str]:
    """Experts taken out of a small language model, by how they are chosen."""
    if not (RESULTS / "prune_experts.json").exists():
        return
    results = read("prune_experts")
    found: dict[tuple[str, int], list[float]] = {}
    for row in results["rows"]:
        if row["gone"]:
            found.setdefault((row["score"], row["gone"]), []).append(row["kl"])
    counts = sorted({gone for _, gone in found})
    trained = {(row["seed"], row["steps"]) for row in results["rows"]}
    steps = " or ".join(sorted({str(step) for _, step in trained}))
    cells = [
        (name, *(f"{statistics.fmean(found[score, gone]):.4f}" for gone in counts))
        for score, name in _EXPERTS.items()
        if (score, counts[0]) in found
    ]
    models = "one model" if len(trained) == 1 else f"means of {len(trained)} models"
    yield (
        "Whole experts taken out of each of the 3 layers of a small language model of letters,\n"
        "which has 8 in a layer and gives a token 2 (`--prune-experts`): divergence from the\n"
        f"whole model on text that it has not seen, {models} trained for {steps} steps\n"
        "(`benchmarks/bench_prune_experts.py`).\n"
    )
    yield markdown(("experts go by", *(f"{gone} of 8 gone" for gone in counts)), cells)


def _pruned_decoding(rows: Any) -> Iterator[str]:
    """Speed, memory and caches of the pruned form with a cache."""
    found = [
        (ratio, rows[f"decode {ratio}"]) for ratio in ("0.2", "0.5") if f"decode {ratio}" in rows
    ]
    if not found:
        return
    yield (
        "The form with a cache (`--prune-caches`): decoding one token after the other on one\n"
        "thread, in turns, and resident memory of a process with a session. Each is dense ->\n"
        "pruned:\n"
    )
    columns = ("fewer", "tokens a second", "cache bytes a token", "memory", "file")
    yield markdown(
        columns,
        [
            (
                f"{100 * float(ratio):.0f} %",
                " -> ".join(f"{speed:.0f}" for speed in row["tokens_per_second"]),
                " -> ".join(f"{size:,}" for size in row["cache_bytes"]),
                " -> ".join(f"{size / 1e6:.0f} MB" for size in row["rss_bytes"]),
                f"{row['bytes'] / 1e6:.1f} MB",
            )
            for ratio, row in found
        ],
    )


def _divided(rows: Any) -> Iterator[str]:
    """One size for pruning and codes."""
    cells = []
    for ratio in (8, 12):
        alone, both = (rows.get(f"division {ratio} {m}") for m in ("hyper", "prune+hyper"))
        if alone is not None and both is not None:
            share = both["division"][0]["share"]
            cells.append(
                (f"{ratio}x", f"{alone['kl']:.4f}", f"{both['kl']:.4f}", f"{100 * share:.3g} %")
            )
    if cells:
        yield "One size divided between pruning and `hyper`: divergence, and the pruned share.\n"
        yield markdown(("size", "hyper alone", "with pruning", "pruned"), cells)


def _pruned_images(rows: Any) -> Iterator[str]:
    names = {"resnet": "ResNet20, CIFAR-10", "mobilenet": "MobileNetV2, ImageNet crops"}
    shares = ("0.8", "0.7", "0.5")
    kinds = dict.fromkeys(
        (key.split()[0], *key.split()[2:])
        for key in rows
        if key.split()[0] in names and not key.endswith("dense")
    )
    cells = []
    for model, score, how in kinds:
        found = [rows.get(f"{model} {part} {score} {how}") for part in shares]
        values = ["" if row is None else f"{100 * row['accuracy']:.1f} %" for row in found]
        seconds = [f"{row['cpu_seconds']:.0f}" for row in found if row is not None]
        cells.append((names[model], score, _HOW.get(how, how), *values, " / ".join(seconds)))
    if cells:
        told = (
            f"{name}: {100 * rows[f'{key} dense']['accuracy']:.1f} %"
            for key, name in names.items()
            if f"{key} dense" in rows
        )
        yield (
            "The same for image models: accuracy with a share of the FLOPs left. 500 training\n"
            "images calibrate ResNet20, and 2,000 test images judge it. There are 500 images for\n"
            "MobileNetV2: each half calibrates once, and the other one judges.\n"
            '"fitted, by layers" has neither measured losses of outputs nor tuning.\n'
            f"Dense: {', '.join(told)}.\n"
        )
        shown = (f"{100 * float(part):.0f} % of FLOPs" for part in shares)
        columns = ("model", "score", "rest", *shown, "CPU s")
        yield markdown(columns, cells)
