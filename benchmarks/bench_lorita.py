"""LoRITa: accuracy against kept parameters for N = 1, 2, 3 factors a layer during training.

    python benchmarks/bench_lorita.py                     # about ten minutes on one core
    python benchmarks/bench_lorita.py --network mnist-mlp --factors 2 3
    python benchmarks/bench_lorita.py --full              # the paper's networks: hours on a GPU
    python benchmarks/bench_lorita.py --draw              # only the picture, from recorded results

Every network is trained with the same weight decay, which falls on the factors, multiplied out, and
truncated, all but the last layer: `local` keeps the same share of singular values in each layer,
`global` those above one share of their layer's largest, and `iterative` does that step by step and
trains the factors for one epoch after each step. Ranks are not rounded. Results of networks, N and
seeds run before are kept; tables and pictures have means over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from curves import Line, Panel, draw
from lowrank_tables import mean_of_seeds
from networks import FULL, NETWORKS, Recipe, Split
from results import RESULTS, print_table, write_results
from torch import nn
from torch.nn import functional

from onnxcomp.models import choose_ranks, collapse, lorita, parameter_groups, truncate

DATA = Path(os.environ.get("ONNXCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEPT = (0.5, 0.25, 0.1, 0.05)
# Shares of FLOPs and of parameters that differ by less are shown once.
FLOPS_DIFFER = 0.05
MODES = ("local", "global", "iterative")
BATCH = 128
COLOURS = {1: "#7a7a7a", 2: "#1f77b4", 3: "#d95f02"}
DASHES = {"local": "2 3", "global": "", "iterative": "7 3"}


def batch_of(split: Split, chosen: torch.Tensor, crops: bool) -> torch.Tensor:
    """Training images, shifted by up to four pixels and mirrored where asked for."""
    x = split.images[chosen.to(split.images.device)]
    if not crops:
        return x
    size = x.shape[-1]
    top, left = (int(v) for v in torch.randint(0, 9, (2,)))
    x = functional.pad(x, (4, 4, 4, 4))[..., top : top + size, left : left + size]
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def train(model: nn.Module, split: Split, recipe: Recipe, epochs: int, rate: float) -> float:
    """Fit with L2 decay on the factors and one cycle of the rate; return seconds."""
    start = time.perf_counter()
    groups = parameter_groups(model, recipe.decay)
    if recipe.sgd:
        optimizer: Any = torch.optim.SGD(groups, rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(groups, rate)
    steps = epochs * -(-len(split.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps))
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(split.images))
        for chosen in order.split(BATCH):
            optimizer.zero_grad()
            scores = model(batch_of(split, chosen, recipe.crops))
            labels = split.labels[chosen.to(split.labels.device)]
            functional.cross_entropy(scores, labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    return time.perf_counter() - start


def accuracy(model: nn.Module, split: Split) -> float:
    """Share of right answers on the images kept aside."""
    with torch.no_grad():
        parts = [model(x).argmax(1) for x in split.test_images.split(500)]
    return float((torch.cat(parts) == split.test_labels).double().mean())


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Linear and convolution layers by name."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def ranks_for(mode: str, model: nn.Module, kept: float) -> dict[str, int]:
    """Ranks of all layers but the last, whose few outputs are all needed."""
    *others, last = layers_of(model)
    del others
    how = "local" if mode == "local" else "global"
    return choose_ranks(model, kept, mode=how, include=lambda name, _: name != last)


def operations(model: nn.Module, image: torch.Tensor) -> int:
    """Multiplications of one image in linear and convolution layers."""
    counts: list[int] = []

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
        counts.append(output.numel() // channels * layer.weight.numel())

    hooks = [layer.register_forward_hook(count) for layer in layers_of(model).values()]
    with torch.no_grad():
        model(image[:1])
    for hook in hooks:
        hook.remove()
    return sum(counts)


def weights(model: nn.Module) -> int:
    """Weights of linear and convolution layers."""
    return sum(layer.weight.numel() for layer in layers_of(model).values())


def truncations(model: nn.Module, split: Split, recipe: Recipe) -> list[dict[str, Any]]:
    """Accuracy of a trained model with its layers multiplied out, by mode and kept share."""
    dense = (weights(model), operations(model, split.images))
    rows = []
    for mode in MODES:
        current = model
        for kept in KEPT:
            base = current if mode == "iterative" else model
            ranks = ranks_for(mode, base, kept)
            cut = truncate(copy.deepcopy(base), ranks)
            if mode == "iterative":
                train(cut, split, recipe, 1, recipe.rate / 2)
            size = (weights(cut) / dense[0], operations(cut, split.images) / dense[1])
            score = round(accuracy(cut, split), 4)
            row = {"mode": mode, "kept": kept, "accuracy": score}
            rows.append({**row, "parameters": round(size[0], 4), "flops": round(size[1], 4)})
            current = collapse(cut)
    return rows


def measure(name: str, recipe: Recipe, factors: int, arguments: Any) -> dict[str, Any]:
    """Train one network with N factors and truncate it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = recipe.data(DATA / "eval", arguments.images)
    split = Split(*(t.to(device) for t in vars(found).values()))
    torch.manual_seed(arguments.seed)
    model = lorita(recipe.build().to(device), factors)
    epochs = arguments.epochs or recipe.epochs
    seconds = train(model, split, recipe, epochs, recipe.rate)
    collapse(model)
    row = {"network": name, "factors": factors, "epochs": epochs, "weight_decay": recipe.decay}
    row |= {
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "accuracy": accuracy(model, split),
    }
    print(f"{name}, N={factors}: {row['accuracy']:.4f} after {seconds:.0f} s", flush=True)
    return {**row, "truncated": truncations(model, split, recipe)}


