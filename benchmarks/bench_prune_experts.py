"""Whole experts pruned: by the columns of the router, by how often they are chosen, by the outputs.

    python benchmarks/bench_prune_experts.py [--data FOLDER] [--seeds 0 1 2] [--steps 1200]

A small language model with mixtures of 8 experts in each of its 3 layers, of which a token gets 2,
is trained on the letters of Shakespeare, with the usual loss that balances experts; ten minutes a
seed. Without some experts of each layer it is judged by the divergence of its predictions from
the whole model's, on text that neither training nor calibration has seen. Needs torch. Rows that
were made before are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from results import RESULTS, print_table, write_results
from torch import nn
from torch.nn import functional

import onnxcomp
from onnxcomp.models import export
from onnxcomp.passes.transforms.prune import experts

Array = npt.NDArray[Any]
DATA = Path(os.environ.get("ONNXCOMP_DATA", Path(__file__).parents[2] / "shared" / "data"))
NAME = "prune_experts"

CONTEXT, BATCH = 128, 16
WIDTH, HEADS, LAYERS = 128, 4, 3
EXPERTS, CHOSEN, INNER = 8, 2, 128
# Weight of the loss that makes a router choose all experts, as of Switch Transformers.
BALANCE = 0.01
# Windows to calibrate with and to judge by.
SEEN, JUDGED = 160, 64
GONE = (1, 2, 3, 4)
SCORES = ("router", "counts", "outputs")


class Mixture(nn.Module):
    """Gated experts; a token gets those with the largest shares, which then add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / INNER**0.5)
        self.balance = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs of tokens ``(tokens, WIDTH)``."""
        shares = torch.softmax(self.gate(x), -1)
        largest, chosen = torch.topk(shares, CHOSEN)
        largest = largest / largest.sum(-1, keepdim=True)
        if self.training:  # all experts for all tokens
            mask = torch.zeros_like(shares).scatter(1, chosen, largest)
            used = (mask > 0).float().mean(0)
            self.balance = EXPERTS * (used * shares.mean(0)).sum()
            hidden = functional.silu(torch.matmul(x, self.up))
            return (torch.matmul(hidden, self.down) * mask.T[..., None]).sum(0)
        hidden = functional.silu(torch.matmul(x[:, None, None, :], self.up[chosen]))
        return (torch.matmul(hidden, self.down[chosen]).squeeze(2) * largest[..., None]).sum(1)


class Layer(nn.Module):
    """Attention to what came before, and a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries, self.keys, self.values, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.mixture = Mixture()
        self.register_buffer("later", torch.full((CONTEXT, CONTEXT), -1e4).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The stream ``(windows, CONTEXT, WIDTH)`` behind the layer."""
        own = self.first(x)
        q, k, v = (
            part(own).reshape(-1, CONTEXT, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.queries, self.keys, self.values)
        )
        scores = torch.softmax(q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + self.later, -1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(-1, CONTEXT, WIDTH))
        found = self.mixture(self.second(x).reshape(-1, WIDTH))
        return x + found.reshape(-1, CONTEXT, WIDTH)


class Letters(nn.Module):
    """Logits of the next letter, of windows of `CONTEXT` letters."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.table = nn.Embedding(letters, WIDTH)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) / 50)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of tokens ``(windows, CONTEXT)``."""
        x = self.table(tokens) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.head(self.last(x))


def read_tokens(data: Path) -> tuple[Array, Array, int]:
    """Letters to train and calibrate with, those to judge by, and how many there are."""
    text = (data / "eval" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    letters = sorted(set(text))
    tokens = np.array([letters.index(letter) for letter in text], np.int64)
    middle = len(tokens) * 9 // 10
    return tokens[:middle], tokens[middle:], len(letters)


def train(seen: Array, letters: int, seed: int, steps: int) -> Letters:
    """A trained model."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = Letters(letters).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        starts = rng.integers(0, len(seen) - CONTEXT - 1, BATCH)
        windows = torch.from_numpy(np.stack([seen[s : s + CONTEXT + 1] for s in starts]))
        logits = model(windows[:, :-1])
        own = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        balance = sum(layer.mixture.balance for layer in model.layers)
        optimizer.zero_grad()
        (own + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"seed {seed}, step {step}: {own.item():.3f}", flush=True)
    return model.eval()


def predictions(path: Path, windows: Array) -> Array:
    """Natural logarithms of probabilities, ``(windows, CONTEXT, letters)``."""
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    logits = np.concatenate([session.run(None, {name: window[None]})[0] for window in windows])
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


@contextlib.contextmanager
def ranked(score: str) -> Iterator[None]:
    """Experts go by what is asked for while the block runs."""
    known = experts.can_measure
    if score != "outputs":
        experts.can_measure = lambda _: False
    try:
        yield
    finally:
        experts.can_measure = known


def rows_of(seed: int, steps: int, data: Path) -> Iterator[dict[str, Any]]:
    """Train a model, and prune it in all ways."""
    seen, held, letters = read_tokens(data)
    made = train(seen, letters, seed, steps)
    judged = held[: JUDGED * CONTEXT].reshape(JUDGED, CONTEXT)
    wanted = held[1 : JUDGED * CONTEXT + 1].reshape(JUDGED, CONTEXT, 1)
    given = seen[: SEEN * CONTEXT].reshape(SEEN, CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder) / "dense.onnx", Path(folder) / "small.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(made, (torch.from_numpy(given[:1]),), dense, exporter="torchscript")
        exact = predictions(dense, judged)
        loss = -float(np.take_along_axis(exact, wanted, -1).mean())
        yield {"seed": seed, "score": "dense", "gone": 0, "cross_entropy": loss}
        name = onnxruntime.InferenceSession(dense).get_inputs()[0].name
        for score in SCORES:
            feeds = None if score == "router" else [{name: window[None]} for window in given]
            for gone in GONE:
                start = time.process_time()
                with ranked(score):
                    onnxcomp.optimize(
                        dense, small, method="dense", prune_experts=gone, data=feeds, verify=False
                    )
                seconds = time.process_time() - start
                found = predictions(small, judged)
                yield {
                    "seed": seed, "score": score, "gone": gone,
                    "kl": float((np.exp(exact) * (exact - found)).sum(-1).mean()),
                    "cross_entropy": -float(np.take_along_axis(found, wanted, -1).mean()),
                    "cpu_seconds": round(seconds, 1),
                }  # fmt: skip


def recorded() -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    path = RESULTS / f"{NAME}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def main() -> None:
    """Make the rows that are missing, print all, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1200)
    options = parser.parse_args()
    for seed in options.seeds:
        if any(row["seed"] == seed for row in recorded()):
            continue
        rows = []
        for row in rows_of(seed, options.steps, options.data):
            print(row, flush=True)
            rows.append(row)
        write_results(NAME, {"steps": options.steps, "rows": [*recorded(), *rows]})
    cells = [
        [row["seed"], row["score"], row["gone"], f"{row.get('kl', 0):.4f}",
         f"{row['cross_entropy']:.4f}"]
        for row in recorded()
    ]  # fmt: skip
    print_table(["seed", "score", "gone of 8", "KL", "cross entropy"], cells)


if __name__ == "__main__":
    main()
