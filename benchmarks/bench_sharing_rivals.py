"""Hashed sharing against shared bases and factors of their own, at equal bytes.

    python benchmarks/bench_sharing_rivals.py                # fifty minutes on one core
    python benchmarks/bench_sharing_rivals.py --network small-lm --seed 0 --form trained
    python benchmarks/bench_sharing_rivals.py --full         # wider and deeper, for longer: a GPU
    python benchmarks/bench_sharing_rivals.py --draw         # only the picture

A vision transformer on CIFAR-10 and a language model of characters. All methods have the same
number of weights for the linear maps within the layers, and leave the rest as it is. `trained`:
`shared` is `onnxcomp.models.share`, `roast` the same with hashed tiles and plain gradients,
`factors` are two thin layers from the start, `basis` the same with the first one shared by the
layers of a kind (queries, keys and values of all depths, and so on), `small` is a narrower network,
never with more weights. `after`: the dense network is trained, and compressed then with samples:
`hash` by least squares, `distilled` with shared values trained towards the dense outputs,
`matched`, `basis`, `factors`, and `hyper` at no more bytes. Rows run before are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_lorita import batch_of
from bench_sharing_training import roasted
from curves import Line, Panel, draw
from networks import SmallLM, SmallViT, Split, cifar10, shakespeare
from results import RESULTS, print_table, write_results
from torch import nn
from torch.nn import functional

import onnxcomp
from onnxcomp.models.shared_layers import SharedMemory
from onnxcomp.models.sharing import share
from onnxcomp.passes.planning.plan import Plan

DATA = Path(os.environ.get("ONNXCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
RATIOS = (4, 16)
TRAINED = ("shared", "basis", "factors", "small")
AFTER = ("hash", "distilled", "matched", "basis", "factors", "hyper")
# Linear maps of a layer, in the order of their use.
KINDS = ("read", "write", "up", "down")
INSIDE, OUTSIDE = r"^layers\.", r"^(patches|places|head|table)\b"
DISTILLED = 200  # steps
# Samples to compress with, and of one batch of them.
SAMPLES, PART = 256, 32
COLOURS = {
    "shared": "#d95f02",
    "roast": "#e7a977",
    "basis": "#7570b3",
    "factors": "#1f77b4",
    "small": "#1b7837",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a network is trained.

    Attributes:
        build: Makes it, with a width.
        width: Of the dense network.
        data: Reads inputs and what they should give.
        samples: Of them, to train on.
        epochs: Passes over them.
        batch: Samples of a step.
        rate: Highest rate of one cycle of AdamW.
        crops: Whether inputs are shifted and mirrored.
    """

    build: Callable[[int], nn.Module]
    width: int
    data: Callable[[Path, int], Split]
    samples: int
    epochs: int
    batch: int
    rate: float = 2e-3
    crops: bool = False


def long_texts(folder: Path, count: int) -> Split:
    """Windows of 256 characters."""
    return shakespeare(folder, count, 256)


NETWORKS = {
    "small-vit": Setting(SmallViT, 64, cifar10, 4000, 5, 128, crops=True),
    "small-lm": Setting(SmallLM, 64, shakespeare, 24000, 1, 32, 6e-3),
}
FULL = {
    "vit": Setting(lambda w: SmallViT(w, 8), 256, cifar10, 20000, 100, 128, 1e-3, crops=True),
    "lm": Setting(lambda w: SmallLM(w, 8, context=256), 384, long_texts, 40000, 8, 64, 1e-3),
}


class Thin(nn.Module):
    """A linear layer by two factors.

    Args:
        first: The first one, of this layer or of several.
        second: The second one ``(rows, rank)``.
        bias: Of the layer.
    """

    def __init__(self, first: nn.Linear, second: torch.Tensor, bias: nn.Parameter) -> None:
        super().__init__()
        self.first, self.second, self.bias = first, nn.Parameter(second), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's outputs."""
        return functional.linear(self.first(x), self.second, self.bias)


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear maps within the layers, by name, in the order of their use."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {f"layers.{i}.{k}": found[f"layers.{i}.{k}"]
            for i in range(len(model.layers)) for k in KINDS}  # fmt: skip


def weights(model: nn.Module) -> int:
    """Weights of the linear maps within the layers."""
    return sum(layer.weight.numel() for layer in linear_maps(model).values())


