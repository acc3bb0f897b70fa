"""Training with shared weights against pruning before training and smaller networks.

    python benchmarks/bench_sharing_training.py                  # half an hour on one core
    python benchmarks/bench_sharing_training.py --network small-vgg --method shared snip
    python benchmarks/bench_sharing_training.py --full           # ResNet20 and VGG11: a GPU
    python benchmarks/bench_sharing_training.py --draw           # only the picture

All methods keep the same number of weights in the layers of 4,096 weights or more, and the others
as they are: `shared` is `onnxcomp.models.share`, `roast` the same with hashed tiles, the plain sum
of gradients and weights that start too small, as published before STABLE-RPS; `random`,
`magnitude`, `snip`, `grasp` and `synflow` are masks chosen before training; `small` is the same
network with fewer channels, never more weights than the others; `lottery` are masks from rounds of
training and rewinding. Masked weights count as nothing, their places are not counted either.
Rows run before are kept.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_lorita import accuracy, batch_of
from curves import Line, Panel, draw
from networks import Split, cifar10, digits, resnet20, small_perceptron, small_vgg, vgg11
from pruning_at_start import (
    METHODS,
    Masks,
    apply_masks,
    keep_largest,
    magnitudes,
    masks_for,
)
from results import RESULTS, print_table, write_results
from torch import nn
from torch.nn import functional

import onnxcomp
from onnxcomp.models.shared_layers import SharedMemory
from onnxcomp.models.sharing import share

DATA = Path(os.environ.get("ONNXCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
BATCH = 128
LEAST = 4096  # weights of a layer that takes part
SHORT = ("shared", "roast", "snip", "synflow", "small")
ALL = ("shared", "roast", *METHODS, "small", "lottery")
COLOURS = {
    "shared": "#d95f02",
    "roast": "#e7a977",
    "small": "#1b7837",
    "snip": "#1f77b4",
    "synflow": "#7570b3",
    "grasp": "#66a6c8",
    "magnitude": "#7a7a7a",
    "random": "#bbbbbb",
    "lottery": "#000000",
}
DASHES = {"roast": "7 3", "random": "2 3", "small": "7 3"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a network is trained.

    Attributes:
        build: Makes it, with a factor of its channels.
        epochs: Passes over the images.
        rate: Highest rate of one cycle of SGD with momentum.
        ratios: Weights over kept weights.
        methods: What is compared.
        rounds: Rounds of the lottery ticket.
        data: Reads images.
        crops: Whether images are shifted and mirrored.
    """

    build: Callable[[float], nn.Module]
    epochs: int
    rate: float
    ratios: Sequence[int]
    methods: Sequence[str]
    rounds: int = 3
    data: Callable[[Path, int], Split] = cifar10
    crops: bool = True


def strided_resnet20(width: float) -> nn.Module:
    """ResNet20 on half the resolution."""
    return resnet20(width, stride=2)


NETWORKS = {
    "digits": Plan(small_perceptron, 25, 0.1, (8, 32, 128), ALL, data=digits, crops=False),
    "small-vgg": Plan(small_vgg, 6, 0.1, (4, 16, 64), SHORT),
    "resnet20-strided": Plan(strided_resnet20, 5, 0.1, (16,), ("shared", "snip", "small")),
}
FULL = {
    "resnet20": Plan(resnet20, 160, 0.1, (4, 16, 64, 256), ALL, 12),
    "vgg11": Plan(vgg11, 160, 0.1, (4, 16, 64, 256), ALL, 12),
}


def large(model: nn.Module) -> list[str]:
    """Names of the weights that take part."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    return [f"{name}.weight" for name, layer in layers if layer.weight.numel() >= LEAST]


def parameters(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    rate: float,
    crops: bool,
    masks: Masks | None = None,
) -> None:
    """SGD with Nesterov momentum, one cycle of the rate, decay of what is trained."""
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * -(-len(split.images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps))
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(split.images)).split(BATCH):
            optimizer.zero_grad()
            scores = model(batch_of(split, chosen, crops))
            functional.cross_entropy(scores, split.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            if masks:
                apply_masks(model, masks)
    model.eval()


def narrow(plan: Plan, most: int) -> nn.Module:
    """The widest network of its kind with at most so many parameters."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(plan.build(middle)) <= most else (low, middle)
    return plan.build(low)


