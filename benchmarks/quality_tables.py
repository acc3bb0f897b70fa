"""Tables of what calibration brings, from benchmarks/results/quality.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from page_parts import markdown, read, share

__all__ = ["calibration_steps", "deep_convolutions", "other_models"]

# Bytes of the models of `other_models`, and their steps with what they stand for.
_MINILM, _RESNET = 90_323_597, 1_092_222
_STEPS = {"by values": "no", "look-ups weighed": "yes, not tuned", "scales tuned, 2 passes": "yes"}

# What `--data` does.
_DEFAULT = "scales tuned, 2 passes"

# Convolutional networks: name and bytes of the model, and steps with what they stand for.
_NETWORKS = {"mobilenetv2": ("MobileNetV2", 13_969_018), "squeezenet": ("SqueezeNet", 2_484_091)}
_DATA = {"by values": "none", "streams made up for": "62 images"}


def _row(row: dict[str, Any]) -> list[str]:
    agreement = (row["books_agreement"] + row["shakespeare_agreement"]) / 2
    size = f"{row['bytes'] / 1e6:.2f} MB"
    seconds = f"{row['cpu_seconds']:.0f}"
    return [str(row["bits"]), row["step"], size, f"{row['kl']:.4f}", share(agreement), seconds]


def calibration_steps() -> Iterator[str]:
    """What each step of calibration leaves of the loss of a small language model."""
    rows = read("quality")["language_model"]["rows"]
    order = {row["step"]: number for number, row in enumerate(rows)}
    rows = sorted(rows, key=lambda row: (-row["bits"], order[row["step"]]))
    yield (
        "The small language model below, calibrated on its training text (128 windows):\n"
        "divergence from the float32 predictions on held-out text of two kinds, and CPU seconds.\n"
        f'Each step includes those before it; "{_DEFAULT}" is what `--data` does\n'
        "(`benchmarks/bench_quality.py`).\n"
    )
    columns = ("bits", "step", "file", "KL (nats)", "same token", "CPU seconds")
    yield markdown(columns, [_row(row) for row in rows])


def deep_convolutions() -> Iterator[str]:
    """What rounding does to convolutional networks, without data and with some."""
    cells = []
    for key, (name, size) in _NETWORKS.items():
        for row in read("quality")[key]["rows"]:
            if row["step"] in _DATA:
                ratio = f"{row['bytes'] / 1e6:.2f} MB ({size / row['bytes']:.1f}x)"
                same = share(1 - row["disagreement"])
                seconds = f"{row['cpu_seconds']:.0f}"
                found = [name, str(row["bits"]), _DATA[row["step"]], ratio, same]
                cells.append([*found, f"{row['kl']:.3f}", seconds])
    yield (
        "On 428 photographs of ImageNet that were not calibrated with: as many get the dense\n"
        "model's class, divergence from its predictions, and CPU seconds of the compiler\n"
        "(`--tune 0`, `benchmarks/bench_quality.py`).\n"
    )
    columns = ("model", "bits", "data", "file", "same answers", "KL (nats)", "CPU seconds")
    yield markdown(columns, cells)


def _goal(row: dict[str, Any]) -> str:
    return f"{row['bits']} bits" if "bits" in row else f"`--ratio {row['ratio']}`"


def other_models() -> Iterator[str]:
    """What calibration brings a sentence encoder and a small residual network."""
    found = read("quality")
    encoder = found["minilm"]
    yield (
        f"The sentence encoder above, calibrated on sentences of {encoder['pairs']:,} training\n"
        "pairs of STS-B, none of which is in the development set, which it is judged by.\n"
        "ResNet20, calibrated on 1,000 training images of CIFAR-10 and judged by all 10,000 test\n"
        "images: points of accuracy that are lost, and how many images keep the dense model's\n"
        "class (`benchmarks/bench_quality.py`).\n"
    )
    cells = [
        [
            *(_goal(row), _STEPS[row["step"]], f"{row['bytes'] / 1e6:.2f} MB"),
            *(f"{_MINILM / row['bytes']:.2f}", f"{row['spearman']:.4f}"),
            *(f"{row['one_minus_cosine']:.4f}", f"{row['cpu_seconds']:.0f}"),
        ]
        for row in encoder["rows"]
    ]
    columns = ("MiniLM", "data", "file", "ratio", "Spearman", "1 - cosine", "CPU seconds")
    yield markdown(columns, cells)
    cells = [
        [
            *(_goal(row), _STEPS[row["step"]], f"{row['bytes'] / 1e3:.0f} KB"),
            *(f"{_RESNET / row['bytes']:.2f}", f"{row['accuracy_drop']:.2f}"),
            *(share(row["agreement"]), f"{row['cpu_seconds']:.0f}"),
        ]
        for row in found["resnet20"]["rows"]
    ]
    columns = ("ResNet20", "data", "file", "ratio", "points lost", "same class", "CPU seconds")
    yield markdown(columns, cells)