def families(names: Sequence[str], method: str) -> list[list[str]]:
    """Layers that have one basis: those of a kind, or each alone."""
    if method == "factors":
        return [[name] for name in names]
    return [[name for name in names if name.endswith(f".{kind}")] for kind in KINDS]


def ranks(shapes: Sequence[Sequence[tuple[int, int]]], ratio: int) -> list[int]:
    """Ranks of families of ``(rows, length)``: an equal share of each, no more in all."""
    sizes = [own[0][1] + sum(rows for rows, _ in own) for own in shapes]
    full = [sum(rows * length for rows, length in own) for own in shapes]
    exact = [whole / ratio / size for whole, size in zip(full, sizes, strict=True)]
    found = [max(1, int(share)) for share in exact]
    room = sum(full) / ratio - sum(r * size for r, size in zip(found, sizes, strict=True))
    for number in sorted(range(len(found)), key=lambda n: int(exact[n]) - exact[n]):
        if sizes[number] <= room:
            found[number], room = found[number] + 1, room - sizes[number]
    return found


def thinned(model: nn.Module, method: str, ratio: int) -> nn.Module:
    """Factors in the place of layers: of their random weights, as large as these."""
    layers = linear_maps(model)
    groups = families(list(layers), method)
    shapes = [[tuple(layers[name].weight.shape) for name in group] for group in groups]
    for group, rank in zip(groups, ranks(shapes, ratio), strict=True):
        stacked = torch.cat([layers[name].weight.detach() for name in group])
        rows, values, columns = torch.linalg.svd(stacked, full_matrices=False)
        scale = (values.square().sum() / values[:rank].square().sum()).sqrt()
        root = (values[:rank] * scale).sqrt()
        first = nn.Linear(stacked.shape[1], rank, bias=False)
        first.weight = nn.Parameter((root[:, None] * columns[:rank]).contiguous())
        parts = (rows[:, :rank] * root).split([len(layers[name].weight) for name in group])
        for name, part in zip(group, parts, strict=True):
            parent, _, own = name.rpartition(".")
            thin = Thin(first, part.contiguous(), layers[name].bias)
            setattr(model.get_submodule(parent), own, thin)
    return model


def parameters(model: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in model.parameters())


def narrow(setting: Setting, most: int) -> nn.Module:
    """The widest network of its kind with at most so many parameters."""
    widths = range(4, setting.width + 1, 4)
    return setting.build(max(w for w in widths if parameters(setting.build(w)) <= most))


