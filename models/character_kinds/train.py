"""Train the demo model: ``python -m onnxcomp.models.character_kinds.train OUT_FOLDER``.

Needs torch; takes some minutes on two CPU cores. Data: Unicode character names and general
categories from Python's own `unicodedata`, so nothing is downloaded. Names that follow a formula
(CJK ideographs, Hangul syllables, ...) are left out. Of every eight runs of 64 code points one is
held out as a whole, so that the score is not that of neighbours in one list.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from onnxcomp.models.character_kinds import CATEGORIES, LENGTH, PAIRS, encode_names

FORMULAIC = (
    "CJK UNIFIED",
    "CJK COMPATIBILITY IDEOGRAPH",
    "HANGUL SYLLABLE",
    "TANGUT",
    "KHITAN SMALL",
    "NUSHU CHARACTER",
)
EPOCHS, BATCH, RATE, SEED = 12, 128, 2e-3, 1


class CharacterKinds(nn.Module):
    """Pairs ``(n, length)`` -> category logits ``(n, 30)``; 0.39 M parameters."""

    def __init__(self, width: int = 96, channels: int = 128, inner: int = 256) -> None:
        super().__init__()
        self.pairs = nn.Embedding(PAIRS, width)
        self.near = nn.Conv1d(width, channels, 5, padding=2)
        self.far = nn.Conv1d(channels, channels, 5, padding=4, dilation=2)
        self.up, self.down = nn.Linear(channels, inner), nn.Linear(inner, channels)
        self.hidden, self.score = nn.Linear(channels, 192), nn.Linear(192, len(CATEGORIES))
        self.drop = nn.Dropout(0.2)

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        """Logits of the categories."""
        x = self.drop(self.pairs(pairs)).transpose(1, 2)
        x = torch.relu(self.near(x))
        x = x + torch.relu(self.far(x))
        x = x.transpose(1, 2)
        x = x + self.down(torch.relu(self.up(x)))
        x = self.drop(x.amax(1))
        score: torch.Tensor = self.score(self.drop(torch.relu(self.hidden(x))))
        return score


def named_characters() -> list[tuple[int, str, int]]:
    """(code point, name, category index) of every character with a name of its own."""
    rows = []
    for code in range(0x110000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(FORMULAIC):
            rows.append((code, name, CATEGORIES.index(unicodedata.category(chr(code)))))
    return rows


def is_held_out(code: int) -> bool:
    """Whether the run of 64 code points around this one is for evaluation: a hash, one in eight."""
    return ((code >> 6) * 2654435761 % 2**32) >> 29 == 0


def batches(
    pairs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled mini-batches, each cut to a random multiple of 8 that holds its longest name."""
    order = torch.randperm(len(pairs), generator=generator)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = int((pairs[chosen] != 0).sum(1).max())
        yield pairs[chosen, : min(LENGTH, -(-longest // 8) * 8)], targets[chosen]


def train(model: CharacterKinds, pairs: torch.Tensor, targets: torch.Tensor) -> None:
    """Fit the model with AdamW and one learning-rate cycle."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(pairs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for x, y in batches(pairs, targets, generator):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(x)
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / len(pairs):.4f}", flush=True)


def accuracy(model: CharacterKinds, pairs: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(pairs).argmax(1) == targets).double().mean())


def export(model: CharacterKinds, path: Path) -> None:
    """Write the model as ONNX (opset 18) with dynamic batch and length."""
    example = torch.zeros(2, LENGTH, dtype=torch.int64)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        model,
        (example,),
        input_names=["pairs"],
        output_names=["logits"],
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: batch, 1: length},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    for item in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, proto.graph):
        item.ClearField("metadata_props")  # source lines of the machine that exported
    for output in proto.graph.output:
        output.ClearField("metadata_props")
    proto.doc_string = "Unicode character name -> general category; demo model of onnxcomp"
    onnx.save(proto, path)


def write_held_out(path: Path, rows: list[tuple[int, str, int]]) -> None:
    """Write the evaluation set: names as one string, so that the file needs no pickle."""
    np.savez_compressed(
        path,
        names=np.array("\n".join(name for _, name, _ in rows)),
        code_points=np.array([code for code, _, _ in rows], dtype=np.uint32),
        categories=np.array([kind for _, _, kind in rows], dtype=np.uint8),
    )


def main() -> None:
    """Train, export, write the evaluation set and print the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    rows = named_characters()
    pairs = torch.from_numpy(encode_names([name for _, name, _ in rows]))
    targets = torch.tensor([kind for _, _, kind in rows])
    held = torch.tensor([is_held_out(code) for code, _, _ in rows])
    model = CharacterKinds()
    counts = f"{int((~held).sum())} names, {int(held.sum())} held out"
    print(f"Unicode {unicodedata.unidata_version}: {counts}")
    train(model, pairs[~held], targets[~held])
    model.eval()
    print(f"accuracy: training {accuracy(model, pairs[~held], targets[~held]):.4f}")
    print(f"accuracy: held out {accuracy(model, pairs[held], targets[held]):.4f}")
    folder.mkdir(parents=True, exist_ok=True)
    export(model, folder / "model.onnx")
    write_held_out(folder / "held_out.npz", [row for row in rows if is_held_out(row[0])])


if __name__ == "__main__":
    main()