def roasted(model: nn.Module, ratio: int, include: str | None = None) -> nn.Module:
    """Hashed tiles, plain gradients; `std` taken for the bound of uniform entries."""
    share(model, ratio, include=include, scaling="none", map="roast")
    for memory in (m for m in model.modules() if isinstance(m, SharedMemory)):
        nn.init.uniform_(memory.values, -memory.std, memory.std)
    return model


def lottery(model: nn.Module, split: Split, plan: Plan, epochs: int, count: int) -> Masks:
    """Train for an epoch, remember, then train, keep the largest and rewind, in rounds."""
    names = large(model)
    train(model, split, 1, plan.rate / 2, plan.crops)
    start = copy.deepcopy(model.state_dict())
    total = sum(model.get_parameter(name).numel() for name in names)
    masks: Masks = {}
    for step in range(1, plan.rounds + 1):
        train(model, split, epochs, plan.rate, plan.crops, masks)
        kept = round(total * (count / total) ** (step / plan.rounds))
        masks = keep_largest(magnitudes(model, names), kept)
        model.load_state_dict(start)
        apply_masks(model, masks)
    return masks


def batches(split: Split) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images to score weights with."""
    return [(split.images[i : i + 250], split.labels[i : i + 250]) for i in (0, 250, 500, 750)]


def fit(plan: Plan, method: str, ratio: int, split: Split, options: Any) -> nn.Module:
    """Train one network with one method."""
    torch.manual_seed(options.seed)
    epochs = options.epochs or plan.epochs
    model = plan.build(1.0).to(split.images.device)
    names = large(model)
    total = sum(model.get_parameter(name).numel() for name in names)
    count, rate = max(1, math.ceil(total / ratio)), options.rate or plan.rate
    masks: Masks = {}
    if method == "shared":
        # The gradient of an entry is the mean over its uses, not the sum.
        share(model, ratio)
        rate *= options.gain or math.sqrt(ratio)
    elif method == "roast":
        roasted(model, ratio)
    elif method == "small":
        model = narrow(plan, parameters(model) - total + count).to(split.images.device)
    elif method == "lottery":
        masks = lottery(model, split, plan, epochs, count)
    elif method != "dense":
        masks = masks_for(method, model, names, batches(split), count)
    apply_masks(model, masks)
    train(model, split, epochs, rate, plan.crops, masks)
    masked = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    model.trained = parameters(model) - masked
    return model


def measure(network: str, plan: Plan, method: str, ratio: int, options: Any) -> dict[str, Any]:
    """One row: train, and judge by the images kept aside."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = plan.data(DATA / "eval", options.images)
    split = Split(*(tensor.to(device) for tensor in vars(found).values()))
    start = time.process_time()
    model = fit(plan, method, ratio, split, options)
    row = {
        "network": network,
        "method": method,
        "ratio": ratio,
        "seed": options.seed,
        "epochs": options.epochs or plan.epochs,
        "images": len(split.images),
        "parameters": model.trained,
        "accuracy": round(accuracy(model, split), 4),
        "seconds": round(time.process_time() - start, 1),
    }
    if method in (*METHODS, "lottery"):
        row["stored"] = stored(model, split.images[:1])
    print(row, flush=True)
    return row