def start(setting: Setting, method: str, ratio: int) -> nn.Module:
    """A network of one method before training."""
    model = setting.build(setting.width)
    if method == "shared":
        share(model, ratio, include=INSIDE)
    elif method == "roast":
        roasted(model, ratio, include=INSIDE)
    elif method in ("basis", "factors"):
        thinned(model, method, ratio)
    elif method == "small":
        inside = weights(model)
        model = narrow(setting, parameters(model) - inside + inside // ratio)
    return model


def train(model: nn.Module, split: Split, setting: Setting) -> None:
    """AdamW, one cycle of the rate."""
    optimizer = torch.optim.AdamW(model.parameters(), setting.rate, weight_decay=0.01)
    steps = setting.epochs * -(-len(split.images) // setting.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.rate, total_steps=steps)
    model.train()
    for _ in range(setting.epochs):
        for chosen in torch.randperm(len(split.images)).split(setting.batch):
            optimizer.zero_grad()
            scores = model(batch_of(split, chosen, setting.crops)).flatten(0, -2)
            functional.cross_entropy(scores, split.labels[chosen].flatten()).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def judged(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Share of right answers, and the loss in nats."""
    flat, right = scores.flatten(0, -2), labels.flatten()
    return {
        "accuracy": round(float((flat.argmax(1) == right).double().mean()), 4),
        "loss": round(float(functional.cross_entropy(flat, right)), 4),
    }


def quality(model: nn.Module, split: Split) -> dict[str, float]:
    """Of a module, on what was kept aside."""
    with torch.no_grad():
        scores = torch.cat([model(x) for x in split.test_images.split(500)])
    return judged(scores, split.test_labels)


def exported(model: nn.Module, split: Split, path: Path) -> Path:
    """A module as a file, with a free batch."""
    torch.onnx.export(
        model.cpu().eval(), (split.images[:2].cpu(),), path, dynamo=False,
        input_names=["x"], dynamic_axes={"x": {0: "n"}},
    )  # fmt: skip
    return path


def stored_bytes(model: nn.Module, split: Split, method: str) -> int:
    """Bytes of the file that is deployed."""
    with tempfile.TemporaryDirectory() as folder:
        path, small = exported(model, split, Path(folder) / "m.onnx"), Path(folder) / "s.onnx"
        if method not in ("shared", "roast"):
            return path.stat().st_size
        result = onnxcomp.optimize(path, small, method="hash", exclude=OUTSIDE)
        found = [site for site in result.report.sites if "hash.memory" in site.name]
        trained = {m.values.numel() for m in model.modules() if isinstance(m, SharedMemory)}
        if {math.prod(site.shape) for site in found} != trained:
            raise SystemExit(f"of memories of {trained} numbers were found {found}")
        return small.stat().st_size


def plan_of(path: Path, method: str, ratio: int) -> Plan:
    """What becomes of the linear maps within the layers of a trained network."""
    plan = onnxcomp.plan(path, method="dense", min_size=0)
    inside = [choice for choice in plan if choice.uses == ("MatMul",) and "MatMul" in choice.site]
    names = [f"{choice.site}.{KINDS[n % len(KINDS)]}" for n, choice in enumerate(inside)]
    by_name = dict(zip(names, inside, strict=True))
    settings = {
        "hash": {"map": "fold", "compression": ratio, "memory": "float32", "limit": 2.0},
        "matched": {4: {"chunk": 8, "compression": 5}, 16: {"chunk": 16, "compression": 22}}[ratio],
        "hyper": {"bits": {4: 4, 16: 2}[ratio]},
    }
    settings["distilled"] = settings["hash"]
    settings["matched"] |= {"map": "matched", "memory": "float32", "limit": 2.0}
    if method not in ("basis", "factors"):
        codec = "hyper" if method == "hyper" else "hash"
        for choice in inside:
            plan[choice.site] = choice.with_(codec=codec, **settings[method])
        return plan
    groups = families(names, method)
    # Weights are stored transposed, as exporters do.
    shapes = [[by_name[name].shape[::-1] for name in group] for group in groups]
    for number, rank in enumerate(ranks(shapes, ratio)):
        for choice in (by_name[name] for name in groups[number]):
            own = {"basis": f"of {number}"} if method == "basis" else {}
            codec = "shared_basis" if method == "basis" else "lowrank"
            plan[choice.site] = choice.with_(codec=codec, rank=rank, **own)
    return plan


def shared_bytes(sites: Sequence[Any]) -> int:
    """Of bases, which no weight counts as its own."""
    found = {s.params["basis"]: s.params["rank"] * s.shape[0] for s in sites if "basis" in s.params}
    return 4 * sum(found.values())


def after_rows(
    path: Path, split: Split, ratios: Sequence[int], folder: Path
) -> Iterator[dict[str, Any]]:
    """A trained network, compressed by each method."""
    parts = split.images[:SAMPLES].cpu().split(PART)
    feeds = [{"x": part.numpy()} for part in parts]
    for ratio in ratios:
        for method in AFTER:
            small = folder / "small.onnx"
            plan = plan_of(path, method, ratio)
            asked: dict[str, Any] = {"plan": plan}
            if method == "distilled":
                names = [re.escape(choice.site) for choice in plan if choice.codec == "hash"]
                rule = f".*:map=fold,compression={ratio},memory=float32,limit=2"
                asked = {"method": "hash", "include": f"^({'|'.join(names)})$", "set_": rule}
                asked["distill"] = DISTILLED
            result = onnxcomp.optimize(
                path, small, data=feeds, verify=False, jobs=1, min_size=0, **asked
            )
            session = onnxcomp.InferenceSession(small)
            tests = split.test_images.cpu().split(500)
            scores = np.concatenate([session.run(None, {"x": x.numpy()})[0] for x in tests])
            sites = [site for site in result.report.sites if site.method != "dense"]
            yield {
                "method": method,
                "ratio": ratio,
                "bytes": sum(site.bytes_after for site in sites) + shared_bytes(sites),
                **judged(torch.from_numpy(scores), split.test_labels.cpu()),
            }


def measure(
    name: str, setting: Setting, seed: int, done: set[tuple[Any, ...]], options: Any
) -> Iterator[dict[str, Any]]:
    """Rows of one network and seed that were not run before."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = setting.data(DATA / "eval", options.samples or setting.samples)
    split = Split(*(tensor.to(device) for tensor in vars(found).values()))
    wanted = [("dense", 1), *((m, r) for r in options.ratio for m in options.method)]
    for method, ratio in wanted:
        row = {"network": name, "form": "trained", "method": method, "ratio": ratio, "seed": seed}
        compressed = method == "dense" and "after" in options.form
        compressed = compressed and (name, "after", AFTER[0], options.ratio[0], seed) not in done
        known = key(row) in done or (method != "dense" and "trained" not in options.form)
        if known and not compressed:
            continue
        torch.manual_seed(seed)
        begin = time.process_time()
        model = start(setting, method, ratio).to(device)
        train(model, split, setting)
        row |= {"parameters": parameters(model), **quality(model, split)}
        row["seconds"] = round(time.process_time() - begin, 1)
        with tempfile.TemporaryDirectory() as folder:
            if not known:
                yield {**row, "file": stored_bytes(model, split, method)}
            if compressed:
                path = exported(model, split, Path(folder) / "m.onnx")
                for found_row in after_rows(path, split, options.ratio, Path(folder)):
                    yield {"network": name, "form": "after", "seed": seed, **found_row}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["form"], row["method"], row["ratio"], row["seed"]


def mean(rows: Sequence[dict[str, Any]], *asked: Any, column: str = "accuracy") -> float | None:
    """Mean over seeds; None where there are no such rows."""
    found = [row[column] for row in rows if key(row)[:4] == asked]
    return sum(found) / len(found) if found else None


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy of what was trained, against kept weights."""
    panels = []
    ratios = sorted({row["ratio"] for row in rows})
    trained = {row["method"] for row in rows if row["form"] == "trained"}
    colours = {method: colour for method, colour in COLOURS.items() if method in trained}
    for network in dict.fromkeys(row["network"] for row in rows):
        lines = []
        for method, colour in colours.items():
            found = [(1 / r, mean(rows, network, "trained", method, r)) for r in ratios if r > 1]
            dense = (1.0, mean(rows, network, "trained", "dense", 1))
            points = [(kept, score) for kept, score in (dense, *found) if score is not None]
            lines.append(Line(points, colour))
        panels.append(Panel(network, lines))
    legend = {method: (colour, "") for method, colour in colours.items()}
    title = "right answers against kept weights within the layers"
    return draw(title, panels, [1 / ratio for ratio in ratios], legend)


def show(rows: Sequence[dict[str, Any]]) -> None:
    keys = dict.fromkeys(key(row)[:4] for row in rows)
    print_table(
        ["network", "form", "method", "ratio", "accuracy", "loss"],
        [
            [*k, f"{mean(rows, *k):.4f}", f"{mean(rows, *k, column='loss'):.4f}"]
            for k in sorted(keys)
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", choices=[*NETWORKS, *FULL])
    parser.add_argument("--form", nargs="+", choices=("trained", "after"))
    parser.add_argument("--method", nargs="+", choices=[*TRAINED, "roast"], default=list(TRAINED))
    parser.add_argument("--ratio", nargs="+", type=int, choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--samples", type=int, help="to train on, instead of the setting's")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--full", action="store_true", help="wider, deeper, longer")
    parser.add_argument("--draw", action="store_true", help="draw recorded results only")
    options = parser.parse_args()
    options.form = options.form or ["trained", "after"]
    name, settings = "sharing_rivals", FULL if options.full else NETWORKS
    name += "_full" if options.full else ""
    path = RESULTS / f"{name}.json"

    def recorded() -> list[dict[str, Any]]:
        return list(json.loads(path.read_text())["rows"]) if path.exists() else []

    for seed in [] if options.draw else options.seed:
        for network in options.network or settings:
            done = {key(row) for row in recorded()}
            for row in measure(network, settings[network], seed, done, options):
                print(row, flush=True)
                write_results(name, {"rows": [*recorded(), row]})
    rows = recorded()
    if rows:
        show(rows)
        svg = Path(__file__).parents[1] / "docs" / f"{name}.svg"
        svg.write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