def key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["network"], row["factors"], row["seed"]


def recorded(name: str) -> list[dict[str, Any]]:
    """Results of earlier runs."""
    path = RESULTS / f"{name}.json"
    return list(json.loads(path.read_text())["results"]) if path.exists() else []


def panel(title: str, rows: list[dict[str, Any]], share: str) -> Panel:
    """One network's accuracy against a share of what it has: `kept` weights, or `flops`."""
    lines = []
    for row in rows:
        for mode, dash in DASHES.items():
            cuts = [cut for cut in row["truncated"] if cut["mode"] == mode]
            points = [(1.0, row["accuracy"]), *((cut[share], cut["accuracy"]) for cut in cuts)]
            shown = [point for point in points if point[0] >= KEPT[-1]]
            lines.append(Line(shown, COLOURS[row["factors"]], dash))
    return Panel(title, lines)


def picture(results: list[dict[str, Any]]) -> str:
    """Accuracy against kept parameters, and against FLOPs for networks where these differ."""
    panels, results = [], mean_of_seeds(results)
    for name in dict.fromkeys(row["network"] for row in results):
        rows = [row for row in results if row["network"] == name]
        panels.append(panel(name, rows, "kept"))
        cuts = [cut for row in rows for cut in row["truncated"]]
        if any(abs(cut["flops"] - cut["parameters"]) > FLOPS_DIFFER for cut in cuts):
            panels.append(panel(f"{name}, against FLOPs", rows, "flops"))
    legend = {f"N = {n}": (colour, "") for n, colour in COLOURS.items()}
    legend |= {mode: ("#444", dash) for mode, dash in DASHES.items()}
    title = "test accuracy against kept parameters of linear layers"
    return draw(title, panels, (1.0, *KEPT), legend)


def show(results: list[dict[str, Any]]) -> None:
    rows = [
        [row["network"], row["factors"], mode, f"{row['accuracy']:.4f}"]
        + [f"{t['accuracy']:.4f}" for t in row["truncated"] if t["mode"] == mode]
        for row in mean_of_seeds(results)
        for mode in MODES
    ]
    print_table(["network", "N", "mode", "all", *(f"{kept:.0%}" for kept in KEPT)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=[*NETWORKS, *FULL])
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of those of the recipe")
    parser.add_argument("--images", type=int, default=6000, help="training images at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="ResNet20 and VGG16")
    parser.add_argument("--draw", action="store_true", help="draw recorded results only")
    arguments = parser.parse_args()
    name = "lorita_full" if arguments.full else "lorita"
    recipes = FULL if arguments.full else NETWORKS
    results = recorded(name)
    for network in () if arguments.draw else arguments.network or recipes:
        for factors in arguments.factors:
            row = measure(network, recipes[network], factors, arguments)
            results = [r for r in results if key(r) != key(row)] + [row]
            results.sort(key=lambda r: (list(recipes).index(r["network"]), *key(r)[1:]))
            write_results(name, {"results": results})
    show(results)
    path = Path(__file__).parents[1] / "docs" / f"{name}.svg"
    path.write_text(picture(results), encoding="utf-8")


if __name__ == "__main__":
    main()