def stored(model: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """What the codec `sparse` makes of a pruned network: elements in the file, and bytes.

    Elements are counted among the weights that take part, as the ratio is.
    """
    names = set(large(model))
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense.onnx", Path(folder) / "small.onnx"
        # Batch norms stay apart: weights are those that were trained, and have their names.
        kept_apart = torch.onnx.TrainingMode.PRESERVE
        torch.onnx.export(
            model.cpu().eval(), (image.cpu(),), dense, dynamo=False, training=kept_apart
        )
        result = onnxcomp.optimize(dense, small, method="sparse", min_size=0)
        sites = [site for site in result.report.sites if site.name in names]
        # What holds nothing but zeros is a constant.
        kept = [site.params.get("kept", 0) for site in sites if site.method != "dense"]
        return {
            "elements": sum(kept) + sum(math.prod(s.shape) for s in sites if s.method == "dense"),
            "weights": sum(math.prod(site.shape) for site in sites),
            "dense_bytes": dense.stat().st_size,
            "bytes": small.stat().st_size,
        }


def wanted(plans: dict[str, Plan], options: Any) -> list[tuple[str, str, int]]:
    """Rows to run, in order."""
    rows = []
    for network in options.network or plans:
        plan = plans[network]
        ratios = options.ratio or plan.ratios
        rows.append((network, "dense", 1))
        rows += [(network, m, r) for r in ratios for m in options.method or plan.methods]
    return rows


def key(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["network"], row["method"], row["ratio"], row["seed"]


def mean(rows: Sequence[dict[str, Any]], network: str, method: str, ratio: int) -> float | None:
    """Mean accuracy over seeds; None where there are no such rows."""
    asked = (network, method, ratio)
    found = [row["accuracy"] for row in rows if key(row)[:3] == asked]
    return sum(found) / len(found) if found else None


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy against kept weights, a panel for each network with several ratios."""
    panels, shares = [], {1.0}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    for network in dict.fromkeys(row["network"] for row in rows):
        ratios = sorted({row["ratio"] for row in rows if row["network"] == network})
        if len(ratios) < 3:
            continue
        shares |= {1 / ratio for ratio in ratios}
        dense = mean(rows, network, "dense", 1)
        lines = []
        for method in methods:
            found = [(1 / r, mean(rows, network, method, r)) for r in ratios]
            points = [(kept, score) for kept, score in [(1.0, dense), *found] if score is not None]
            lines.append(Line(points, COLOURS[method], DASHES.get(method, "")))
        panels.append(Panel(network, lines))
    legend = {method: (COLOURS[method], DASHES.get(method, "")) for method in methods}
    title = "test accuracy against kept weights"
    return draw(title, panels, sorted(shares, reverse=True), legend)


def show(rows: Sequence[dict[str, Any]]) -> None:
    keys = dict.fromkeys((row["network"], row["method"]) for row in rows)
    ratios = sorted({row["ratio"] for row in rows})
    table = [
        [*k, *("" if (a := mean(rows, *k, r)) is None else f"{a:.4f}" for r in ratios)]
        for k in keys
    ]
    print_table(["network", "method", *(f"{ratio}x" for ratio in ratios)], table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=[*NETWORKS, *FULL])
    parser.add_argument("--method", nargs="+", choices=ALL)
    parser.add_argument("--ratio", nargs="+", type=int)
    parser.add_argument("--epochs", type=int, help="instead of those of the plan")
    parser.add_argument("--rate", type=float, help="instead of that of the plan")
    parser.add_argument("--gain", type=float, help="rate of shared weights over that of the others")
    parser.add_argument("--images", type=int, help="training images; 10,000, with --full 20,000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="ResNet20 and VGG11, all methods")
    parser.add_argument("--draw", action="store_true", help="draw recorded results only")
    parser.add_argument("--trial", action="store_true", help="print rows, record nothing")
    options = parser.parse_args()
    options.images = options.images or (20000 if options.full else 10000)
    name = "sharing_training_full" if options.full else "sharing_training"
    path = RESULTS / f"{name}.json"
    rows = list(json.loads(path.read_text())["rows"]) if path.exists() else []
    plans = FULL if options.full else NETWORKS
    for network, method, ratio in () if options.draw else wanted(plans, options):
        done = (network, method, ratio, options.seed) in {key(row) for row in rows}
        if done and not options.trial:
            continue
        row = measure(network, plans[network], method, ratio, options)
        if not options.trial:
            rows.append(row)
            write_results(name, {"rows": rows})
    if rows and not options.trial:
        show(rows)
        svg = Path(__file__).parents[1] / "docs" / f"{name}.svg"
        svg.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
